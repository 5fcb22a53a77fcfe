"""Whole runs on images: streamed or resident, augmented, without labels, interrupted; under teachers good and mistaken."""

import json
import os
import signal

import numpy as np
import pytest
from conftest import assert_same_run, rows_without_times, variables_of

from ev3_distill.data.sources import Dataset
from ev3_distill.training import run_loop
from ev3_distill.training.memory import eval_batch_size

N, SIDE, CLASSES = 1200, 12, 4
QUICK = (
    "--student",
    "mlp:hidden=8",
    "--arms",
    "kd4",
    "mse",
    "--budget",
    "150",
    "--length",
    "10",
    "--checkpoint-s",
    "0",
)
TEACHER = """
import numpy as np

NAMES = [{names}]


def logits(images):  # [B, 12, 12, 3] in [0, 1]: the mean of each quarter, of any colour
    assert images.dtype == np.float32 and images.max() <= 1
    grey = images.mean(-1)
    quarters = [grey[:, i : i + 6, j : j + 6].mean((1, 2)) for i in (0, 6) for j in (0, 6)]
    return np.stack(quarters, 1)[:, NAMES] * 20
"""


@pytest.fixture
def images(here):
    """images.npz: bytes, one bright quarter each, its number the label; teachers right.py, and wrong.py in another order."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, N).astype(np.int32)
    inputs = rng.integers(0, 200, (N, SIDE, SIDE, 3)).astype(np.uint8)
    for row, label in enumerate(labels):
        top, left = 6 * (label // 2), 6 * (label % 2)
        inputs[row, top : top + 6, left : left + 6] += 25
    np.savez(here / "images.npz", inputs=inputs, labels=labels)
    np.savez(here / "unlabelled.npz", inputs=inputs)
    tag = here.name.replace("-", "_")  # modules of one name would meet in one process
    for name, order in (("right", "0, 1, 2, 3"), ("wrong", "1, 2, 3, 0")):
        (here / f"{name}_{tag}.py").write_text(TEACHER.format(names=order))
    return {name: f"python:{name}_{tag}:logits" for name in ("right", "wrong")}


@pytest.mark.parametrize("augment", [pytest.param("none", marks=pytest.mark.slow), "flip,crop=2,mixup"])
def test_streamed_or_resident_is_the_same_run(images, cli, here, augment):
    options = (*QUICK, "--data", "npz:images.npz", "--teacher", images["right"], "--augment", augment, "--views", "2")
    assert cli("compress", *options, "--out", "resident").code == 0
    streamed = cli("compress", *options, "--memory", "1M", "--out", "streamed")
    assert streamed.code == 0, streamed.err
    found, wanted = (rows_without_times(here / name / "ledger.jsonl") for name in ("streamed", "resident"))
    assert [row["cost"] for row in found] == [row["cost"] for row in wanted]
    for one, other in zip(variables_of(here / "streamed")[1], variables_of(here / "resident")[1], strict=True):
        assert one == other


def test_evaluation_takes_what_the_memory_limit_has_room_for():
    data = Dataset(np.zeros((100, 128, 128, 3), np.uint8), np.zeros(100, np.int32), 2, ("a", "b"), None, "x", "x")
    assert eval_batch_size(data, 2**40, 1024) == 1024
    assert eval_batch_size(data, 2**30, 1024) == 2**30 // 512 // (4 * 128 * 128 * 3) == 10
    assert eval_batch_size(data, 2**20, 1024) == 8
    assert eval_batch_size(data, 2**20, 3) == 3


@pytest.mark.slow
def test_an_interrupted_augmented_run_goes_on_bit_by_bit(images, cli, here, monkeypatch):
    options = (*QUICK, "--data", "npz:images.npz", "--teacher", images["right"], "--augment", "flip,crop=2,cutmix")
    assert cli("compress", *options, "--out", "whole").code == 0
    row_of = run_loop.row_of

    def interrupted(decision, *facts, **rest):
        if int(decision.iteration) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return row_of(decision, *facts, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_loop, "row_of", interrupted)
        assert cli("compress", *options, "--out", "cut").code == 130
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(here / "another"))  # what the teacher said is gone
    assert cli("compress", "--resume", "cut").code == 0
    assert_same_run(here / "whole", here / "cut")


def test_without_labels_a_student_is_promised_to_agree(images, cli, here):
    answer = cli("compress", *QUICK, "--data", "npz:unlabelled.npz", "--teacher", images["right"], "--out", "run")
    assert answer.code == 0, answer.err
    assert "agreement with its teacher, with 95 % confidence" in " ".join(answer.out.split())
    assert "% accuracy" not in answer.out
    report = json.loads((here / "run/report.json").read_text())
    assert [claim["metric"] for claim in report["certificate"]["claims"]] == ["agreement"]
    assert report["student"]["accuracy"] is None
    assert report["student"]["agreement"] > 0.4  # chance is a quarter
    assert "so there is no accuracy" in (here / "run/report.html").read_text()


def test_a_mistaken_class_order_is_caught_before_training(images, cli, here):
    options = ("compress", *QUICK, "--data", "npz:images.npz", "--teacher", images["wrong"], "--out", "run")
    answer = cli(*options)
    assert answer.code == 2
    assert "Traceback" not in answer.err
    last = answer.err.splitlines()[-1]
    assert "give --teacher-input.classes 1 2 3 0, or --teacher-as-is to continue" in last
    assert not (here / "run").exists()
    answer = cli(*options, "--teacher-input.classes", "1", "2", "3", "0")
    assert answer.code == 0, answer.err
    assert json.loads((here / "run/report.json").read_text())["teacher"]["accuracy"] > 0.95


def test_a_resumed_run_needs_its_teacher(images, cli, here, monkeypatch):
    options = ("compress", *QUICK, "--data", "npz:images.npz", "--teacher", images["right"], "--out", "run")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_loop, "iterate", stop)
        assert cli(*options).code == 130
    module = here / f"{images['right'].split(':')[1]}.py"
    module.write_text(module.read_text() + "\n# changed\n")
    answer = cli("compress", "--resume", "run")
    assert answer.code == 2
    assert "a resumed run needs the teacher that it started with, digest" in answer.err


@pytest.mark.slow
def test_features_and_a_teacher_inside_the_step(images, cli, here):
    network = ("--network", "resnet:depth=8,width=2", "--budget", "20")
    assert cli("teach", "--data", "npz:images.npz", *network, "--augment", "flip", "--out", "teacher").code == 0
    student = ("--student", "resnet:depth=8,width=2", "--budget", "12")
    options = ("compress", "--data", "npz:images.npz", "--teacher-as-is", *student)
    answer = cli(*options, "--teacher", "flax:teacher", "--arms", "at:nothing=stage9", "--out", "run")
    assert answer.code == 2
    assert "an arm learns a student's feature from a teacher's feature" in answer.err
    assert "the student has pooled [8], stage1 [12, 12, 2]" in answer.err
    named = ("--teacher", "flax:teacher#stage3", "--arms", "sp:stage2=stage3")
    answer = cli(*options, *named, "--out", "features")
    assert answer.code == 0, answer.err
    answer = cli(*options, "--teacher", "flax:teacher", "--arms", "kd4", "--teacher-in-step", "--out", "step")
    assert answer.code == 0, answer.err
    answer = cli(*options, "--teacher", images["right"], "--arms", "kd4", "--teacher-in-step", "--out", "no")
    assert answer.code == 2
    assert "a teacher inside the training step must be a flax teacher" in answer.err
