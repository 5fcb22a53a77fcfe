"""Recorded logits from the command line: diagnosed as any teacher is, refused or with a warning where they are wrong."""

import re

import numpy as np
import pytest
from refused_inputs import refused
from scipy.special import log_softmax, softmax

from ev3_distill import load_data

CLASSES = 10
SMALL = ("compress", "--student", "mlp:hidden=8", "--arms", "kd4", "--out", "run")
RNG = np.random.default_rng(0)
LABELS = load_data("digits").labels
GOOD = RNG.normal(0, 2, (len(LABELS), CLASSES)) + 8 * np.eye(CLASSES)[LABELS]
SWAPPED = [1, 0, *range(2, CLASSES)]


@pytest.fixture
def start(cli, here, monkeypatch):
    """Starts a run with recorded outputs and stops it before the first iteration."""
    from ev3_distill.training.train import run_loop

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def call(logits, *options):
        monkeypatch.setattr(run_loop, "iterate", stop)
        np.savez("logits.npz", logits=logits)
        answer = cli(*SMALL, "--teacher", "logits:logits.npz", *options)
        monkeypatch.undo()
        monkeypatch.chdir(here)
        return answer

    return call


@pytest.mark.parametrize("logits", [GOOD, log_softmax(GOOD, axis=1), GOOD + 100])
def test_good_logits_have_their_accuracy_and_no_warning(start, logits):
    answer = start(logits)
    assert answer.code == 130
    assert "warning" not in answer.err
    assert "teacher logits:logits.npz: accuracy 9" in answer.out
    assert answer.out.count("\n") == 1


def test_probabilities_are_told_and_converted(start, here):
    probabilities = softmax(GOOD, axis=1)
    answer = start(probabilities)
    assert "warning: its outputs are probabilities (each row sums to 1)" in answer.err
    assert "give --teacher-input.outputs probabilities to take the logarithm" in answer.err


def test_stated_probabilities_are_stored_as_logits(start, here):
    answer = start(softmax(GOOD, axis=1), "--teacher-input.outputs", "probabilities")
    assert "warning" not in answer.err
    with np.load("run/logits.npz") as file:
        np.testing.assert_allclose(file["logits"], np.maximum(log_softmax(GOOD, axis=1), np.log(1e-7)), atol=1e-3)


REFUSED = {
    "class order": (GOOD[:, SWAPPED], r"order of the data's classes; .* give --teacher-input.classes 1 0 2 3 4 5 6 7 8 9"),
    "shift": (np.roll(GOOD, 1, axis=0), r"order of the data set; .* rows shifted \(.* 1 row too late\): save numpy.roll"),
    "reverse": (GOOD[::-1], r"with its rows in reverse order: save logits\[::-1\], or --teacher-as-is to continue"),
    "one column": (GOOD[:, :1], "one output column per class, 10; .* regression task, which ev3-distill does not offer yet"),
    "labels": (LABELS, "one output column per class, 10; .* return one logit per class, instead of a class number"),
    "columns": (GOOD[:, :9], "one output per class of the data, 10; logits:logits.npz has 9: .* Embeddings and regressions"),
    "forest": (np.where(np.eye(CLASSES)[LABELS] > 0, 0, -np.inf), "logarithm of a probability of 0; clip first"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_logits_are_refused(start, here, name):
    logits, says = REFUSED[name]
    answer = start(logits)
    assert answer.code == 2
    lines = [line for line in answer.err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert re.search(says, lines[0]), lines
    assert not (here / "run").exists()


def test_the_named_options_are_the_way_out(start, here):
    answer = start(GOOD[:, SWAPPED], "--teacher-input.classes", "1", "0", "2", "3", "4", "5", "6", "7", "8", "9")
    assert (answer.code, "warning" in answer.err) == (130, False)
    with np.load("run/logits.npz") as file:
        np.testing.assert_allclose(file["logits"], GOOD, rtol=1e-5)


def test_as_is_continues_with_a_warning(start):
    answer = start(np.roll(GOOD, 1, axis=0), "--teacher-as-is")
    assert answer.code == 130
    assert "warning: recorded logits must be in the order of the data set" in answer.err


def test_rows_in_another_order_are_told(start):
    answer = start(RNG.permutation(GOOD))
    assert "the teacher is NEAR CHANCE on these data" in answer.err
    assert "so its rows are probably in another order" in answer.err


def test_options_about_inputs_are_refused(cli, here):
    np.savez("logits.npz", logits=GOOD)
    says = "recorded logits have no inputs to preprocess; got --teacher-input.scale with logits:logits.npz: omit it"
    refused(cli, here, *SMALL, "--teacher", "logits:logits.npz", "--teacher-input.scale", "255", says=says)


def test_unlabeled_data_with_recorded_logits_become_a_student(cli, here):
    np.savez("data.npz", inputs=load_data("digits").inputs)
    np.savez("logits.npz", logits=GOOD)
    answer = cli(*SMALL, "--data", "npz:data.npz", "--teacher", "logits:logits.npz", "--budget", "100")
    assert answer.code == 0, answer.err
    assert "Its 10 outputs are taken as the logits of 10 classes; it predicts class" in answer.out
    assert "agreement with its teacher" in " ".join(answer.out.split())
    assert cli("compress", "--resume", "run").code == 0


@pytest.mark.parametrize(("outputs", "says"), [
    (GOOD[:, :1], "at least 2; .* has one: give --teacher-input.outputs logits if it is the decision value"),
    (GOOD / np.linalg.norm(GOOD, axis=1, keepdims=True), "must be logits of classes; .* has length 1, as embeddings have"),
    (GOOD * [1, 1000, *[1] * 8] + [0, 1e5, *[0] * 8], "output 1 of 10 is the largest for all .* regression targets"),
])  # fmt: skip
def test_unlabeled_outputs_that_are_no_logits_are_refused(cli, here, outputs, says):
    np.savez("data.npz", inputs=load_data("digits").inputs)
    np.savez("logits.npz", logits=outputs)
    answer = cli(*SMALL, "--data", "npz:data.npz", "--teacher", "logits:logits.npz")
    assert answer.code == 2
    assert re.search(says, answer.err), answer.err
    assert "warning" not in answer.err
    assert not (here / "run").exists()
