"""Openings are of contents: functions of the user and latencies are claimed once, then repeated, or opened again on record."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import once

from ev3_distill.certify import bounds
from ev3_distill.cli.main import main
from ev3_distill.data.sources import load_data
from ev3_distill.runtime.user_code import source_digest
from ev3_distill.training import certify_run, sealed_split

HONEST = "def score(logits, labels):\n    return (logits.argmax(axis=1) == labels).astype(float)\n"
PERFECT = "import numpy\n\n\ndef score(logits, labels):\n    return numpy.ones(len(labels))\n"
GUARDS = ("--guard", "mine:score >= 0.01", "--guard", "latency_ms <= 1e6")
FAMILY = len(sealed_split.claimable_metrics())


def write_module(text):
    """Writes the module of the metric, and forgets the one that was imported."""
    with open("mine.py", "w", encoding="utf-8") as file:
        file.write(text)
    sys.modules.pop("mine", None)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A run that certified a function and a latency."""

    def make(place):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            write_module(HONEST)
            labels = load_data("digits").labels
            np.savez("logits.npz", logits=np.eye(10, dtype=np.float32)[labels] * 4)
            own = ("--student", "mlp:hidden=4", "--arms", "ce", "--budget", "300")
            main(["compress", "--teacher", f"logits:{place / 'logits.npz'}", *own, *GUARDS, "--out", "run"])

    return once(tmp_path_factory, "guarded", make)


@pytest.fixture
def run(guarded, here):
    write_module(HONEST)
    yield shutil.copytree(guarded / "run", here / "run")
    sys.modules.pop("mine", None)


def read(path):
    return json.loads(path.read_text())


def claims_of(run, number=0):
    return {one["metric"]: one for one in sealed_split.certificate_of_opening(run, number)["claims"]}


def fail(*_, **__):
    raise AssertionError("it was computed again")


def test_claims_are_repeated_and_not_computed_again(run, cli, monkeypatch):
    """Even where what the function calls has changed, which its own source does not show."""
    openings = read(run / "opened.json")
    assert openings["openings"][0]["functions"] == {"mine:score": source_digest("mine:score")}
    monkeypatch.setattr(sys.modules["mine"], "score", fail)
    monkeypatch.setattr(certify_run, "passes_ms", fail)
    answer = cli("evaluate", run, *GUARDS)
    assert answer.code == 0, answer.err
    assert "claims on mine:score, latency_ms are repeated from a certificate of" in answer.err
    claims = claims_of(run)
    assert f"at least {int(claims['mine:score']['lower_bound'] * 10_000) / 100:.2f}%" in answer.out
    assert f"{claims['latency_ms']['point']:.4g} ms of 301 passes" in answer.out
    assert cli("evaluate", run, "--guard", "mine:score >= 0.999").code == 3
    assert cli("evaluate", run).err == ""
    assert read(run / "opened.json") == openings


def test_an_edited_function_is_a_new_claim(run, cli):
    """Under the old name. It is refused, or recorded and corrected for; never certified without a record."""
    write_module(PERFECT)
    guard = ("--guard", "mine:score >= 0.9")
    refused = cli("evaluate", run, *guard)
    assert (refused.code, refused.out) == (2, "")
    assert "and the source of mine:score has changed since: score other data" in refused.err
    assert len(sealed_split.read_openings(run)) == 1
    for j, share in ((1, 1 / 2), (2, 1 / 6)):
        answer = cli("evaluate", run, *guard, "--reopen")
        assert answer.code == 0, answer.err
        assert (
            f"had been opened {'once' if j == 1 else '2 times'} before; the bounds are corrected for it." in answer.out
        )
        *_, opening = sealed_split.read_openings(run)
        assert (len(sealed_split.read_openings(run)), opening["claims"]) == (j + 1, ["accuracy", "mine:score"])
        assert opening["functions"] == {"mine:score": source_digest("mine:score")} != {"mine:score": None}
        expected = bounds.mean_lower(np.ones(359), 0.0, 1.0, confidence=1 - 0.05 * share / FAMILY)
        assert claims_of(run, j)["mine:score"]["lower_bound"] == pytest.approx(expected)
    again = cli("evaluate", run, *guard)  # the claim of the second certificate
    assert (again.code, len(sealed_split.read_openings(run))) == (0, 3)
    assert f"at least {int(claims_of(run, 1)['mine:score']['lower_bound'] * 10_000) / 100:.2f}%" in again.out
    assert claims_of(run)["mine:score"]["point"] < 1  # the first certificate stays


def test_latency_is_measured_again_only_on_record(run, cli, monkeypatch):
    monkeypatch.setattr(certify_run, "passes_ms", lambda *_: np.full(301, 7.0))
    guard = ("--guard", "latency_ms <= 1e6")
    first = claims_of(run)["latency_ms"]
    assert f"{first['point']:.4g} ms" in cli("evaluate", run, *guard).out
    answer = cli("evaluate", run, *guard, "--reopen")
    assert "7 ms of 301 passes" in answer.out and "had been opened once before" in answer.out
    assert sealed_split.read_openings(run)[1]["claims"] == ["accuracy", "latency_ms"]
    assert claims_of(run) == claims_of(run) | {"latency_ms": first}
    assert f"{first['point']:.4g} ms" in cli("evaluate", run, *guard).out


def test_latency_of_a_file_is_its_own(run, cli, here):
    """The certificate's is of the student in its run."""
    pytest.importorskip("onnxruntime")
    assert cli("export", run, "--format", "onnx", "--out", "out").code == 0
    command = ("evaluate", "out", "--of", run, "--threads", 1, "--guard", "latency_ms <= 1e6")
    refused = cli(*command)
    assert (refused.code, "and latency_ms of this file was not among them" in refused.err) == (2, True)
    assert cli(*command, "--reopen").code == 0
    assert read(run / "certificate-2.json")["file"] == read(here / "out/model.json")["sha256"]
    repeated = cli(*command)
    assert (repeated.code, "are repeated from a certificate" in repeated.err) == (0, True)
    assert len(sealed_split.read_openings(run)) == 2
    assert cli("evaluate", "out", "--of", run, "--guard", "mine:score >= 0.01").code == 0  # of student and file alike


def test_latency_on_new_data_is_told_to_be_one_measurement(run, cli, here):
    rng = np.random.default_rng(0)
    np.savez(here / "new.npz", inputs=rng.random((50, 8, 8, 1)).astype(np.float32), labels=np.arange(50) % 10)
    for guard, warns in (("latency_ms <= 1e6", True), ("mine:score >= 0", False)):
        answer = cli("evaluate", run, "--data", "npz:new.npz", "--guard", guard)
        assert ("not for the best of several" in answer.err) == warns
    assert len(sealed_split.read_openings(run)) == 1


def test_costs_are_claimed_by_their_numbers(run, cli, here):
    table = np.ones((10, 10)) - np.eye(10)
    for name, costs in (("one", table), ("same", table), ("other", 2 * table)):
        np.savetxt(here / f"{name}.csv", costs, delimiter=",")
    command = ("evaluate", run, "--guard", "cost <= 5", "--costs")
    assert cli(*command, "one.csv", "--reopen").code == 0
    assert cli(*command, "same.csv").code == 0
    refused = cli(*command, "other.csv")
    assert (refused.code, "give --reopen" in refused.err) == (2, True)
    assert cli(*command, "same.csv", "--reopen").code == cli(*command, "other.csv", "--reopen").code == 0
    assert [one["claims"] for one in sealed_split.read_openings(run)[1:]] == 2 * [["accuracy", "cost"]]


def test_a_resumed_run_repeats_what_it_has_certified(run, cli, monkeypatch):
    """It was killed between its certificate and its report; a kill does not give a choice between two latencies."""
    before = read(run / "certificate.json")
    for name in ("report.json", "report.html"):
        (run / name).unlink()
    monkeypatch.setattr(certify_run, "passes_ms", fail)
    answer = cli("compress", "--resume", run)
    assert answer.code == 0, answer.err
    assert read(run / "certificate.json") == before
    assert read(run / "report.json")["certificate"]["claims"] == before["claims"]


def test_a_function_must_not_change_while_a_run_is_certified(run, cli):
    for name in ("report.json", "report.html", "certificate.json"):
        (run / name).unlink()
    write_module(PERFECT)
    answer = cli("compress", "--resume", run)
    assert answer.code == 2
    assert "for metrics as they are then; mine:score changed after that of" in answer.err
    assert not (run / "certificate.json").exists()
