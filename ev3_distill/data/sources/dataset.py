"""What every source returns: examples with or without labels."""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from ev3_distill.data.sources.row_file import RowFile, in_chunks

MEMORY = 1 << 30
"""Default for the maximum bytes of inputs in memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples on the host, with or without labels."""

    inputs: np.ndarray | RowFile  # [N, ...] uint8 (used as x / 255) or float32; a RowFile stays on disk
    labels: np.ndarray  # [N] int32, -1 where an example has none
    num_classes: int  # 0 if no example is labeled and no class names are known
    class_names: tuple[str, ...]
    test_rows: np.ndarray | None  # rows that the source itself reserves for the test split
    source: str
    fingerprint: str  # SHA-256 of everything that the arrays depend on, in hexadecimal
    groups: np.ndarray | None = None  # [N] int32, the subgroup of each example, if the source has any
    group_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # [N] the file of each image in a folder or an archive
    offset: np.ndarray | None = None  # [F] float64, subtracted from vectors [N, F] as saved; None: nothing is

    @property
    def is_labeled(self) -> np.ndarray:
        """Which examples have a label, [N] bool."""
        return self.labels != -1

    @property
    def partly_labeled(self) -> bool:
        """Whether some examples have a label and others have none."""
        return bool(self.is_labeled.any() and not self.is_labeled.all())


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _no_progress(done: int, total: int) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How to read a source, whatever its kind."""

    memory: int = MEMORY
    """Maximum bytes of inputs in memory; larger inputs stay on disk."""
    skip_corrupt: bool = False
    """Whether to skip examples that cannot be read, with a warning, instead of refusing the source."""
    stored_pixels: bool = False
    """Whether transparency and EXIF orientation are ignored where a source does not decide."""
    offset: Sequence[float] | None = None
    """What to subtract from the columns of vectors [N, F] before they become float32; empty: nothing; None: what they need."""
    warn: Callable[[str], None] = _warn
    """Called with each warning."""
    progress: Callable[[int, int], None] = _no_progress
    """Called with the numbers of examples done and in total."""


def fingerprint(
    inputs: np.ndarray | RowFile,
    labels: np.ndarray,
    test_rows: np.ndarray | None,
    groups: np.ndarray | None = None,
    offset: np.ndarray | None = None,
) -> str:
    """The SHA-256 of arrays in hexadecimal, the same for arrays in memory and on disk.

    Args:
      inputs: [N, ...].
      labels: [N].
      test_rows: [M], or None.
      groups: [N], or None.
      offset: [F], or None.
    """
    digest = hashlib.sha256()
    for array in (inputs, labels, test_rows, groups, offset):
        if array is not None:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            for chunk in in_chunks(array):
                digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()
