"""Columns of float64 or wide integers that float32 cannot resolve: near 1.7e9, neighboring float32 numbers are 128 apart.

From such a column a round constant near its median is subtracted in float64 before it becomes float32. The constants are the
offset of a data set: they are subtracted from all examples that the student gets, and added again for teachers.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ev3_distill.errors import InputError

STEPS = 16  # float32 numbers within the spread of a column, below which it gets an offset
SAMPLE = 10_000  # rows that are looked at
_FAR = 1000  # ratio of the standard deviation of a column and the distance between its quartiles, above which it is refused
_LISTED = 3  # columns in a message


class ColumnSample:
    """Every k-th row of an array, about 10,000 in all."""

    def __init__(self, dtype: np.dtype, shape: Sequence[int]):
        """Takes the dtype and shape of an array [N, ...]; only vectors of types that float32 cannot hold are of interest."""
        exact = dtype.itemsize < 4 or dtype == np.float32 or dtype.kind == "b"
        self.every = 0 if exact or len(shape) != 2 else -(-shape[0] // SAMPLE)  # 0: float32 holds these numbers
        self._next = 0
        self._rows: list[np.ndarray] = []

    def add(self, chunk: np.ndarray) -> None:
        """Takes the next rows [n, F]."""
        rows = chunk[self._next :: self.every]
        with np.errstate(over="ignore"):
            self._rows.append(rows.astype(np.float64))
        self._next += len(rows) * self.every - len(chunk)

    def rows(self) -> np.ndarray:
        """The sample [n, F] float64."""
        return np.concatenate(self._rows)


def find_offset(rows: np.ndarray, name: str, warn: Callable[[str], None]) -> np.ndarray | None:
    """The constants to subtract from columns; tells which columns need one.

    The spread of a column is the distance between its quartiles, or its standard deviation where these are equal. A column
    needs an offset if it varies and fewer than `STEPS` float32 numbers lie within its spread. The offset is the median, rounded
    to the smallest power of ten that is not below the spread.

    Args:
      rows: sample [n, F] float64.
      name: of the array, for messages.
      warn: called with one line if there is such a column.

    Returns:
      The offset [F] float64, 0 for other columns; None if no column needs one.

    Raises:
      InputError: such a column cannot be resolved by a shift.
    """
    with np.errstate(all="ignore"):  # of numbers that are not finite, which the conversion of rows refuses
        low, middle, high = np.quantile(rows, (0.25, 0.5, 0.75), axis=0)
        spread = np.where(high > low, high - low, rows.std(axis=0))
        steps = np.spacing(middle.astype(np.float32)).astype(np.float64)
        lost = (spread < STEPS * np.abs(steps)) & (rows.min(0) < rows.max(0))
    if not lost.any():
        return None
    offset = np.zeros(rows.shape[1])
    for i in np.flatnonzero(lost):
        _check_column(int(i), rows[:, i], float(middle[i]), float(spread[i]), name)
        digits = -int(np.ceil(np.log10(spread[i])))
        offset[i] = float(round(float(middle[i]), digits))
    wide = [f"column {i} ({spread[i]:.3g} wide)" for i in np.flatnonzero(lost)]
    warn(
        f"{name} become float32, which does not resolve {listed(wide)}: subtracting {describe_offset(offset)} first. Teachers "
        "see the values as saved; subtract the same from examples that you give the student yourself"
    )
    return offset


def _check_column(i: int, column: np.ndarray, middle: float, spread: float, name: str) -> None:
    """Raises InputError if float64 does not resolve a column, or if a few values far away would hide what differs in it."""
    if spread < STEPS * np.finfo(np.float32).tiny:
        raise InputError(
            f"{name} become float32, whose numbers are {np.finfo(np.float32).tiny:.2g} or larger; got column {i}, {spread:.3g} "
            "wide: multiply that column by a constant before you save it, and divide it again in the teacher"
        )
    if spread < STEPS * abs(np.spacing(middle)):
        raise InputError(
            f"{name} become float32, after a constant is subtracted in float64; got column {i}, {spread:.3g} wide at "
            f"{middle:.17g}, which float64 does not resolve either: subtract a constant from that column before you save it, "
            "and add it again in the teacher"
        )
    if column.std() > _FAR * spread:
        far = column[np.abs(column - middle).argmax()]
        raise InputError(
            f"{name} become float32, which must resolve every column; got column {i}, {spread:.3g} wide at {middle:.10g}, with "
            f"values as far away as {far:.10g}: if these mean that a value is missing, replace them by {middle:.10g}, and add "
            "a column that is 1 where it is missing"
        )


def describe_offset(offset: Sequence[float] | np.ndarray) -> str:
    """Which constants are subtracted from which columns, in words."""
    offset = np.asarray(offset, np.float64)
    changed = [f"{np.format_float_positional(offset[i], trim='-')} from column {i}" for i in np.flatnonzero(offset)]
    return listed(changed)


def listed(texts: Sequence[str]) -> str:
    """The first texts, and the number of those that are left out."""
    more = [f"{len(texts) - _LISTED} more"] if len(texts) > _LISTED else []
    return ", ".join([*texts[:_LISTED], *more])
