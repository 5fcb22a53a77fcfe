"""The sealed split is opened once, and recorded before it is scored; a reopening is explicit and widens the bounds."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SMALL, assert_same_run
from scipy.stats import binom

from ev3_distill import students
from ev3_distill.certify.bounds import clopper_pearson_lower
from ev3_distill.errors import InputError
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.tasks.classification import metric_bounds
from ev3_distill.tasks.metrics import METRICS, Metric
from ev3_distill.training import sealed_split
from ev3_distill.types import Variables


@pytest.fixture
def run(finished, here):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, here / "run")


def read(path):
    return json.loads(path.read_text())


def test_recorded_opening_continues_and_another_is_rejected(here):
    assert sealed_split.read_openings(here) == []
    assert sealed_split.open_split(here, "ab" * 32, ["accuracy"], confidence=0.95) == 0
    (row,) = sealed_split.read_openings(here)
    assert (row["student"], row["claims"], row["confidence"]) == ("ab" * 32, ["accuracy"], 0.95)
    before = (here / "opened.json").read_bytes()
    assert sealed_split.open_split(here, "ab" * 32, ["accuracy"], confidence=0.95) == 0
    others = (
        (["ece"], 0.95, None),
        (["accuracy"], 0.9, None),
        (["accuracy", "ece"], 0.95, None),
        (["accuracy"], 0.95, "c"),
    )
    for claims, confidence, costs in others:
        with pytest.raises(
            InputError, match=r"opened once; .* was opened on 2.* for accuracy at 0\.95, .* give --reopen"
        ):
            sealed_split.open_split(here, "ab" * 32, claims, confidence=confidence, costs=costs)
    for reopen in (False, True):
        with pytest.raises(
            InputError,
            match=r"certifies only the students that .* was opened for abababababab, got cdcd",
        ):
            sealed_split.open_split(here, "cd" * 32, ["accuracy"], confidence=0.95, reopen=reopen)
    assert (here / "opened.json").read_bytes() == before
    assert sealed_split.open_split(here, "ab" * 32, ["ece"], confidence=0.95, reopen=True) == 1
    assert sealed_split.open_split(here, "ab" * 32, ["brier"], confidence=0.95, reopen=True) == 2
    assert sealed_split.open_split(here, "ab" * 32, ["ece"], confidence=0.95) == 1  # the opening continues
    assert sealed_split.open_split(here, "ab" * 32, ["accuracy"], confidence=0.95) == 0


def test_opening_for_several_students_continues_for_each(here):
    one, other, third = ("ab" * 32, "cd" * 32, "ef" * 32)
    assert sealed_split.open_split(here, one, ["accuracy"], confidence=0.95, others=[other]) == 0
    (row,) = sealed_split.read_openings(here)
    assert sealed_split.candidates_of(row) == [one, other]
    before = (here / "opened.json").read_bytes()
    for student in (one, other):
        assert sealed_split.open_split(here, student, ["accuracy"], confidence=0.95) == 0
    assert sealed_split.open_split(here, one, ["accuracy"], confidence=0.95, others=[other]) == 0
    for student, others in ((third, ()), (one, (third,))):
        with pytest.raises(InputError, match=r"was opened for abababababab and cdcdcdcdcdcd, got"):
            sealed_split.open_split(here, student, ["accuracy"], confidence=0.95, others=others, reopen=True)
    assert (here / "opened.json").read_bytes() == before
    assert sealed_split.open_split(here, other, ["ece"], confidence=0.95, reopen=True) == 1


def test_digest_depends_on_all_arrays():
    one = Variables({"w": np.ones(3, np.float32)}, {"m": np.zeros(2)})
    digest = tree_digest(one)
    assert digest == tree_digest(Variables({"w": np.ones(3, np.float32)}, {"m": np.zeros(2)}))
    for other in (
        Variables({"w": np.array([1, 1, 2], np.float32)}, one.stats),
        Variables({"w": np.ones(3)}, one.stats),
        Variables({"v": np.ones(3, np.float32)}, one.stats),
        Variables(one.params, {"m": np.ones(2)}),
    ):
        assert tree_digest(other) != digest


def test_run_records_its_opening(run):
    (row,) = read(run / "opened.json")["openings"]
    assert row["student"] == tree_digest(students.load(run)[1]) == read(run / "certificate.json")["student"]
    assert row["claims"] == ["accuracy", "agreement"]
    (own,) = read(run / "teacher" / "opened.json")["openings"]
    assert own["claims"] == ["accuracy"]


def test_evaluate_repeats_the_certificate(run, cli):
    before = (run / "opened.json").read_bytes()
    claim = read(run / "report.json")["certificate"]["claims"][0]
    for options in (
        (),
        ("--confidence", 0.95),
        ("--guard", "accuracy >= 0.5", "--guard", "params <= 610"),
        ("--reopen",),
    ):
        answer = cli("evaluate", run, *options)
        assert answer.code == 0, answer.err
        shown = int(claim["lower_bound"] * 10_000) / 100
        assert (
            f"accuracy: {claim['point']:.2%} of 359 examples; at least {shown:.2f}% with 95% confidence" in answer.out
        )
        assert "opened" not in answer.out
    assert (run / "opened.json").read_bytes() == before


def test_other_claims_need_a_reopening_with_wider_bounds(run, cli):
    options = ("--guard", "balanced_accuracy >= 0.1")
    refused = cli("evaluate", run, *options)
    assert refused.code == 2
    assert "for accuracy, agreement at 0.95, got accuracy, balanced_accuracy at 0.95" in refused.err
    assert "score other data with --data, or give --reopen" in refused.err
    assert len(sealed_split.read_openings(run)) == 1

    claim = read(run / "report.json")["certificate"]["claims"][0]
    answer = cli("evaluate", run, *options, "--reopen")
    assert answer.code == 0, answer.err
    assert "The sealed split had been opened once before; the bounds are corrected for it." in answer.out
    reopened = read(run / "certificate-2.json")
    assert reopened["reopened"] == 1
    right = round(claim["point"] * claim["n"])
    assert reopened["claims"][0]["lower_bound"] == pytest.approx(
        clopper_pearson_lower(right, claim["n"], confidence=1 - 0.05 / len(sealed_split.claimable_metrics()))
    )
    assert reopened["claims"][0]["lower_bound"] < claim["lower_bound"]
    again = cli("evaluate", run, *options, "--reopen")
    assert (again.out, len(sealed_split.read_openings(run))) == (answer.out, 2)
    more = cli("evaluate", run, "--guard", "ece <= 0.9", "--reopen")
    assert "opened 2 times before" in more.out
    assert read(run / "certificate-3.json")["reopened"] == 2
    assert cli("evaluate", run).out.startswith("accuracy: ")  # still the certificate of the run


def test_other_data_do_not_reopen_the_split(run, cli, here, new_digits):
    rng = np.random.default_rng(0)
    np.savez(here / "other.npz", inputs=rng.random((50, 8, 8, 1)).astype(np.float32), labels=np.arange(50) % 10)
    before = (run / "opened.json").read_bytes()
    for options in (("--data", "npz:other.npz"), ("--data", new_digits)):
        answer = cli("evaluate", run, *options, "--guard", "brier <= 0.99", "--confidence", "0.9")
        assert answer.code == 0, answer.err
        assert "with 90% confidence" in answer.out
    assert (run / "opened.json").read_bytes() == before


def test_another_confidence_is_rejected(run, cli):
    answer = cli("evaluate", run, "--confidence", "0.9")
    assert answer.code == 2
    assert "keeps the confidence that it was opened at; that of" in answer.err


def test_another_student_is_rejected(run, cli):
    network, variables = students.load(run)
    students.save(run / "student", network, variables._replace(params=jax.tree.map(lambda x: x + 1, variables.params)))
    for options in ((), ("--reopen",)):
        answer = cli("evaluate", run, *options)
        assert answer.code == 2
        assert "what ships must be what was tested; " in answer.err


def test_run_without_a_record_counts_its_own_opening(run, cli):
    (run / "opened.json").unlink()
    assert cli("evaluate", run).code == 0
    assert cli("evaluate", run, "--guard", "ece <= 0.9").code == 2
    assert "opened once before" in cli("evaluate", run, "--guard", "ece <= 0.9", "--reopen").out
    assert len(sealed_split.read_openings(run)) == 2


KILLED = """
import os, signal, sys
from ev3_distill.training import certify_run, train
from ev3_distill.cli.main import main

def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

module = train if sys.argv[1] == "report_content" else certify_run
setattr(module, sys.argv[1], killed)
main(sys.argv[2:])
"""


@pytest.mark.parametrize("moment", ["outputs_on", "write_certificate", "report_content"])
def test_resume_finishes_a_killed_opening(run, finished, here, moment):
    """The run before its report is resumed, killed after the split was opened, and resumed again."""
    for name in ("report.json", "report.html", "certificate.json"):
        (run / name).unlink()
    if moment == "outputs_on":
        (run / "opened.json").unlink()
    command = [sys.executable, "-c", KILLED, moment, "compress", "--resume", str(run)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    opened = (run / "opened.json").read_bytes()
    assert not (run / "report.json").exists()
    command = [sys.executable, "-m", "ev3_distill", "compress", "--resume", str(run)]
    resumed = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert resumed.returncode == 0, resumed.stderr
    assert (run / "opened.json").read_bytes() == opened
    assert_same_run(finished, run)
    assert read(run / "certificate.json") == read(finished / "certificate.json")


def test_resume_does_not_certify_another_student(run, cli):
    for name in ("report.json", "report.html", "certificate.json"):
        (run / name).unlink()
    record = read(run / "opened.json")
    record["openings"][0]["student"] = "ab" * 32
    (run / "opened.json").write_text(json.dumps(record))
    answer = cli("compress", "--resume", run)
    assert answer.code == 2
    assert "was opened for abababababab" in answer.err
    assert not (run / "report.json").exists()


def test_damaged_record_is_an_error(run, cli):
    (run / "opened.json").write_text("{")
    answer = cli("evaluate", run)
    assert answer.code == 2
    assert "a run needs a readable opened.json" in answer.err


def test_guarded_metrics_are_claimed_in_the_first_opening(cli, here):
    answer = cli("compress", *SMALL, "--guard", "ece <= 0.9", "--confidence", "0.9", "--out", "guarded")
    assert answer.code == 0, answer.err
    (row,) = sealed_split.read_openings(here / "guarded")
    assert row["claims"] == ["accuracy", "agreement", "ece"]
    assert cli("evaluate", "guarded", "--guard", "ece <= 0.1").code in (0, 3)
    assert cli("evaluate", "guarded", "--guard", "ece <= 0.9").out.count("with 90% confidence") == 2


# The family of claims, on which the level of a reopened certificate depends.

FAMILY = sealed_split.claimable_metrics()
PATTERNS = ("topK_accuracy", "drop(topK_accuracy)", "precision(CLASS)", "recall(CLASS)", "MODULE:FUNCTION")


def shares_of(metrics, reopened, *, family=FAMILY, num_classes=10):
    return sealed_split.shares_when_reopened(metrics, reopened, family=family, num_classes=num_classes)


def test_shares_of_all_possible_claims_sum_to_at_most_one():
    single = [name for name in FAMILY if name not in PATTERNS]
    tops = [f"top{k}_accuracy" for k in range(2, 300)]
    classes = [f"{name}({k})" for name in ("precision", "recall") for k in range(10)]
    names = [*single, *classes, *tops, *(f"drop({name})" for name in tops)]
    spent = dict.fromkeys(names, 0.0)
    for j in range(1, 300):
        functions = [f"own:score{j}_{i}" for i in range(j % 3)]
        shares = shares_of([*names, *functions], j)
        for metric in ("cost", "latency_ms"):
            spent[metric] += shares.pop(metric)  # a new metric each time
        assert shares["accuracy"] == 1 / len(FAMILY)
        spent |= shares  # the same bounds as before
    assert 0.97 < sum(spent.values()) <= 1 + 1e-9


def test_share_of_a_family_of_metrics_is_divided_among_its_members():
    shares = shares_of(["accuracy", "top5_accuracy", "recall(3)", "own:score"], 2, num_classes=4)
    part = 1 / len(FAMILY)
    assert shares == pytest.approx(
        {"accuracy": part, "top5_accuracy": part / 20, "recall(3)": part / 4, "own:score": part / 6}
    )
    assert shares_of(["own:a", "own:b"], 1)["own:a"] == pytest.approx(part / 4)


def test_documentation_states_the_size_of_the_family():
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "promise.md").read_text()
    assert f"each of the {len(FAMILY)} metrics" in " ".join(page.split())
    assert f"gets delta / {len(FAMILY)}" in " ".join(page.split())


@pytest.fixture
def extra_metric(monkeypatch):
    """Adds a metric to the table after the run was made."""
    row = Metric("extra_accuracy", "extra accuracy", bound=metric_bounds.accuracy)
    monkeypatch.setitem(METRICS, row.name, row)
    assert len(sealed_split.claimable_metrics()) == len(FAMILY) + 1


def reopened_level(run, cli):
    """Reopens the split for balanced accuracy; returns the level of the claim on accuracy."""
    answer = cli("evaluate", run, "--guard", "balanced_accuracy >= 0.1", "--reopen")
    assert answer.code == 0, answer.err
    claim = read(run / "certificate-2.json")["claims"][0]
    hits = round(claim["point"] * claim["n"])
    return binom.sf(hits - 1, claim["n"], claim["lower_bound"])


def test_new_metric_does_not_change_the_level_of_a_reopened_certificate(run, cli, extra_metric):
    assert tuple(read(run / "opened.json")["openings"][0]["family"]) == FAMILY
    assert reopened_level(run, cli) == pytest.approx(0.05 / len(FAMILY))
    assert tuple(read(run / "opened.json")["openings"][1]["family"]) == FAMILY


@pytest.mark.parametrize("record", ["without a family", "none"])
def test_runs_older_than_the_family_entry_keep_its_original_size(run, cli, extra_metric, record):
    content = read(run / "opened.json")
    del content["openings"][0]["family"]
    (run / "opened.json").write_text(json.dumps(content))
    if record == "none":
        (run / "opened.json").unlink()
    assert reopened_level(run, cli) == pytest.approx(0.05 / 14)


@pytest.mark.parametrize("metric", ["extra_accuracy", "recall(3)"])
def test_metric_added_after_the_first_opening_cannot_be_claimed_from_the_same_split(
    run, cli, extra_metric, metric, new_digits
):
    content = read(run / "opened.json")
    del content["openings"][0]["family"]
    (run / "opened.json").write_text(json.dumps(content))
    before = (run / "opened.json").read_bytes()
    answer = cli("evaluate", run, "--guard", f"{metric} >= 0.1", "--reopen")
    assert answer.code == 2
    assert f"was opened without {metric}: score other data with --data" in answer.err
    assert (run / "opened.json").read_bytes() == before
    assert cli("evaluate", run, "--guard", f"{metric} >= 0.1", "--data", new_digits).code == 0


def test_new_metric_is_claimed_by_new_runs(run, cli, extra_metric):
    (run / "opened.json").unlink()
    student = read(run / "certificate.json")["student"]
    assert sealed_split.open_split(run, student, ["extra_accuracy"], confidence=0.95) == 0
    assert read(run / "opened.json")["openings"][0]["family"] == [*FAMILY, "extra_accuracy"]
