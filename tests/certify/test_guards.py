"""Guards: parsing, certification by the bound, and exit codes of the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st

from ev3_distill.certify import Claim, clopper_pearson_lower
from ev3_distill.errors import InputError
from ev3_distill.guards import Guard, evaluate_guards, help_text, parse
from ev3_distill.tasks.metrics import METRICS, find_metric


@pytest.mark.parametrize(
    ("text", "guard"),
    [
        ("accuracy >= 0.88", Guard("accuracy", 0.88)),
        ("  worst_class_accuracy>=.7 ", Guard("worst_class_accuracy", 0.7)),
        ("drop(accuracy) <= -1e-2", Guard("drop(accuracy)", -0.01)),
        ("params <= 50000", Guard("params", 50000)),
        ("top5_accuracy >= 0.99", Guard("top5_accuracy", 0.99)),
        ("drop(top5_accuracy) <= 0", Guard("drop(top5_accuracy)", 0)),
        ("cost <= -2.5", Guard("cost", -2.5)),
        ("latency_ms<=0.5", Guard("latency_ms", 0.5)),
        ("recall(3) >= 0.5", Guard("recall(3)", 0.5)),
        ("precision(golden retriever (dog))>=.9", Guard("precision(golden retriever (dog))", 0.9)),
        ("my_pkg.my_module:Score_1 >= 0.3", Guard("my_pkg.my_module:Score_1", 0.3)),
    ],
)
def test_parse_reads_metric_and_threshold(text, guard):
    assert parse(text) == guard


FAMILIES = (
    *("top2_accuracy", "top10_accuracy", "drop(top3_accuracy)", "module:function"),
    *("precision(3)", "recall(golden retriever)"),
)
SINGLE = [name for name, row in METRICS.items() if not row.pattern]


@given(st.sampled_from([*SINGLE, *FAMILIES]), st.floats(0.01, 1))
def test_a_guard_survives_printing_and_parsing(metric, threshold):
    scale = 1000 if find_metric(metric).row.source == "size" else 1
    guard = Guard(metric, float(f"{threshold * scale:.10g}"))
    assert parse(str(guard)) == guard


def test_every_family_of_metrics_is_found_by_its_pattern():
    assert {find_metric(metric).row.name for metric in FAMILIES} == {
        name for name, row in METRICS.items() if row.pattern
    }
    assert all(find_metric(metric).row is METRICS[metric] for metric in SINGLE)
    assert find_metric("recall( cat )").argument == "cat"
    for name in ("top1_accuracy", "top05_accuracy", "drop(ece)", "drop(top1_accuracy)", "f1", "a:b:c", "", "recall()"):
        assert find_metric(name) is None, name
    for name, row in METRICS.items():
        if row.pattern:
            assert find_metric(name) is None or name == "MODULE:FUNCTION" or row.family == "class", name
    with pytest.raises(ValueError, match="make guards by parse"):
        str(Guard("f1", 0.5))


def test_help_and_documentation_list_every_metric():
    at_least, at_most = help_text().split("At most (<=):")
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    cells = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    sides = {name: side for _, names, side, *_ in cells for name in re.findall(r"`([^`]+)`", names)}
    for name, row in METRICS.items():
        assert name in (at_least if row.higher_is_better else at_most)
        assert sides[name].strip() == ("`>=`" if row.higher_is_better else "`<=`")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy", "METRIC >= NUMBER"),
        ("accuracy > 0.9", "METRIC >= NUMBER"),
        ("f1 >= 0.9", "needs a known metric (accuracy, balanced_accuracy, "),
        ("f1 >= 0.9", "precision(CLASS), recall(CLASS), MODULE:FUNCTION); got 'f1' in 'f1 >= 0.9'"),
        ("top1_accuracy >= 0.9", "got 'top1_accuracy'"),
        ("drop(ece) <= 0.1", "got 'drop(ece)'"),
        ("cross_entropy <= 0.3", "cross entropy is unbounded"),
        ("cross_entropy <= 0.3", "got 'cross_entropy <= 0.3': guard brier, which lies in [0, 1]"),
        ("accuracy <= 0.9", "write 'accuracy >= 0.9'"),
        ("params >= 10", "write 'params <= 10'"),
        ("accuracy >= 88", "at least 0 and at most 1; got '88'"),
        ("accuracy >= high", "got 'high'"),
        ("accuracy >= nan", "got 'nan'"),
        ("params <= inf", "at least 1; got 'inf'"),
        ("cost <= inf", "for cost must be finite; got 'inf'"),
        ("latency_ms <= -1", "at least 0; got '-1'"),
        ("ece >= 0.1", "write 'ece <= 0.1'"),
        ("top5_accuracy <= 0.1", "write 'top5_accuracy >= 0.1'"),
        ("module:function <= 0.1", "write 'module:function >= 0.1'"),
    ],
)
def test_invalid_guards_are_rejected(text, message):
    with pytest.raises(InputError) as error:
        parse(text)
    assert message in str(error.value)


def test_the_bound_decides_a_guard():
    claims = [
        Claim("accuracy", 0.95, 0.93, 100),
        Claim("drop(accuracy)", 0.01, None, 100, upper_bound=0.03),
        Claim("ece", 0.01, None, 100, upper_bound=0.05),
        Claim("own:score", 0.9, 0.8, 100),
    ]
    texts = ["accuracy >= 0.93", "accuracy >= 0.94", "drop(accuracy) <= 0.03", "drop(accuracy) <= 0.02", "params <= 10",
             "bytes <= 44", "ece <= 0.02", "own:score >= 0.8"]  # fmt: skip
    sizes = {"params": 11, "bytes": 44}
    outcomes = evaluate_guards([parse(text) for text in texts], claims, sizes=sizes)
    assert [outcome["guard"] for outcome in outcomes] == texts
    assert [outcome["certified"] for outcome in outcomes] == [True, False, True, False, False, True, False, True]
    assert [outcome["bound"] for outcome in outcomes] == [0.93, 0.93, 0.03, 0.03, 11, 44, 0.05, 0.8]
    json.dumps(outcomes)
    assert evaluate_guards([parse("params <= 11")], [], sizes=sizes)[0]["certified"]


def test_exit_code_of_compress_and_evaluate_follows_the_guards(here, cli):
    guards = ("accuracy >= 0.5", "worst_class_accuracy >= 0.999", "drop(accuracy) <= 0.3", "params <= 700")
    options = [word for guard in guards for word in ("--guard", guard)]
    answer = cli("compress", *SMALL, *options, "--out", "run")
    assert answer.code == 3
    assert "Guard accuracy >= 0.5: certified, proven: at least" in answer.out
    assert "Guard worst_class_accuracy >= 0.999: NOT CERTIFIED, proven: at least" in answer.out
    assert "Guard params <= 700: certified, 610 parameters" in answer.out
    report = json.loads((here / "run" / "report.json").read_text())
    assert [guard["certified"] for guard in report["guards"]] == [True, False, True, True]
    assert [claim["metric"] for claim in report["certificate"]["claims"]] == [
        "accuracy", "agreement", "worst_class_accuracy", "drop(accuracy)",
    ]  # fmt: skip
    page = (here / "run" / "report.html").read_text()
    assert "NOT CERTIFIED" in page and "accuracy on its worst class" in page
    assert cli("compress", "--resume", "run").code == 3  # finished; it says so again
    assert cli("evaluate", "run", "--guard", "accuracy >= 0.5").code == 0
    assert cli("evaluate", "run", "--guard", "accuracy >= 0.5", "--guard", "worst_class_accuracy >= 0.999").code == 3


OWN = """
import numpy as np


def close(logits, labels):
    return 1 - np.abs(logits.argmax(1) - labels) / 9
"""


def test_every_metric_can_be_guarded(here, cli, new_digits):
    (here / "guard_metric.py").write_text(OWN)
    np.savetxt("costs.csv", 1 - np.eye(10), delimiter=",")
    certain = (
        *("accuracy >= 0", "top2_accuracy >= 0.5", "balanced_accuracy >= 0.5", "worst_class_accuracy >= 0"),
        *("macro_f1 >= 0.5", "latency_ms <= 10000"),
        *("agreement >= 0.5", "drop(accuracy) <= 0.3", "drop(top3_accuracy) <= 0.3", "ece <= 0.5", "brier <= 0.4"),
        *("cost <= 0.5", "params <= 610", "bytes <= 2440", "guard_metric:close >= 0.5"),
        *("precision(0) >= 0.5", "recall(0) >= 0.5"),
    )
    options = [word for guard in certain for word in ("--guard", guard)]
    answer = cli("compress", *SMALL, *options, "--costs", "costs.csv", "--out", "run")
    assert answer.code == 0, answer.err + answer.out
    assert "Guard bytes <= 2440: certified, 2,440 bytes" in answer.out
    report = json.loads((here / "run" / "report.json").read_text())
    claims = {claim["metric"]: claim for claim in report["certificate"]["claims"]}
    assert len(claims) == 15
    assert claims["cost"]["point"] == pytest.approx(1 - claims["accuracy"]["point"])
    assert claims["cost"]["upper_bound"] < 1 - claims["accuracy"]["lower_bound"] + 0.05
    assert claims["latency_ms"]["n"] == 301
    flat = " ".join(answer.out.split())
    for shown in ("top-2 accuracy", "less top-3 accuracy than its teacher", "ms median latency", "guard_metric:close"):
        assert shown in flat
    page = (here / "run" / "report.html").read_text()
    assert "Brier score" in page and "Bounds on fractions of examples are exact" in page

    certificate = json.loads((here / "run" / "certificate.json").read_text())
    assert {name: certificate[name] for name in report["certificate"]} == report["certificate"]
    assert certificate["population"]["covered"].startswith("Examples that come as")
    (table,) = certificate["tables"]
    assert sum(row["n"] for row in table["rows"]) == 359
    assert sum(row["n"] * row["point"] for row in table["rows"]) == pytest.approx(359 * claims["accuracy"]["point"])
    assert all(row["lower_bound"] < row["point"] for row in table["rows"])

    # the same claims again, but those of the teacher, without its being there: bit by bit, and no opening
    alone = [guard for guard in certain if not guard.startswith(("agreement", "drop"))]
    options = [word for guard in alone for word in ("--guard", guard)]
    again = cli("evaluate", "run", *options, "--costs", "costs.csv")
    assert again.code == 0, again.err
    accuracy = claims["accuracy"]
    assert again.out.startswith(f"accuracy: {accuracy['point']:.2%} of 359 examples; at least ")
    upper = next(line for line in again.out.splitlines() if line.startswith("brier:"))
    assert float(re.search(r"at most ([\d.]+) with", upper)[1]) == pytest.approx(
        claims["brier"]["upper_bound"], rel=0.01
    )
    assert len(json.loads((here / "run" / "opened.json").read_text())["openings"]) == 1
    # on other data all is claimed anew
    other = cli("evaluate", "run", *options, "--costs", "costs.csv", "--data", new_digits)
    assert other.code == 0, other.err


def test_worst_group_can_be_guarded(here, cli):
    rng = np.random.default_rng(0)
    labels = np.arange(900) % 3
    groups = np.where(rng.random(900) < 0.3, "noisy", "clean")
    noise = np.where(groups == "noisy", 2.0, 0.3)[:, None]
    inputs = (2 * np.eye(4)[labels] + noise * rng.normal(size=(900, 4))).astype(np.float32)
    np.savez("data.npz", inputs=inputs, labels=labels, groups=groups)
    own = ("--teacher-network", "mlp:hidden=8", "--teacher-budget", "200")
    options = ("--data", "npz:data.npz", "--student", "mlp:hidden=8", "--arms", "ce", "--budget", "600")
    answer = cli("compress", *options, *own, "--guard", "worst_group_accuracy >= 0.95", "--out", "run")
    assert answer.code == 3, answer.err
    assert "accuracy on its worst group" in " ".join(answer.out.split())
    certificate = json.loads((here / "run" / "certificate.json").read_text())
    by_class, by_group = certificate["tables"]
    assert (by_class["of"], by_group["of"]) == ("class", "group")
    assert [row["name"] for row in by_group["rows"]] == ["clean", "noisy"]
    clean, noisy = (row["point"] for row in by_group["rows"])
    assert noisy < clean
    worst = next(claim for claim in certificate["claims"] if claim["metric"] == "worst_group_accuracy")
    assert worst["point"] == noisy
    assert "Accuracy by group" in (here / "run" / "report.html").read_text()
    assert cli("evaluate", "run", "--guard", "worst_group_accuracy >= 0.1").code == 0


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("worst_group_accuracy >= 0.5", "needs groups; digits has none: guard worst_class_accuracy"),
        ("cost <= 0.5", "needs costs; got none: give a CSV file of them with --costs"),
        ("top10_accuracy >= 0.5", "needs more classes than K; digits has 10"),
        ("recall(10) >= 0.5", "needs a class by its name or number; got '10': use one of 0, 1, 2, "),
        ("precision(ten) >= 0.5", "or a number from 0 to 9"),
        ("no_such_module:score >= 0.5", "fails with ModuleNotFoundError"),
        ("bytes <= 2439", "2,440 bytes: name a smaller --student"),
    ],
)
def test_unanswerable_guards_are_rejected_before_anything_is_written(here, cli, guard, message):
    answer = cli("compress", *SMALL, "--guard", guard, "--out", "run")
    assert answer.code == 2
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert not (here / "run").exists()


def test_classes_are_guarded_by_name(here, cli):
    inputs = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    labels = np.arange(300) % 2
    np.savez("data.npz", inputs=inputs + 4 * labels[:, None], labels=labels, class_names=["ant", "black bee"])
    own = (
        "--teacher-network",
        "mlp:hidden=8",
        "--teacher-budget",
        "100",
        "--student",
        "mlp:hidden=8",
        "--budget",
        "300",
    )
    guards = ("--guard", "recall(black bee) >= 0.5", "--guard", "precision(ant) >= 0.5")
    answer = cli("compress", "--data", "npz:data.npz", *own, "--arms", "ce", *guards, "--out", "run")
    assert answer.code == 0, answer
    assert "recall on class black bee" in " ".join(answer.out.split())
    assert cli("evaluate", "run", *guards).code == 0


@pytest.mark.parametrize("metric", ["recall(cat)", "precision(2)"])
def test_a_class_without_examples_cannot_be_guarded(here, cli, metric):
    inputs = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    np.savez("data.npz", inputs=inputs, labels=np.arange(300) % 2, class_names=["ant", "bee", "cat"])
    answer = cli("compress", "--data", "npz:data.npz", "--guard", f"{metric} >= 0.5", "--out", "run")
    assert answer.code == 2
    assert f"a guard on {metric} needs examples of that class; npz:data.npz has none: guard another class" in answer.err
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("guard", "message"),
    [("params <= 100", "610 parameters: name a smaller --student"), ("accuracy >= 2", "at most 1; got '2'")],
)
def test_unreachable_guards_are_rejected_before_anything_is_written(here, cli, guard, message):
    answer = cli("compress", *SMALL, "--guard", guard, "--out", "run")
    assert answer.code == 2
    assert message in answer.err
    assert not (here / "run").exists()


def test_precision_and_recall_are_certified_by_a_run(here, cli, new_digits):
    """A run with easy guards certifies them, a run with hard ones exits with code 3; the report names the class."""
    easy = ("--guard", "recall(3) >= 0.5", "--guard", "precision(3) >= 0.5")
    answer = cli("compress", *SMALL, *easy, "--out", "easy")
    assert answer.code == 0, answer
    report = json.loads((here / "easy" / "report.json").read_text())
    assert [guard["certified"] for guard in report["guards"]] == [True, True]
    recall = next(claim for claim in report["certificate"]["claims"] if claim["metric"] == "recall(3)")
    row = report["certificate"]["tables"][0]["rows"][3]
    assert (recall["point"], recall["n"]) == (row["point"], row["n"])
    assert recall["lower_bound"] == clopper_pearson_lower(
        round(row["n"] * row["point"]), row["n"], confidence=1 - 0.05 / 4
    )
    assert "recall on class 3" in " ".join(answer.out.split())
    assert "precision on class 3" in (here / "easy" / "report.html").read_text()
    steered = {row["objective"] for row in map(json.loads, (here / "easy" / "ledger.jsonl").read_text().splitlines())}
    assert steered <= {"promise", "recall(3)", "precision(3)"}
    answer = cli("evaluate", "easy", "--guard", "recall(3) >= 0.999", "--reopen")
    assert answer.code == 3, answer
    assert "Guard recall(3) >= 0.999: NOT CERTIFIED" in answer.out
    answer = cli("evaluate", "easy", "--data", new_digits, "--guard", "precision(3) >= 0.999")
    assert answer.code == 3, answer
