"""Columns of float64 or wide integers that float32 cannot resolve: near 1.7e9, neighboring float32 numbers are 128 apart."""

from collections.abc import Sequence

import numpy as np

from ev3_distill.errors import InputError

STEPS = 16  # float32 numbers within the spread of a column, below which it is refused
SAMPLE = 10_000  # rows that are looked at
_LISTED = 3  # columns in the error


class ResolutionCheck:
    """Collects every k-th row of an array, about 10,000 in all, and refuses columns whose differences float32 would lose."""

    def __init__(self, dtype: np.dtype, shape: Sequence[int], name: str):
        """Takes the dtype and shape of an array [N, ...], and its name for errors. Images are not checked."""
        exact = dtype.itemsize < 4 or dtype == np.float32 or dtype.kind == "b"
        self._every = 0 if exact or len(shape) != 2 else -(-shape[0] // SAMPLE)
        self._name, self._next = name, 0
        self._rows: list[np.ndarray] = []

    def add(self, chunk: np.ndarray) -> None:
        """Takes the next rows [n, F]."""
        if self._every:
            rows = chunk[self._next :: self._every]
            self._rows.append(rows.astype(np.float64))
            self._next += len(rows) * self._every - len(chunk)

    def refuse_lost_columns(self) -> None:
        """Raises InputError if a column has too few float32 numbers within its spread.

        The spread is the distance between the quartiles, or the standard deviation where these are equal.
        """
        if not self._rows:
            return
        rows = np.concatenate(self._rows)
        low, middle, high = np.quantile(rows, (0.25, 0.5, 0.75), axis=0)
        spread = np.where(high > low, high - low, rows.std(axis=0))
        steps = np.spacing(np.minimum(np.abs(middle), np.finfo(np.float32).max).astype(np.float32)).astype(np.float64)
        lost = np.flatnonzero((spread < STEPS * steps) & (rows.min(0) < rows.max(0)))
        if len(lost):
            columns = [f"column {i} ({spread[i]:.3g} wide at {middle[i]:.10g})" for i in lost[:_LISTED]]
            more = [f"{len(lost) - _LISTED} more"] if len(lost) > _LISTED else []
            first = lost[0]
            raise InputError(
                f"{self._name} become float32, which must resolve every column: its numbers are {steps[first]:.3g} apart "
                f"near {middle[first]:.10g}; got {', '.join([*columns, *more])}: subtract a constant from such a column "
                f"before you save it, as in inputs[:, {first}] -= {np.round(middle[first]):.0f}, and add it again in the "
                "teacher"
            )
