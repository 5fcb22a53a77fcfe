"""`logits:FILE.npz`: logits that any program computed beforehand, in the order of the data set."""

from pathlib import Path

import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.runtime import npz
from ev3_distill.runtime.files import atomic_write


def load_logits(
    path: str | Path,
    *,
    rows: int,
    num_classes: int,
    test_rows: np.ndarray | None = None,
    fingerprint: str | None = None,
) -> np.ndarray:
    """Loads recorded logits.

    Args:
      path: an npz file with `logits` [N, K], or with `train_logits` and `test_logits` if the data come in two parts. An
        optional text `fingerprint` identifies the data set they were computed on.
      rows: examples in the data set, N.
      num_classes: K.
      test_rows: rows of `test_logits` in the data set, in order; the other rows are those of `train_logits`.
      fingerprint: of the data set; compared with the file's if both exist.

    Returns:
      Logits [N, K] float32, all finite.

    Raises:
      InputError: the file is missing or damaged, or its logits belong to other data or classes.
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
    if fingerprint is not None and recorded_on is not None and str(recorded_on) != fingerprint:
        raise InputError(
            f"{path}: logits must come from this data set, fingerprint {fingerprint[:12]}; got "
            f"{str(recorded_on)[:12]}: the logits are stale or belong to other data, run the teacher again"
        )
    if "logits" in arrays:
        return _check(path, "logits", arrays["logits"], rows, num_classes)
    if test_rows is None:
        raise InputError(
            f"{path}: a data set without a test part needs logits; got train_logits and test_logits: "
            "save one array, logits, in the order of the data set"
        )
    is_test = np.zeros(rows, bool)
    is_test[test_rows] = True
    logits = np.empty((rows, num_classes), np.float32)
    logits[~is_test] = _check(path, "train_logits", arrays["train_logits"], rows - len(test_rows), num_classes)
    logits[test_rows] = _check(path, "test_logits", arrays["test_logits"], len(test_rows), num_classes)
    return logits


def _check(path: Path, name: str, logits: np.ndarray, rows: int, num_classes: int) -> np.ndarray:
    """Checks logits [rows, num_classes] and returns them as float32."""
    if logits.dtype.kind not in "uif" or logits.ndim != 2:
        raise InputError(
            f"{path}: {name} must be numbers [N, K]; got {logits.dtype} {list(logits.shape)}: one row per example"
        )
    if len(logits) != rows:
        raise InputError(
            f"{path}: {name} must have one row per example, {rows}; got {len(logits)}: run the teacher on this data set"
        )
    if logits.shape[1] != num_classes:
        raise InputError(
            f"{path}: {name} must have one column per class, {num_classes}; got {logits.shape[1]}: "
            "use a teacher of these classes"
        )
    with np.errstate(over="ignore"):  # float64 may overflow; the check below finds it
        logits = logits.astype(np.float32)
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{path}: {name} must be finite; got nan or infinity in row {int(finite.argmin())}: "
            "check the teacher and the scale of its inputs"
        )
    return logits


def save_logits(path: str | Path, logits: np.ndarray, fingerprint: str) -> None:
    """Saves logits [N, K] with the fingerprint of their data set, atomically."""
    with atomic_write(Path(path).expanduser()) as file:
        np.savez(file, logits=np.asarray(logits, np.float32), fingerprint=np.array(fingerprint))
