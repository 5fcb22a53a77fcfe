"""Runs on data in which only some examples have a label: what is promised is about the labeled ones, and counts them."""

import json
import re

import numpy as np
import pytest

from ev3_distill.config import EV3, Compress
from ev3_distill.data.sources import load_data
from ev3_distill.teachers.targets import RecordedTargets
from ev3_distill.training.label_checks import describe_labels
from ev3_distill.training.setup import classification_setup, make_run

CLASSES, EVERY = 10, 4
SMALL = (*("compress", "--student", "mlp:hidden=8", "--arms", "ce", "kd4", "--budget", "200"), *("--out", "run"))


@pytest.fixture
def labels():
    truth = load_data("digits").labels
    known = np.random.default_rng(0).random(len(truth)) < 1 / EVERY
    return np.where(known, truth, -1)


@pytest.fixture
def saved(here, labels):
    digits = load_data("digits")
    np.savez("data.npz", inputs=digits.inputs, labels=labels)
    noise = np.random.default_rng(1).normal(size=(len(labels), CLASSES))
    np.savez("logits.npz", logits=4.0 * np.eye(CLASSES)[digits.labels] + noise)
    return here


def test_a_run_promises_about_labeled_examples_and_trains_on_all(cli, saved, labels):
    answer = cli(*SMALL, "--data", "npz:data.npz", "--teacher", "logits:logits.npz", "--guard", "accuracy >= 0.1")
    assert answer.code == 0, answer.err
    known = (labels >= 0).sum()
    assert f"npz:data.npz: {known} of 1,797 examples have a label (" in answer.out
    report = json.loads((saved / "run" / "report.json").read_text())
    assert report["data"]["labeled"] == known
    splits = report["splits"]
    assert splits["test"] == pytest.approx(0.2 * known, abs=1)
    assert splits["explore"] == 1797 - sum(splits[name] for name in ("assess", "decide", "test"))
    claims = {claim["metric"]: claim for claim in report["certificate"]["claims"]}
    assert claims["accuracy"]["n"] == claims["agreement"]["n"] == splits["test"]
    assert claims["accuracy"]["point"] * splits["test"] == pytest.approx(
        round(claims["accuracy"]["point"] * splits["test"])
    )

    again = cli("evaluate", "run")
    assert again.code == 0, again.err
    assert cli("compress", "--resume", "run").code == 0
    assert cli("export", "run", "--format", "onnx", "--out", "student").code == 0


def test_new_data_are_evaluated_on_their_labeled_examples(cli, saved, labels):
    cli(*SMALL, "--data", "digits", "--teacher", "logits:logits.npz")
    rng = np.random.default_rng(2)
    inputs = np.clip(load_data("digits").inputs + rng.normal(0, 0.05, (1797, 8, 8, 1)), 0, 1).astype(np.float32)
    np.savez("new.npz", inputs=inputs, labels=labels)
    answer = cli("evaluate", "run", "--data", "npz:new.npz")
    assert answer.code == 0, answer.err
    assert re.search(rf"\b{(labels >= 0).sum()}\b", answer.out), answer.out


def test_too_few_labels_are_refused_before_anything_is_written(cli, saved):
    labels = np.full(1797, -1)
    labels[:4] = [0, 1, 9, 9]
    np.savez("data.npz", inputs=load_data("digits").inputs, labels=labels)
    answer = cli(*SMALL, "--data", "npz:data.npz", "--teacher", "logits:logits.npz")
    assert answer.code == 2
    assert "got 4 labeled examples, too few for" in answer.err
    assert not (saved / "run").exists()


def test_data_with_all_labels_or_none_are_not_described(capsys, saved):
    describe_labels(load_data("digits"))
    np.savez("none.npz", inputs=load_data("digits").inputs)
    describe_labels(load_data("npz:none.npz"))
    assert capsys.readouterr().out == ""


def test_a_patience_looks_at_labeled_examples_of_explore(saved, labels):
    """An example without a label scores 0 whatever the student, so it would hide that training still helps."""
    config = Compress(data="npz:data.npz", student="mlp:hidden=8", budget="200", ev3=EV3(patience=2.0))
    setup = classification_setup(config, config.student, load_data("npz:data.npz"), CLASSES)
    targets = RecordedTargets({"logits": np.zeros((len(labels), CLASSES), np.float32)})
    run = make_run(config, setup, ["kd4"], targets)
    assert len(run.pools.seen.targets) == len(setup.rows["assess"])
    assert (np.asarray(run.pools.seen.targets) >= 0).all()
    assert np.isin(np.asarray(run.pools.seen.index), setup.rows["explore"]).all()
    for split in (run.pools.assess, run.pools.decide):
        assert (np.asarray(split.targets) >= 0).all()
