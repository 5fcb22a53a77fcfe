"""What the race shows about the teacher and the labels, in numbers and in words."""

import json
import types

import numpy as np
import pytest

from ev3_distill.arms import ARMS, EVOLVING, learns_from
from ev3_distill.data.sources import Dataset, load_data
from ev3_distill.tasks.classification.task import classification
from ev3_distill.training.race_diagnosis import compare_in_race, diagnose_race

NAMES = ("cat", "dog", "horse", "bird")
LABELS = np.repeat(np.arange(4), 100).astype(np.int32)
SWAPPED = np.array([0, 3, 2, 1])[LABELS]


def row(behind, *, racing=(), left=(), steps=600, **changes):
    fields = {
        "steps": dict.fromkeys(behind, steps),
        "behind": {name: gap for name, (gap, _) in behind.items()},
        "behind_se": {name: se for name, (_, se) in behind.items()},
        "racing": list(racing),
        "left": list(left),
        "objective": "promise",
    }
    return fields | changes


def race(*last, **changes):
    """Two iterations in which all arms trained, the last with these differences, then one more of the leader."""
    behind = dict(last)
    first = dict.fromkeys(behind, (0.0, 0.0))
    return [row(first, racing=tuple(behind)), row(behind, left=tuple(behind)[1:], **changes), row({"x": (0.0, 0.0)})]


def diagnosis(here, rows, answers, labels=LABELS):
    (here / "ledger.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    at = {name: np.arange(len(labels)) for name in ("explore", "assess")}
    setup = types.SimpleNamespace(
        task=classification(4),
        dataset=Dataset(np.zeros((len(labels), 1), np.float32), labels, 4, NAMES, None, "npz:data.npz", "0"),
        rows=at,
        class_names=list(NAMES),
        labeled=bool((labels >= 0).any()),
    )
    logits = 5 * np.eye(4, dtype=np.float32)[answers]
    targets = types.SimpleNamespace(unchanged=lambda rows: {"logits": logits[rows]})
    content = diagnose_race(here, setup, targets)
    assert json.loads(json.dumps(content)) == content
    return content


def test_confused_classes_are_named_where_labels_end_ahead(tmp_path):
    rows = race(("ce", (0.0, 0.0)), ("kd4", (-0.097, 0.006)), ("dist", (-0.2, 0.01)))
    content = diagnosis(tmp_path, rows, SWAPPED)
    assert content["sentences"] == [
        "Labels alone (ce) ended 9.7 points ahead of distillation (kd4) after 1,200 steps each (assess, 400 examples, standard "
        "error 0.6).",
        "Your teacher confuses 'bird' and 'dog': of 100 examples labeled 'bird' it calls 100 'dog', and of 100 labeled 'dog' "
        "100 'bird'.",
    ]
    assert (content["ahead"], content["arms"]) == ("labels", {"labels": "ce", "teacher": "kd4"})
    assert (content["gain"], content["gain_se"], content["n"], content["differ"]) == (0.097, 0.006, 400, 200)
    assert content["steps"] == {"labels": 1200, "teacher": 1200}
    (pair,) = content["pairs"]
    assert (pair["label"], pair["answer"]) == ("bird", "dog")


def test_another_class_order_is_named(tmp_path):
    content = diagnosis(tmp_path, race(("ce", (0.0, 0.0)), ("kd4", (-0.5, 0.02))), (LABELS + 1) % 4)
    assert content["moved"] == 4
    assert content["sentences"][1].startswith(
        "Your teacher's classes seem to be in another order: for 4 of 4 its usual answer is another class (of 100 examples "
        "labeled "
    )
    assert content["sentences"][1].endswith("Name its outputs in order with --teacher-input.classes.")


def test_a_teacher_that_confuses_nothing_is_not_accused(tmp_path):
    answers = LABELS.copy()
    answers[::50] = (answers[::50] + 1) % 4
    content = diagnosis(tmp_path, race(("ce-sgd", (0.0, 0.0)), ("kd4", (-0.02, 0.0004))), answers)
    assert content["sentences"] == [
        "Labels alone (ce-sgd) ended 2.0 points ahead of distillation (kd4) after 1,200 steps each (assess, 400 examples, "
        "standard error 0.04).",
        "Your teacher agrees with 98.0 % of these labels, and no two classes stand out.",
    ]


def test_labels_that_disagree_are_named_where_distillation_ends_ahead(tmp_path):
    wrong = np.random.default_rng(0).permutation(400)[:120]
    labels = LABELS.copy()
    labels[wrong] = (labels[wrong] + 1 + np.arange(120) % 3) % 4
    rows = race(("kd4", (0.0, 0.0)), ("ce", (-0.031, 0.005)))
    content = diagnosis(tmp_path, rows, LABELS, labels)
    assert content["ahead"] == "teacher"
    assert content["sentences"] == [
        "Distillation (kd4) ended 3.1 points ahead of labels alone (ce) after 1,200 steps each (assess, 400 examples, standard "
        "error 0.5).",
        "30.0 % of these labels disagree with the teacher. The race shows which of the two helped the student more, not which "
        "is right.",
    ]
    assert len(diagnosis(tmp_path, rows, LABELS)["sentences"]) == 1  # labels and teacher agree
    one_way = diagnosis(tmp_path, rows, SWAPPED)["sentences"][1]
    assert one_way.startswith(
        "50.0 % of these labels disagree with the teacher. Most clearly: of 100 examples labeled 'bird' it"
    )


def test_few_labels_are_named_and_their_scores_scaled(tmp_path):
    labels = np.where(np.arange(400) % 20 == 0, LABELS, -1).astype(np.int32)
    content = diagnosis(tmp_path, race(("kd4", (0.0, 0.0)), ("ce", (-0.01, 0.002))), LABELS, labels)
    assert (content["n"], content["gain"], content["gain_se"]) == (20, pytest.approx(0.2), pytest.approx(0.04))
    assert content["sentences"][1] == "Only 20 of 400 training examples have a label."


@pytest.mark.parametrize(
    "rows",
    [
        race(("ce", (0.0, 0.0)), ("kd4", (-0.0119, 0.006))),  # below two standard errors
        race(("ce", (0.0, 0.0)), ("kd4", (0.0, 0.0))),
        race(("ce", (0.0, 0.0)), ("ce-muon", (-0.5, 0.006))),  # labels alone
        race(("kd2", (0.0, 0.0)), ("kd4", (-0.5, 0.006))),
        race(("ce", (0.0, 0.0)), ("trust-sgd", (-0.5, 0.006))),  # labels decide how far it trusts the teacher
        [row({"kd4": (0.0, 0.0)})],
        [],
    ],
)
def test_without_clear_evidence_of_the_race_no_side_is_taken(tmp_path, rows):
    assert diagnosis(tmp_path, rows, LABELS) is None
    content = diagnosis(tmp_path, rows, SWAPPED)
    assert content["sentences"] == [
        "The teacher disagrees with the labels on some classes: of 100 examples labeled 'bird' it calls 100 'dog', and of 100 "
        "labeled 'dog' 100 'bird'. The run does not show which of the two is right."
    ]
    assert [content[name] for name in ("ahead", "arms", "steps", "gain", "gain_se")] == [None] * 5
    assert (content["n"], content["differ"], len(content["pairs"])) == (400, 200, 1)
    in_other_order = diagnosis(tmp_path, rows, (LABELS + 1) % 4)["sentences"][0]
    assert in_other_order.startswith("Your teacher's classes seem to be in another order: for 4 of 4")


def test_without_labels_there_is_no_diagnosis(tmp_path):
    rows = race(("ce", (0.0, 0.0)), ("kd4", (-0.5, 0.006)))
    assert diagnosis(tmp_path, rows, SWAPPED, np.full(400, -1, np.int32)) is None


def test_the_last_iteration_with_both_kinds_is_compared():
    rows = [
        row({"ce": (0.0, 0.0), "kd4": (-0.1, 0.01), "dist": (-0.2, 0.01)}, racing=("ce", "dist"), left=("kd4",)),
        row({"ce": (0.0, 0.0), "ce-slow": (-0.2, 0.01)}, left=("ce-slow",)),
    ]
    compared = compare_in_race(rows, "accuracy")
    assert (compared.arms, compared.gain, compared.se) == ({"labels": "ce", "teacher": "kd4"}, 0.1, 0.01)
    assert compared.steps == {"labels": 600, "teacher": 600}
    assert not compared.at_most
    broken = race(("ce", (0.0, 0.0)), ("kd4", (None, None)))
    assert compare_in_race(broken, "accuracy").gain == 0  # of the iteration before
    guarded = race(("ce", (0.0, 0.0)), ("kd4", (-0.5, 0.01)), objective="worst_class_accuracy")
    assert compare_in_race(guarded, "accuracy").gain == 0
    accurate = race(("ce", (0.0, 0.0)), ("kd4", (-0.5, 0.01)), objective="accuracy")  # a guard on the promised score
    assert compare_in_race(accurate, "accuracy").gain == 0.5


def test_the_error_is_bounded_where_a_third_arm_is_the_best():
    rows = race(("trust-sgd", (0.0, 0.0)), ("ce", (-0.01, 0.004)), ("kd4", (-0.11, 0.007)))
    compared = compare_in_race(rows, "accuracy")
    assert (compared.gain, compared.se, compared.at_most) == (pytest.approx(0.1), pytest.approx(0.011), True)


def test_each_arm_learns_from_labels_from_the_teacher_or_from_both():
    of = {name: learns_from(name) for name in (*ARMS, *EVOLVING)}
    assert {name for name, kind in of.items() if kind == "both"} == {name for name in ARMS if "trust" in name}
    assert {name for name, kind in of.items() if kind == "labels"} == {
        *(name for name in ARMS if not ARMS[name].uses_teacher),
        *EVOLVING,
    }
    assert [learns_from(name) for name in ("ce-straight", "1*ce@0.003", "ce")] == ["labels"] * 3
    assert [learns_from(name) for name in ("kd4-straight", "0.7*kd+0.3*ce@0.01", "at:stage3=layer3*500", "mse")] == [
        "teacher"
    ] * 4
    assert [learns_from(name) for name in ("tuned-temperature-mix", "kd")] == ["teacher"] * 2
    assert learns_from("0.5*trusted_kd+0.5*ce") == "both"


def test_a_run_whose_teacher_swaps_two_classes_names_them(cli, here):
    labels = np.asarray(load_data("digits").labels)
    answers = np.where(labels == 3, 5, np.where(labels == 5, 3, labels))
    noise = np.random.default_rng(0).normal(size=(len(labels), 10))
    np.savez(here / "logits.npz", logits=(6 * np.eye(10)[answers] + noise).astype(np.float32))
    options = (
        "--data",
        "digits",
        "--teacher",
        f"logits:{here / 'logits.npz'}",
        "--teacher-as-is",
        "--arms",
        "ce",
        "kd4",
    )
    result = cli("compress", *options, "--student", "mlp:hidden=16", "--budget", "1500", "--out", here / "run")
    assert result.code == 0
    report = json.loads((here / "run/report.json").read_text())
    assert [{pair["label"], pair["answer"]} for pair in report["diagnosis"]["pairs"]] == [{"3", "5"}]
    assert report["race"]["leader"] == "ce"
    for text in (" ".join(result.out.split()), " ".join((here / "run/report.html").read_text().split())):
        assert "Labels alone (ce) ended " in text and "Your teacher confuses " in text
