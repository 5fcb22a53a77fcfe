"""Faults in teacher, labels or splits: no false claim is certified."""

import json

import numpy as np
import pytest

from ev3_distill.data.splits import SPLITS, count_shared, split_rows

SMALL = ("--student", "mlp:hidden=16", "--budget", "1200")
FAST = (*SMALL, "--arms", "ce", "kd2")  # two of the default arms: each compiles a step


def blobs(n=900, classes=3, seed=0, spread=0.6):
    """Examples [N, 4] around one corner per class, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    corners = 2 * np.eye(4)[:classes]
    return (corners[labels] + rng.normal(0, spread, (n, 4))).astype(np.float32), labels


def save(path, inputs, labels):
    np.savez(path, inputs=inputs, labels=labels)
    return f"npz:{path}"


def report_of(directory):
    return json.loads((directory / "report.json").read_text())


def claims_of(report):
    return {claim["metric"]: claim for claim in report["certificate"]["claims"]}


def test_guard_catches_a_teacher_that_is_wrong_on_one_class(cli, here):
    """A student of the teacher alone inherits the fault, and a guard catches it; with labels the guard steers the run."""
    inputs, labels = blobs()
    data = save("data.npz", inputs, labels)
    predicted = np.where(labels == 2, 1, labels)
    np.savez("logits.npz", logits=(4 * np.eye(3)[predicted]).astype(np.float32))
    options = (*SMALL, "--data", data, "--teacher", "logits:logits.npz", "--guard", "worst_class_accuracy >= 0.6")
    answer = cli("compress", *options, "--arms", "mse", "--out", "followed")
    assert answer.code == 3, answer
    assert "worst_class_accuracy >= 0.6" in answer.out + answer.err
    assert claims_of(report_of(here / "followed"))["accuracy"]["lower_bound"] < 0.75
    assert cli("compress", *options, "--out", "steered").code == 0
    steered = report_of(here / "steered")
    assert steered["guards"][0]["certified"]
    assert steered["objectives"]["worst_class_accuracy"] > 0


def test_shuffled_labels_certify_nothing(cli, here):
    inputs, labels = blobs(classes=3)
    shuffled = np.random.default_rng(1).permutation(labels)
    data = save("data.npz", inputs, shuffled)
    own = ("--teacher-network", "mlp:hidden=16", "--teacher-budget", "300")
    answer = cli("compress", *FAST, *own, "--data", data, "--guard", "accuracy >= 0.5", "--out", "run")
    assert answer.code == 3, answer
    report = report_of(here / "run")
    assert report["promotions"] == 0
    assert claims_of(report)["accuracy"]["lower_bound"] < 0.4


def test_a_diverging_arm_does_no_harm(cli, here):
    inputs, labels = blobs()
    data = save("data.npz", inputs, labels)
    np.savez("logits.npz", logits=(4 * np.eye(3)[labels]).astype(np.float32))
    options = (*SMALL, "--data", data, "--teacher", "logits:logits.npz", "--arms", "ce", "1*mse@1e30")
    assert cli("compress", *options, "--guard", "accuracy >= 0.8", "--out", "run").code == 0
    rows = [json.loads(line) for line in (here / "run" / "ledger.jsonl").read_text().splitlines()]
    assert sum(row["discarded"] for row in rows) > 0
    assert not any(row["selected"] == "1*mse@1e30" for row in rows)


def test_few_examples_give_wide_bounds(cli, here):
    inputs, labels = blobs(n=400, spread=0.1)
    data = save("data.npz", inputs, labels)
    np.savez("logits.npz", logits=(4 * np.eye(3)[labels]).astype(np.float32))
    shares = ("--explore", "0.625", "--assess", "0.125", "--decide", "0.125", "--test", "0.125")
    options = (*FAST, *shares, "--data", data, "--teacher", "logits:logits.npz")
    assert cli("compress", *options, "--guard", "accuracy >= 0.95", "--out", "run").code == 3
    report = report_of(here / "run")
    assert [report["splits"][name] for name in SPLITS[1:]] == [50, 50, 50]
    claim = claims_of(report)["accuracy"]
    assert claim["point"] > 0.97  # nothing is wrong with the student, and yet no more than this can be promised:
    assert claim["lower_bound"] <= 0.025 ** (1 / 50) + 1e-9


def test_all_scores_tied_promote_nothing(cli, here):
    """Inputs without information: all students that predict the commonest class have equal scores on every example."""
    labels = (np.arange(900) % 5 == 0).astype(int)
    data = save("data.npz", np.zeros((900, 4), np.float32), labels)
    np.savez("logits.npz", logits=np.tile(np.float32([4, 0]), (900, 1)))
    options = (*FAST, "--data", data, "--teacher", "logits:logits.npz")
    assert cli("compress", *options, "--out", "run").code == 0
    rows = [json.loads(line) for line in (here / "run" / "ledger.jsonl").read_text().splitlines()]
    best = max(row["champion_accuracy"] for row in rows)
    assert best == pytest.approx(0.8, abs=0.1)  # about the commonest class's share of decide
    started_worse = rows[0]["champion_accuracy"] < best or rows[0]["verdict"] == "promote"
    assert report_of(here / "run")["promotions"] <= started_worse
    after = [row for i, row in enumerate(rows) if i and rows[i - 1]["champion_accuracy"] == best]
    assert after
    assert not any(row["verdict"] in ("promote", "roll back") for row in after)


def test_a_class_that_decide_lacks_is_not_certified(cli, here):
    inputs, labels = blobs(n=600)
    labels[labels == 2] = 0
    rare = np.flatnonzero(labels == 0)[:3]
    labels[rare] = 2
    data = save("data.npz", inputs, labels)
    rows = split_rows(labels.astype(np.int32), None, seed=0)
    seed = next(s for s in range(50) if not (labels[split_rows(labels, None, seed=s)["decide"]] == 2).any())
    assert set(rows) == set(SPLITS)
    np.savez("logits.npz", logits=(4 * np.eye(3)[labels]).astype(np.float32))
    options = (*FAST, "--data", data, "--teacher", "logits:logits.npz", "--seed", seed)
    answer = cli("compress", *options, "--guard", "worst_class_accuracy >= 0.5", "--out", "run")
    assert answer.code == 3, answer  # three examples prove nothing of a class
    assert report_of(here / "run")["guards"][0]["bound"] < 0.5


@pytest.mark.parametrize("command", ["compress", "teach"])
def test_duplicates_across_splits_are_reported(cli, here, command):
    inputs, labels = blobs(n=600)
    inputs[300:360], labels[300:360] = inputs[:60], labels[:60]
    data = save("data.npz", inputs, labels)
    rows = split_rows(labels.astype(np.int32), None, seed=0)
    by_hand = {
        (later, earlier): sum(bool((inputs[rows[earlier]] == x).all(axis=1).any()) for x in inputs[rows[later]])
        for i, later in enumerate(SPLITS)
        for earlier in SPLITS[:i]
    }
    assert count_shared(inputs, rows) == {names: count for names, count in by_hand.items() if count}
    small = ("--teacher-network", "mlp:hidden=8", "--teacher-budget", "100")
    network = ("--network", "mlp:hidden=8") if command == "teach" else (*FAST, *small)
    answer = cli(command, *network, "--budget", "100", "--data", data, "--out", "run")
    assert answer.code == 0
    for (later, earlier), count in by_hand.items():
        line = f"{count} of the {len(rows[later])} examples of {later} have the same inputs as one in {earlier}"
        assert (line in answer.err) == (count > 0)


def test_distinct_examples_are_no_duplicates():
    inputs, labels = blobs()
    assert count_shared(inputs, split_rows(labels.astype(np.int32), None, seed=0)) == {}
    pixels = np.arange(900 * 4, dtype=np.uint16).view(np.uint8).reshape(900, 4, 2, 1)
    assert count_shared(pixels, split_rows(labels.astype(np.int32), None, seed=0)) == {}


def test_control_reports_how_much_distillation_helped(cli, here):
    """With a random teacher distillation does harm, and the student of labels alone is delivered."""
    inputs, labels = blobs()
    data = save("data.npz", inputs, labels)
    np.savez("logits.npz", logits=np.random.default_rng(0).normal(size=(900, 3)).astype(np.float32))
    options = ("--data", data, "--teacher", "logits:logits.npz", "--control")
    answer = cli("compress", *SMALL, *options, "--arms", "mse", "--out", "run")
    assert answer.code == 0, answer
    report = report_of(here / "run")
    control = report["control"]
    assert report["student"]["delivered"] == "control"
    assert control["low"] <= control["gain"] <= control["high"] < 0
    assert report["student"]["accuracy"] == control["accuracy"] > 0.8
    assert report_of(here / "run" / "control")["student"]["accuracy"] == control["accuracy"]
    assert "Distillation changed accuracy by \u2212" in answer.out
    np.savez("unlabelled.npz", inputs=inputs, class_names=["a", "b", "c"])
    refused = cli("compress", *FAST, *options[2:], "--data", "npz:unlabelled.npz", "--out", "other")
    assert refused.code == 2
    assert "a control that learns from labels alone needs labels" in refused.err


def test_stop_when_met_ends_a_run_early(cli, here):
    inputs, labels = blobs(spread=0.3)
    data = save("data.npz", inputs, labels)
    np.savez("logits.npz", logits=(4 * np.eye(3)[labels]).astype(np.float32))
    options = (*FAST, "--budget", "20000", "--data", data, "--teacher", "logits:logits.npz")
    guards = ("--guard", "accuracy >= 0.8", "--guard", "worst_class_accuracy >= 0.7", "--guard", "params <= 500")
    assert cli("compress", *options, *guards, "--stop-when-met", "--out", "run").code == 0
    report = report_of(here / "run")
    assert report["met"]
    assert report["cost"]["steps"] < 10_000
    assert all(guard["certified"] for guard in report["guards"])
    assert "every guard that training can change" in (here / "run" / "report.html").read_text()
    refused = cli("compress", *options, "--stop-when-met", "--out", "other")
    assert refused.code == 2
    assert "stop_when_met needs a guard; got none" in refused.err


def test_patients_with_several_images_are_certified_as_patients(cli, here):
    """60 patients with 6 near-copies each, whose classes are coins: by examples the student would be certified at 90 %."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 6)
    labels = rng.integers(0, 2, 60)[patient]
    inputs = (rng.normal(size=(60, 16))[patient] + 0.05 * rng.normal(size=(360, 16))).astype(np.float32)
    np.savez("data.npz", inputs=inputs, labels=labels, groups=[f"patient {i}" for i in patient])
    np.savez("logits.npz", logits=(4 * np.eye(2)[labels]).astype(np.float32))
    options = ("--data", "npz:data.npz", "--teacher", "logits:logits.npz", "--student", "mlp:hidden=16", "--arms", "ce")
    answer = cli("compress", *options, "--split-by", "groups", "--budget", "300", "--out", "run")
    assert answer.code == 0, answer
    assert (
        "the sealed split has 12 groups: a student without an error can be promised at most 73.5% accuracy"
        in answer.err
    )
    assert "near-copy" not in answer.err
    assert "The bounds count 12 groups of 72 examples" in " ".join(answer.out.split())
    report = report_of(here / "run")
    assert report["groups"] == {"explore": 30, "assess": 9, "decide": 9, "test": 12}
    certificate = json.loads((here / "run/certificate.json").read_text())
    assert certificate["units"] == {"of": "groups", "number": 12, "examples": 72}
    assert "new group" in certificate["population"]["covered"]
    assert claims_of(report)["accuracy"]["lower_bound"] < 0.5
    assert [table["of"] for table in certificate["tables"]] == ["class"]
    again = cli("evaluate", "run")
    assert again.code == 0, again
    assert f"at least {int(100 * claims_of(report)['accuracy']['lower_bound'])}." in again.out
    refused = cli(
        "compress", *options, "--split-by", "groups", "--guard", "worst_group_accuracy >= 0.5", "--out", "other"
    )
    assert refused.code == 2
    assert "a guard on worst_group_accuracy needs groups that are in all splits" in refused.err
