"""Whether oneDNN's convolution works is found out in a child process, once for each jaxlib and processor."""

import json
from pathlib import Path

import numpy as np
import pytest

from ev3_distill.runtime import compile_cache
from ev3_distill.students.layers import conv, onednn, onednn_probe


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """A cache for this test alone, on a processor that oneDNN has fast code for; returns the file of the answer."""
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("EV3_DISTILL_ONEDNN", "1")
    if not has_avx2():
        pytest.skip("the processor has no AVX2")
    onednn.reason.cache_clear()
    yield tmp_path / onednn.FOLDER / f"{compile_cache.version()}.json"
    onednn.reason.cache_clear()


def has_avx2():
    path = Path("/proc/cpuinfo")
    return path.exists() and " avx2 " in path.read_text(encoding="utf-8")


def child(monkeypatch, code):
    """Replaces the program of the child process."""
    monkeypatch.setattr(onednn, "PROBE", ("-c", code))


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("pass", ""),
        ("import os; os.abort()", "crashed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed"),
        ("import sys; print('a kernel differs', file=sys.stderr); sys.exit(3)", "failed: a kernel differs"),
    ],
    ids=["works", "abort", "segmentation fault", "wrong values"],
)
def test_answer_of_the_child_process_is_kept(monkeypatch, answers, code, wanted):
    child(monkeypatch, code)
    found = onednn.reason()
    assert (wanted in found) if wanted else found == ""
    assert onednn.available() == (not wanted)
    assert json.loads(answers.read_text()) == {"reason": found}
    by = conv.computed_by()
    assert by == ("oneDNN" if not wanted else f"XLA ({found})")
    assert (onednn.TRIED in by) == bool(wanted)  # then a run warns
    child(monkeypatch, "raise SystemExit('asked again')")
    onednn.reason.cache_clear()
    assert onednn.reason() == found


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "crashed"),
        ("raise MemoryError", "failed: MemoryError"),
        ("import time; time.sleep(60)", "did not end"),
    ],
    ids=["killed", "out of memory", "out of time"],
)
def test_child_that_proves_nothing_is_asked_again_by_the_next_process(monkeypatch, answers, code, wanted):
    monkeypatch.setattr(onednn, "PROBE_S", 2)
    child(monkeypatch, code)
    assert wanted in onednn.reason() and not onednn.available()
    assert not answers.exists()
    monkeypatch.setattr(onednn, "PROBE_S", 60)
    child(monkeypatch, "pass")
    onednn.reason.cache_clear()  # as in a new process
    assert onednn.available() and answers.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"reason": 1}', '{"other": ""}'])
def test_damaged_answer_is_found_out_again(monkeypatch, answers, content):
    answers.parent.mkdir()
    answers.write_text(content)
    child(monkeypatch, "pass")
    assert onednn.reason() == ""
    assert json.loads(answers.read_text()) == {"reason": ""}


def test_answer_is_used_where_it_cannot_be_kept(monkeypatch, answers):
    answers.parent.write_text("a file in the place of the folder")
    child(monkeypatch, "import os; os.abort()")
    assert "crashed" in onednn.reason()


def test_variable_turns_it_off_without_a_child(monkeypatch, answers):
    monkeypatch.setenv("EV3_DISTILL_ONEDNN", "0")
    child(monkeypatch, "raise SystemExit('asked')")
    assert onednn.reason() == "EV3_DISTILL_ONEDNN=0" and not answers.exists()
    assert onednn.TRIED not in conv.computed_by()  # whoever turns it off needs no warning


def test_probe_notices_that_there_is_no_such_call(monkeypatch):
    monkeypatch.setattr(onednn, "CALL", "__no_such_call")
    assert "__no_such_call" in onednn_probe.check()


def test_probe_notices_wrong_values(monkeypatch):
    """With XLA's convolution in the place of the call it passes, with other values it fails."""

    def by_xla(x, kernel, pads, *, strides=(1, 1), dilation=(1, 1), axes="HWIO"):
        return onednn_probe.jax.lax.conv_general_dilated(
            x, kernel, strides, pads, rhs_dilation=dilation, dimension_numbers=("NHWC", axes, "NHWC")
        )

    monkeypatch.setattr(onednn, "convolution", by_xla)
    assert onednn_probe.check() == ""
    monkeypatch.setattr(onednn, "convolution", lambda *args, **options: by_xla(*args, **options) * 1.001)
    assert "differs from XLA's" in onednn_probe.check()
    monkeypatch.setattr(onednn, "convolution", lambda *args, **options: by_xla(*args, **options) * np.nan)
    assert "differs from XLA's" in onednn_probe.check()
