"""The kernels are compiled and tested in a child process, once for each jaxlib and processor."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ev3_distill.students.layers import compiled, compiled_probe, conv

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(b'library'); "


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """A cache for this test alone, on a processor with AVX2, without loading what a child writes; returns the folder."""
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("EV3_DISTILL_KERNELS", "1")
    monkeypatch.setattr(compiled, "register", lambda path: None)
    if not has_avx2():
        pytest.skip("the processor has no AVX2")
    compiled.reason.cache_clear()
    yield tmp_path / compiled.FOLDER
    compiled.reason.cache_clear()


def has_avx2():
    path = Path("/proc/cpuinfo")
    return path.exists() and " avx2 " in path.read_text(encoding="utf-8")


def child(monkeypatch, code):
    """Replaces the program of the child process."""
    monkeypatch.setattr(compiled, "PROBE", ("-c", code))


def again():
    """As in a new process."""
    compiled.reason.cache_clear()
    return compiled.reason()


def answer(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (WRITE, ""),
        ("import os; os.abort()", "crashed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed"),
        ("import sys; print('a kernel differs', file=sys.stderr); sys.exit(3)", "failed: a kernel differs"),
    ],
    ids=["works", "abort", "segmentation fault", "wrong values"],
)
def test_answer_of_the_child_process_is_stored(monkeypatch, answers, code, wanted):
    child(monkeypatch, code)
    reason = compiled.reason()
    assert (wanted in reason) if wanted else reason == ""
    assert compiled.available() == (not wanted)
    digest = "" if wanted else hashlib.sha256(b"library").hexdigest()
    assert answer(answers) == {"reason": reason, "sha256": digest}
    by = conv.computed_by()
    assert by == ("compiled kernels" if not wanted else f"XLA ({reason})")
    assert (compiled.TRIED in by) == bool(wanted)  # then a run warns
    child(monkeypatch, "raise SystemExit('asked again')")
    assert again() == reason
    assert {path.suffix for path in answers.iterdir()} <= {"", ".json", ".so"}  # no temporary file is left


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
    monkeypatch.setattr(compiled, "PROBE_S", 2)
    child(monkeypatch, code)
    assert wanted in compiled.reason() and not compiled.available()
    assert not list(answers.glob("*.json"))
    monkeypatch.setattr(compiled, "PROBE_S", 60)
    child(monkeypatch, WRITE)
    assert again() == "" and list(answers.glob("*.json"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"reason": 1}', '{"other": ""}', '{"reason": "", "sha256": ""}'])
def test_damaged_answer_is_replaced(monkeypatch, answers, content):
    child(monkeypatch, WRITE)
    compiled.reason()
    (path,) = answers.glob("*.json")
    path.write_text(content)
    assert again() == ""
    assert answer(answers)["reason"] == ""


def test_damaged_library_is_never_loaded(monkeypatch, answers):
    child(monkeypatch, WRITE)
    compiled.reason()
    compiled.library().write_bytes(b"library of somebody else")
    loaded = []
    monkeypatch.setattr(compiled, "register", lambda path: loaded.append(path.read_bytes()))
    assert again() == "" and loaded == [b"library"]  # compiled again


def test_folder_of_others_is_not_used(monkeypatch, answers):
    child(monkeypatch, "raise SystemExit('asked')")
    answers.mkdir(mode=0o777)
    answers.chmod(0o777)
    assert "other users have access" in compiled.reason()
    answers.rmdir()
    answers.symlink_to(answers.parent)
    assert "is a link" in again()


def test_variable_turns_kernels_off_without_a_child(monkeypatch, answers):
    monkeypatch.setenv("EV3_DISTILL_KERNELS", "0")
    child(monkeypatch, "raise SystemExit('asked')")
    assert compiled.reason() == "EV3_DISTILL_KERNELS=0" and not answers.exists()
    assert compiled.TRIED not in conv.computed_by()  # whoever turns them off needs no warning


def test_machine_without_a_compiler(monkeypatch, answers):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(answers))
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert compiled.reason() == compiled.NO_COMPILER and not list(answers.glob("*.json"))
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: name)
    assert compiled.compiler() == [sys.executable, "-m", "ziglang", "c++"]
    monkeypatch.setenv("CXX", "ccache g++")
    assert compiled.compiler() == ["ccache", "g++"]


def test_compiler_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(\"error: no such flag\")'")
    assert compiled.compile_kernels(tmp_path / "x.so").endswith("error: no such flag")
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert "No such file" in compiled.compile_kernels(tmp_path / "x.so")


def test_several_processes_compile_once(tmp_path):
    """The real program, three times at once; all of them use the same library."""
    if not has_avx2() or not compiled.compiler():
        pytest.skip("no compiler, or no AVX2")
    code = "from ev3_distill.students.layers import compiled; print(compiled.reason() or compiled.library())"
    environment = {**os.environ, "EV3_DISTILL_CACHE": str(tmp_path), "EV3_DISTILL_KERNELS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    start = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **start) for _ in range(3)]
    printed = {process.communicate()[0].strip() for process in processes}
    (library,) = (tmp_path / compiled.FOLDER).glob("*.so")
    assert printed == {str(library)}


def test_probe_notices_wrong_values(monkeypatch):
    if not compiled.available():
        pytest.skip(compiled.reason())
    assert compiled_probe.check() == ""
    call = compiled.call
    for wrong in (1.001, np.nan):
        monkeypatch.setattr(compiled, "call", lambda *args, wrong=wrong: call(*args) * wrong)
        assert "differs from NumPy" in compiled_probe.check()

    def sums_alone(handler, *args):
        return call(handler, *args) * (1.001 if handler == "ev3_channel_sums" else 1.0)

    monkeypatch.setattr(compiled, "call", sums_alone)
    assert compiled_probe.check().startswith("ev3_channel_sums")


def test_results_do_not_depend_on_the_number_of_threads(tmp_path):
    if not compiled.available():
        pytest.skip(compiled.reason())
    code = """
import hashlib, sys, jax, jax.numpy as jnp, numpy as np
from ev3_distill.students.layers import BatchNorm, convolve
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for channels, strides, groups in ((20, (1, 1), 1), (3, (2, 2), 1), (24, (2, 1), 24)):
    x = jnp.asarray(rng.normal(size=(40, 17, 18, channels)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels // groups, 24)), jnp.float32)
    out, pulled = jax.vjp(lambda *args: convolve(*args, strides, groups), x, kernel)
    for value in (out, *pulled(out), BatchNorm(24, rngs=None)(out)):
        digest.update(np.asarray(value).tobytes())
print(digest.hexdigest())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    digests = set()
    for cores in ({0}, {0, 1}):
        if not cores <= os.sched_getaffinity(0):
            pytest.skip("one core")
        run = subprocess.run(
            [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {cores})\n" + code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(run.stdout)
    assert len(digests) == 1


def test_kernels_are_part_of_the_package():
    assert (compiled.SOURCES / "handlers.cc").is_file()
