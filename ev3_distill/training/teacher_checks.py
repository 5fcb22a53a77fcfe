"""Checks of a teacher before training: is it the one that the run started with, is it any good, has it seen the test split?"""

import dataclasses
from pathlib import Path

import numpy as np

from ev3_distill.config import Compress
from ev3_distill.data import splits_of
from ev3_distill.data.row_digests import are_among, distinct, row_digests
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError, warn
from ev3_distill.teachers import Teacher
from ev3_distill.teachers.diagnosis import CHECKS, Diagnosis, find_row_shift
from ev3_distill.training.memory import example_bytes
from ev3_distill.training.run_reader import config_of, report_in
from ev3_distill.training.seen_rows import read_seen_rows
from ev3_distill.training.setup import TrainingSetup

ROWS = 1 << 16  # recorded rows converted at a time
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


def check_quality(teacher: Teacher, setup: TrainingSetup, *, as_is: bool, recorded: np.ndarray | None = None) -> None:
    """Reports the teacher's accuracy on assess and decide, and rejects a teacher that a clear error spoils.

    Args:
      teacher: the teacher.
      setup: supplies the task, the splits and the memory limit.
      as_is: report an error, but continue.
      recorded: recorded outputs [N, R], which are then the teacher's inputs.

    Raises:
      InputError: other preprocessing, another class order or another order of recorded rows would clearly improve the
        teacher, or its outputs are not logits of classes.
    """
    if setup.task.diagnosis is None:
        return
    rows = np.concatenate([setup.rows[name] for name in ("assess", "decide")])
    sample = np.sort(
        np.random.default_rng(0).permutation(rows)[: sample_size(setup.memory, example_bytes(setup.dataset))]
    )
    inputs = setup.dataset.inputs if recorded is None else recorded
    diagnosis = CHECKS[setup.task.diagnosis](
        teacher, np.asarray(inputs[sample]), setup.dataset.labels[sample], setup.dataset.class_names
    )
    if recorded is not None:
        diagnosis = _with_row_order(diagnosis, teacher, setup, recorded)
    for line in diagnosis.lines():
        before, _, warning = line.partition("warning: ")
        if warning and not before:
            warn(warning)
        else:
            print(line)
    if (fault := _fault(diagnosis, teacher)) and not as_is:
        raise InputError(f"{fault}, or --teacher-as-is to continue")
    if fault and diagnosis.remedy is None:
        warn(fault)


def _with_row_order(diagnosis: Diagnosis, teacher: Teacher, setup: TrainingSetup, recorded: np.ndarray) -> Diagnosis:
    """Adds a shift of the recorded rows if it improves the teacher more than any other repair does.

    Labels of the sealed split are not used.
    """
    labels = np.array(setup.dataset.labels)
    labels[setup.rows["test"]] = -1
    predicted = np.concatenate([teacher.outputs(part)["logits"].argmax(axis=1) for part in _parts(recorded)])
    found = find_row_shift(predicted, labels)
    if found is None or (diagnosis.remedy is not None and diagnosis.remedy.after >= found.after):
        return diagnosis
    return dataclasses.replace(diagnosis, remedy=None, row_shift=found)


def _fault(diagnosis: Diagnosis, teacher: Teacher) -> str:
    """The error for a teacher that should not be used as it is; empty for any other."""
    if diagnosis.why_not_logits:
        return f"a teacher's outputs must be logits of classes; {teacher.source}: {diagnosis.why_not_logits}"
    if shift := diagnosis.row_shift:
        return (
            f"recorded logits must be in the order of the data set; {teacher.source} has accuracy {shift.before:.1%} as it is "
            f"and {shift.after:.1%} with its rows {shift.advice}"
        )
    if remedy := diagnosis.remedy:
        rule = "a teacher must get the inputs that it was trained on"
        if not set(remedy.changes) - {"classes"}:
            rule = "a teacher's outputs must be in the order of the data's classes"
        return (
            f"{rule}; {teacher.source} has accuracy {remedy.before:.1%} as it is and {remedy.after:.1%} with {remedy.name}: "
            f"give {remedy.option}"
        )
    return ""


def outputs_of_all(teacher: Teacher, recorded: np.ndarray) -> np.ndarray:
    """Logits [N, K] of recorded outputs [N, R], in the data's class order."""
    logits = np.empty((len(recorded), teacher.outputs(recorded[:1])["logits"].shape[1]), np.float32)
    for start, part in zip(range(0, len(recorded), ROWS), _parts(recorded), strict=True):
        logits[start : start + ROWS] = teacher.outputs(part)["logits"]
    return logits


def _parts(recorded: np.ndarray) -> list[np.ndarray]:
    return [recorded[start : start + ROWS] for start in range(0, len(recorded), ROWS)]


def warn_if_trained_on_test(config: Compress, dataset: Dataset) -> None:
    """Warns if the teacher is a network of a run that has seen examples of the test split, in whatever data it found them."""
    kind, _, place = config.teacher.partition(":")
    if kind != "flax":
        return
    test = splits_of(config, dataset)["test"]
    if seen := _count_seen(Path(place.partition("#")[0]), dataset, test):
        warn(
            f"{config.teacher} was trained on these data with other splits, or on data that overlap with them, and has seen "
            f"{seen} of the {len(test)} test examples: the certificate may promise too much; give both runs the same data, "
            "--seed and splits, and train a teacher of an older version again"
        )


def _count_seen(place: Path, dataset: Dataset, test: np.ndarray) -> int:
    """Counts the test examples that the run of a teacher has seen and did not seal; 0 if that is unknown."""
    for directory in (place, place.absolute().parent):
        report = report_in(directory)
        if report is not None and report["data"]["fingerprint"] == dataset.fingerprint:
            sealed = splits_of(config_of(directory, report), dataset)["test"]
            return int((~np.isin(test, sealed)).sum())
        if (seen := read_seen_rows(directory)) is not None:
            return int(are_among(row_digests(dataset.inputs)[test], distinct(seen.used)).sum())
        if report is not None:
            return 0
    return 0
