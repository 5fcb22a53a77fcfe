"""`logits:FILE.npz`: logits that any program computed beforehand, in the order of the data set."""

import dataclasses
from pathlib import Path

import numpy as np

from ev3_distill.config import Preprocessing
from ev3_distill.data.group_file import same_content
from ev3_distill.errors import InputError
from ev3_distill.runtime import npz
from ev3_distill.runtime.files import atomic_write
from ev3_distill.teachers.loading import digest_of
from ev3_distill.teachers.output_meaning import advice_on_infinite
from ev3_distill.teachers.preprocessing import OPTION
from ev3_distill.teachers.teacher import MAIN, Model, Request, Teacher, build_teacher


def recorded_teacher(logits: np.ndarray, request: Request) -> Teacher:
    """A teacher whose inputs are the recorded outputs themselves, [B, R].

    It states the meaning of the outputs and puts the classes in order, as any teacher does, and can be diagnosed.

    Args:
      logits: [N, R], as `load_logits` returns them.
      request: its options may have `outputs` and `classes`; the input shape is (R,).

    Raises:
      InputError: an option is about inputs, or the outputs do not fit the classes.
    """
    for field in dataclasses.fields(Preprocessing):
        if field.name not in ("outputs", "classes") and getattr(request.options, field.name):
            raise InputError(
                f"recorded logits have no inputs to preprocess; got {OPTION}.{field.name} with {request.source}: omit it"
            )
    model = Model(
        run=lambda rows: {MAIN: rows},
        digest=digest_of(["logits", np.ascontiguousarray(logits).data]),
        input_shape=logits.shape[1:],
        num_outputs=logits.shape[1],
    )
    teacher = build_teacher(model, dataclasses.replace(request, input_shape=logits.shape[1:]))
    return dataclasses.replace(teacher, recorded=True)


def load_logits(
    path: str | Path,
    *,
    rows: int,
    test_rows: np.ndarray | None = None,
    fingerprint: str | None = None,
) -> np.ndarray:
    """Loads recorded logits, or other outputs of a teacher.

    Args:
      path: an npz file with `logits` [N, K], or with `train_logits` and `test_logits` if the data come in two parts. An
        optional text `fingerprint` identifies the data set they were computed on.
      rows: examples in the data set, N.
      test_rows: rows of `test_logits` in the data set, in order; the other rows are those of `train_logits`.
      fingerprint: of the data set; compared with the file's if both exist.

    Returns:
      Outputs [N, R] float32, all finite; R is 1 for an array [N].

    Raises:
      InputError: the file is missing or damaged, or its logits belong to other data.
    """
    path = Path(path).expanduser()
    arrays = npz.read(
        path,
        (("logits",), ("train_logits", "test_logits")),
        optional="fingerprint",
        option="logits:FILE",
        expected="logits, or train_logits and test_logits",
    )
    recorded_on = arrays.get("fingerprint")
    if fingerprint is not None and recorded_on is not None and not same_content(str(recorded_on), fingerprint):
        raise InputError(
            f"{path}: logits must come from this data set, fingerprint {fingerprint[:12]}; got "
            f"{str(recorded_on)[:12]}: the logits are stale or belong to other data, run the teacher again"
        )
    if "logits" in arrays:
        return _check(path, "logits", arrays["logits"], rows)
    if test_rows is None:
        raise InputError(
            f"{path}: a data set without a test part needs logits; got train_logits and test_logits: "
            "save one array, logits, in the order of the data set"
        )
    is_test = np.zeros(rows, bool)
    is_test[test_rows] = True
    train = _check(path, "train_logits", arrays["train_logits"], rows - len(test_rows))
    test = _check(path, "test_logits", arrays["test_logits"], len(test_rows))
    if train.shape[1] != test.shape[1]:
        raise InputError(
            f"{path}: train_logits and test_logits must have the same number of columns; got {train.shape[1]} and "
            f"{test.shape[1]}: use the outputs of one teacher"
        )
    logits = np.empty((rows, train.shape[1]), np.float32)
    logits[~is_test], logits[test_rows] = train, test
    return logits


def _check(path: Path, name: str, logits: np.ndarray, rows: int) -> np.ndarray:
    """Checks outputs [rows, R] and returns them as float32."""
    if logits.dtype.kind not in "uif" or logits.ndim not in (1, 2) or 0 in logits.shape[1:]:
        raise InputError(
            f"{path}: {name} must be numbers [N, K]; got {logits.dtype} {list(logits.shape)}: one row per example"
        )
    if len(logits) != rows:
        raise InputError(
            f"{path}: {name} must have one row per example, {rows}; got {len(logits)}: run the teacher on this data set"
        )
    with np.errstate(over="ignore"):  # float64 may overflow; the check below finds it
        logits = logits.astype(np.float32).reshape(rows, -1)
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{path}: {name} must be finite; got nan or infinity in row {int(finite.argmin())}: {advice_on_infinite(logits)}"
        )
    return logits


def save_logits(path: str | Path, logits: np.ndarray, fingerprint: str) -> None:
    """Saves logits [N, K] with the fingerprint of their data set, atomically."""
    with atomic_write(Path(path).expanduser()) as file:
        np.savez(file, logits=np.asarray(logits, np.float32), fingerprint=np.array(fingerprint))
