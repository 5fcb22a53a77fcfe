"""Outputs of a teacher are matched with the classes of the data by name, or by rank where both are numbers."""

import numpy as np
import pytest
from small_network import load

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.teachers.class_order import class_columns

DIGITS = ("0", "1", "2")


def order(model, data, *, user=()):
    return class_columns(user, model, data, len(data), len(user or model), source="t")


@pytest.mark.parametrize(
    ("model", "data", "columns"),
    [
        (("cat", "ant", "bee"), ("ant", "bee", "cat"), [1, 2, 0]),
        (("cafe\u0301", "the"), ("the", "caf\u00e9"), [1, 0]),  # NFD and NFC
        (("0.0", "1.0", "2.0"), DIGITS, None),
        (("2.0", "0.0", "1.0"), DIGITS, [1, 2, 0]),
        (("False", "True"), ("0", "1"), None),
        (("False", "True"), ("True", "False"), [1, 0]),
        (("0", "1"), ("False", "True"), None),
        (("1.0", "2.0"), ("2", "1"), [1, 0]),
        (("0", "1", "2"), ("a", "b", "c"), None),  # labels
        (("0.0", "1.0", "2.0"), ("a", "b", "c"), None),
        (("1", "2", "3", "4"), ("3", "1"), [2, 0]),  # a subset, by name
        (("17", "37"), ("37", "17"), [1, 0]),
    ],
)
def test_equal_names_are_matched_without_a_note(model, data, columns):
    found = order(model, data)
    assert (None if found.columns is None else found.columns.tolist()) == columns
    assert found.notes == ()


@pytest.mark.parametrize(
    ("model", "data"),
    [(("1", "2", "3"), DIGITS), (("1.0", "2.0", "3.0"), DIGITS), (("17", "37", "57"), DIGITS),
     (("-1", "1"), ("0", "1")), (("1", "2", "3"), ("a", "b", "c"))],
)  # fmt: skip
def test_numbers_of_other_labels_are_matched_by_rank_with_a_note(model, data):
    found = order(model, data)
    assert found.columns is None
    assert found.output_names == data
    (note,) = found.notes
    assert note.startswith(
        f"its classes {', '.join(model)} are taken as the data's classes {', '.join(data)}, in this order"
    )


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        (("a", "b", "c"), DIGITS, "t knows a, b, c, the data have 0, 1, 2, and it lacks 0, 1, 2: name its outputs"),
        (("17", "37", "57"), ("a", "b", "c"), "t knows 17, 37, 57, the data have a, b, c, and it lacks a, b, c: name"),
        (
            ("1", "2", "3"),
            ("0", "1", "2", "3"),
            "and it lacks 0: give labels=ids to the data where their labels are ids, name",
        ),
        (("3", "1", "2"), DIGITS, "t knows 3, 1, 2, the data have 0, 1, 2, and it lacks 0: name"),
        (("a", "b"), ("a", "b", "c"), "t knows a, b, the data have a, b, c, and it lacks c: name"),
    ],
)
def test_other_names_are_an_error_with_both_lists(model, data, says):
    with pytest.raises(InputError, match=says):
        order(model, data)


def test_names_of_the_user_are_never_taken_by_rank():
    with pytest.raises(InputError, match="it lacks 0"):
        order(None, DIGITS, user=("1", "2", "3"))
    assert order(None, DIGITS, user=("2.0", "1.0", "0.0")).columns.tolist() == [2, 1, 0]


@pytest.mark.parametrize("labels", [[1, 2, 3], [0.0, 1.0, 2.0], [5, 17, 37], ["a", "b", "c"]], ids=str)
def test_sklearn_classes_of_any_type_give_the_same_logits(here, labels):
    """The estimator is the same for any spelling of its classes, and so are its logits for data with labels 0 to 2."""
    skops = pytest.importorskip("skops.io", reason="sklearn teachers need the extra [sklearn]")
    from sklearn.naive_bayes import GaussianNB

    rows = np.random.default_rng(0).normal(size=(60, 4)) + np.arange(60)[:, None] % 3
    skops.dump(GaussianNB().fit(rows, np.array(labels)[np.arange(60) % 3]), "model.skops")
    names = ("a", "b", "c") if labels[0] == "a" else DIGITS
    teacher = load("sklearn:model.skops", steps=Preprocessing(), shape=(4,), classes=names)
    expected = np.log(np.clip(GaussianNB().fit(rows, np.arange(60) % 3).predict_proba(rows), 1e-7, 1))
    np.testing.assert_allclose(teacher.outputs(rows.astype(np.float32))["logits"], expected, atol=1e-4)
    assert len(teacher.notes) == (labels[0] in (1, 5))


def test_sklearn_classes_that_are_truth_values_are_matched(here):
    skops = pytest.importorskip("skops.io", reason="sklearn teachers need the extra [sklearn]")
    from sklearn.linear_model import LogisticRegression

    rows = np.random.default_rng(0).normal(size=(60, 4))
    skops.dump(LogisticRegression().fit(rows, rows[:, 0] > 0), "model.skops")
    teacher = load("sklearn:model.skops", steps=Preprocessing(), shape=(4,), classes=("0", "1"))
    hits = teacher.outputs(rows.astype(np.float32))["logits"].argmax(1) == (rows[:, 0] > 0)
    assert hits.mean() > 0.9
    assert teacher.notes == ()


def test_sklearn_of_several_labels_is_refused(here):
    skops = pytest.importorskip("skops.io", reason="sklearn teachers need the extra [sklearn]")
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    rows = np.random.default_rng(0).normal(size=(60, 3))
    skops.dump(OneVsRestClassifier(LogisticRegression()).fit(rows, (rows > 0).astype(int)), "model.skops")
    with pytest.raises(InputError, match=r"one class per example; got probabilities of several labels \(multi-label\)"):
        load("sklearn:model.skops", steps=Preprocessing(), shape=(3,), classes=DIGITS)
