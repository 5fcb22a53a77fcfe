"""What every source delivers: examples with or without labels, and what names them."""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable

import numpy as np

from ev3_distill.data.sources.row_file import RowFile, in_chunks

MEMORY = 1 << 30
"""Bytes up to which inputs are kept in memory, where nothing else is said."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples on the host, with labels or without."""

    inputs: np.ndarray | RowFile  # [N, ...] uint8 (means x / 255) or float32; a RowFile stays on disk
    labels: np.ndarray  # [N] int32, -1 where there is none
    num_classes: int  # 0 where nothing is labelled and no names are known
    class_names: tuple[str, ...]
    test_rows: np.ndarray | None  # rows that the source has set apart as test
    source: str
    fingerprint: str  # sha256 of all that the arrays follow from, in hexadecimal
    groups: np.ndarray | None = None  # [N] int32, the subgroup of each example, where the source tells any
    group_names: tuple[str, ...] = ()


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _tell_nobody(done: int, total: int) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Reading:
    """How to read a source, whichever kind it is."""

    memory: int = MEMORY
    """Bytes up to which inputs are kept in memory; larger ones stay on disk."""
    skip_corrupt: bool = False
    """Whether to leave out examples that cannot be read, and say so, instead of refusing them all."""
    warn: Callable[[str], None] = _warn
    """Hears what the user should know though it is no error."""
    tell: Callable[[int, int], None] = _tell_nobody
    """Hears of progress: (done, total)."""


def fingerprint(
    inputs: np.ndarray | RowFile, labels: np.ndarray, test_rows: np.ndarray | None, groups: np.ndarray | None = None
) -> str:
    """The SHA-256 of arrays, in hexadecimal; the same in memory and on disk.

    Args:
      inputs: [N, ...].
      labels: [N].
      test_rows: [M], or none.
      groups: [N], or none.
    """
    digest = hashlib.sha256()
    for array in (inputs, labels, test_rows, groups):
        if array is not None:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            for chunk in in_chunks(array):
                digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()
