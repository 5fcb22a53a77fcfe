"""Checks of a teacher before training: is it the one that the run started with, is it any good, has it seen the test split?"""

from pathlib import Path

import numpy as np

from ev3_distill.config import Compress
from ev3_distill.data import split_rows
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError, warn
from ev3_distill.teachers import Teacher
from ev3_distill.teachers.diagnosis import CHECKS
from ev3_distill.training.memory import example_bytes
from ev3_distill.training.run_dir import read_json
from ev3_distill.training.run_reader import config_of
from ev3_distill.training.setup import TrainingSetup

SAMPLE = 4096  # maximum number of held-out examples for the diagnosis ...
SAMPLE_SHARE = 32  # ... and the fraction of the memory limit that they may take, as 1 / SAMPLE_SHARE


def check_unchanged(teacher: Teacher, digest: str, directory: Path) -> None:
    """Raises InputError unless the teacher has the digest with which the run in `directory` started."""
    if teacher.digest != digest:
        raise InputError(
            f"a resumed run needs the teacher that it started with, digest {digest[:12]}; {teacher.source} has "
            f"{teacher.digest[:12]}: put the old one back, or start a new run with --out instead of resuming {directory}"
        )


def sample_size(memory: int, bytes_each: int) -> int:
    """Maximum number of examples for the diagnosis, by the memory limit and the size of an example, in bytes."""
    return min(SAMPLE, max(memory // SAMPLE_SHARE // bytes_each, 1))


def check_quality(teacher: Teacher, setup: TrainingSetup, *, as_is: bool) -> None:
    """Reports the teacher's accuracy on assess and decide, and rejects a teacher that a clear error spoils.

    Args:
      teacher: the teacher.
      setup: supplies the task, the splits and the memory limit.
      as_is: report an error, but continue.

    Raises:
      InputError: other preprocessing or another class order would clearly improve the teacher.
    """
    if setup.task.diagnosis is None:
        return
    rows = np.concatenate([setup.rows[name] for name in ("assess", "decide")])
    sample = np.sort(
        np.random.default_rng(0).permutation(rows)[: sample_size(setup.memory, example_bytes(setup.dataset))]
    )
    diagnosis = CHECKS[setup.task.diagnosis](
        teacher, np.asarray(setup.dataset.inputs[sample]), setup.dataset.labels[sample], setup.dataset.class_names
    )
    for line in diagnosis.lines():
        before, _, warning = line.partition("warning: ")
        if warning and not before:
            warn(warning)
        else:
            print(line)
    if diagnosis.remedy is not None and not as_is:
        remedy = diagnosis.remedy
        raise InputError(
            f"a teacher must get the inputs that it was trained on; {teacher.source} has accuracy {remedy.before:.1%} as it "
            f"is and {remedy.after:.1%} with {remedy.name}: give {remedy.option}, or --teacher-as-is to continue"
        )


def warn_if_trained_on_test(config: Compress, dataset: Dataset) -> None:
    """Warns if the teacher is a run on the same data with other splits, and so has seen examples of the test split."""
    kind, _, place = config.teacher.partition(":")
    if kind != "flax":
        return
    test = split_rows(dataset.labels, dataset.test_rows, seed=config.seed, fractions=config.splits)["test"]
    if seen := _count_seen(Path(place.partition("#")[0]), dataset, test):
        warn(
            f"{config.teacher} was trained on these data with other splits and has seen {seen} of the {len(test)} test "
            "examples: the certificate may promise too much; give both runs the same --seed and splits"
        )


def _count_seen(place: Path, dataset: Dataset, test: np.ndarray) -> int:
    """Counts the test examples that the run of a teacher did not seal; 0 if it was trained on other data."""
    for directory in (place, place.absolute().parent):
        if not (directory / "report.json").exists():
            continue
        report = read_json(directory / "report.json")
        if report["data"]["fingerprint"] != dataset.fingerprint:
            return 0
        teacher_config = config_of(directory, report)
        sealed = split_rows(
            dataset.labels, dataset.test_rows, seed=teacher_config.seed, fractions=teacher_config.splits
        )["test"]
        return len(np.setdiff1d(test, sealed))
    return 0
