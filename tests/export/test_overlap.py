"""Evaluation on new data: examples that the student has seen are left out, and classes are matched by name."""

import json
import re
import shutil

import exported_runs
import numpy as np
import pytest
from exported_runs import CLASSES, error_of

from ev3_distill.config import Compress
from ev3_distill.data import splits_of
from ev3_distill.data.sources import load_data
from ev3_distill.export.overlap import find_new_rows
from ev3_distill.training.run_reader import config_of
from ev3_distill.training.seen_rows import NAME, SeenRows, read_seen_rows, seen_rows
from ev3_distill.training.teacher_checks import warn_if_trained_on_test

of_images = exported_runs.of_images  # fixture


def save(path, inputs, labels, **more):
    np.savez(path, inputs=inputs, labels=labels, **more)
    return f"npz:{path}"


def new_digits(count=60, seed=0):
    """Digits with noise, which no run has seen."""
    digits = load_data("digits")
    noise = np.random.default_rng(seed).uniform(0, 0.01, (count, 8, 8, 1)).astype(np.float32)
    return digits.inputs[:count] + noise, digits.labels[:count]


def accuracy_and_count(answer):
    point, count = re.search(r"^accuracy: ([\d.]+)% of (\d+) examples", answer.out, re.M).groups()
    return float(point), int(count)


# Overlap.


def test_a_run_keeps_digests_of_its_splits(finished):
    digits = load_data("digits")
    report = json.loads((finished / "report.json").read_text())
    rows = splits_of(config_of(finished, report), digits)
    seen = read_seen_rows(finished, digits.fingerprint)
    assert (len(seen.used), len(seen.sealed)) == (1797 - len(rows["test"]), len(rows["test"]))
    computed = seen_rows(digits, rows, by_groups=False)
    assert all(one.tolist() == other.tolist() for one, other in zip(seen, computed, strict=True))
    assert read_seen_rows(finished, "other data") is None


def test_all_but_one_of_the_runs_own_examples_are_refused(finished, cli, here):
    """The fingerprint of such data is another one."""
    digits = load_data("digits")
    source = save(here / "d.npz", digits.inputs[1:], digits.labels[1:])
    error = error_of(cli("evaluate", finished, "--data", source))
    assert "1,796 of 1,796 examples of" in error
    assert "occur in explore, assess or decide, which made it" in error
    assert "in its sealed split, which has been opened" in error
    assert "--keep-overlap" in error
    answer = cli("evaluate", finished, "--data", source, "--keep-overlap", "--guard", "accuracy >= 0.1")
    assert answer.code == 3
    assert accuracy_and_count(answer)[1] == 1796
    assert "; nothing is certified" in answer.out
    assert "at least" not in answer.out.splitlines()[0]
    assert "Guard accuracy >= 0.1: NOT CERTIFIED" in answer.out
    assert "nothing is certified" in answer.err
    assert cli("evaluate", finished, "--data", "digits", "--keep-overlap").code == 3


def test_examples_that_the_student_has_seen_are_left_out(finished, cli, here):
    digits, (inputs, labels) = load_data("digits"), new_digits()
    both = save(
        here / "both.npz", np.concatenate([digits.inputs[:700], inputs]), np.concatenate([digits.labels[:700], labels])
    )
    mixed = cli("evaluate", finished, "--data", both)
    alone = cli("evaluate", finished, "--data", save(here / "new.npz", inputs, labels))
    assert (mixed.code, alone.code) == (0, 0)
    assert mixed.out == alone.out
    assert "700 of 760 examples" in mixed.err
    assert "they are left out" in mixed.err
    assert alone.err == ""
    kept = cli("evaluate", finished, "--data", f"npz:{here / 'new.npz'}", "--keep-overlap")
    assert (kept.code, kept.out) == (0, alone.out)  # there is none


def test_an_older_run_is_compared_by_its_data(finished, cli, here, monkeypatch):
    run = shutil.copytree(finished, here / "run", ignore=shutil.ignore_patterns("checkpoints", NAME))
    digits = load_data("digits")
    source = save(here / "d.npz", digits.inputs[:90], digits.labels[:90])
    assert "90 of 90 examples" in error_of(cli("evaluate", run, "--data", source))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('data = "digits"', 'data = "npz:gone.npz"'))
    answer = cli("evaluate", run, "--data", source)
    assert answer.code == 0
    assert "cannot be checked: there is no seen_rows.npz" in answer.err


@pytest.mark.parametrize("way", ["onnx", "flax"])
def test_an_exported_folder_knows_what_its_student_has_seen(finished, cli, here, way):
    assert cli("export", finished, "--format", way, "--out", "out").code == 0
    assert (here / "out" / NAME).read_bytes() == (finished / NAME).read_bytes()
    digits, (inputs, labels) = load_data("digits"), new_digits()
    seen, new = save(here / "d.npz", digits.inputs[5:50], digits.labels[5:50]), save(here / "new.npz", inputs, labels)
    assert "45 of 45 examples" in error_of(cli("evaluate", "out", "--data", seen))
    kept = cli("evaluate", "out", "--data", seen, "--keep-overlap")
    assert (kept.code, accuracy_and_count(kept)[1]) == (3, 45)
    answer = cli("evaluate", "out", "--data", new)
    assert (answer.code, answer.err, accuracy_and_count(answer)[1]) == (0, "", 60)
    (here / "out" / NAME).unlink()
    assert "cannot be checked" in cli("evaluate", "out", "--data", seen).err
    assert "45 of 45 examples" in error_of(cli("evaluate", "out", "--data", seen, "--of", finished))


def test_copies_within_new_data_are_told(capsys):
    inputs = new_digits(6)[0]
    dataset = load_data("digits")
    dataset = type(dataset)(np.concatenate([inputs, inputs[:2]]), np.zeros(8, np.int32), 1, ("0",), None, "x", "")
    nothing = np.empty(0, np.uint64)
    rows, overlap = find_new_rows(dataset, SeenRows(nothing, nothing, nothing), keep=False)
    assert (rows.tolist(), overlap) == ([*range(8)], 0)
    assert "2 of the 8 examples to score have the same inputs as another one" in capsys.readouterr().err


def test_groups_with_the_names_of_the_runs_are_told(tmp_path, capsys):
    inputs, labels = np.arange(24, dtype=np.float32).reshape(12, 2), np.arange(12) % 2
    run = load_data(save(tmp_path / "run.npz", inputs, labels, groups=[f"p{i // 3}" for i in range(12)]))
    halves = {"explore": np.arange(6), "assess": np.arange(0), "decide": np.arange(0), "test": np.arange(6, 12)}
    new = load_data(save(tmp_path / "new.npz", inputs + 100, labels, groups=[f"p{2 + i // 4}" for i in range(12)]))
    find_new_rows(new, seen_rows(run, halves, by_groups=False), keep=False)
    assert capsys.readouterr().err == ""
    assert len(find_new_rows(new, seen_rows(run, halves, by_groups=True), keep=False).rows) == 12
    assert "8 of the 12 examples to score are of groups that the run has as well (p2, p3)" in capsys.readouterr().err


def test_a_teacher_that_has_seen_test_examples_in_other_data_is_told(finished, here, capsys):
    """The teacher's data are all digits, the student's all but one."""
    digits = load_data("digits")
    dataset = load_data(save(here / "d.npz", digits.inputs[1:], digits.labels[1:]))
    config = Compress(data="npz:d.npz", teacher=f"flax:{finished}")
    capsys.readouterr()
    warn_if_trained_on_test(config, dataset)
    test = splits_of(config, dataset)["test"]
    sealed = splits_of(config_of(finished, json.loads((finished / "report.json").read_text())), digits)["test"]
    seen = len(np.setdiff1d(test + 1, sealed))
    assert seen > 100
    assert f"has seen {seen} of the {len(test)} test examples" in capsys.readouterr().err
    warn_if_trained_on_test(config, load_data(save(here / "new.npz", *new_digits())))
    assert capsys.readouterr().err == ""


# Classes.


def test_classes_of_new_data_are_matched_by_name(of_images, cli, here):
    """Two of three classes, in another order, are scored as all three are."""
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=90)
    images = np.clip(80 * labels[:, None, None, None] + rng.integers(0, 90, (90, 16, 16, 2)), 0, 255).astype(np.uint8)
    kept = labels != 1
    whole = save(here / "whole.npz", images[kept], labels[kept], class_names=CLASSES)
    part = save(here / "part.npz", images[kept], (labels[kept] == 0).astype(int), class_names=[CLASSES[2], CLASSES[0]])
    for target in (of_images / "run", of_images / "onnx"):
        expected, answer = cli("evaluate", target, "--data", whole), cli("evaluate", target, "--data", part)
        assert (answer.code, accuracy_and_count(answer)) == (0, accuracy_and_count(expected))
        assert f"no example of 1 of the student's 3 classes ({CLASSES[1]})" in answer.err
    unknown = save(here / "unknown.npz", images[kept], (labels[kept] == 0).astype(int), class_names=["yak", CLASSES[0]])
    assert "has yak, the student knows" in error_of(cli("evaluate", of_images / "run", "--data", unknown))
    numbers = save(here / "numbers.npz", images, labels)
    assert (
        f"taken in the student's order: 0 is {CLASSES[0]}" in cli("evaluate", of_images / "run", "--data", numbers).err
    )
