"""Warns of inputs that are read correctly and yet are probably not what the user means."""

import math
from collections.abc import Callable

import numpy as np

from ev3_distill.data.sources.row_file import RowFile

_LOOKED_AT = 2000  # examples
_CHUNK = 1 << 20  # numbers looked at at a time
_ALARMING = 0.1  # share of blank images


def check_inputs(inputs: np.ndarray | RowFile, source: str, warn: Callable[[str], None]) -> None:
    """Looks at some examples: whether all are alike, and how many images are blank.

    Args:
      inputs: [N, ...] uint8 or float32.
      source: for messages.
      warn: called with each warning.
    """
    n = len(inputs)
    rows = np.linspace(0, n - 1, min(n, _LOOKED_AT)).astype(int)
    first, size = np.asarray(inputs[:1]).ravel(), math.prod(inputs.shape[1:])
    alike, blank = True, 0
    for start in range(0, len(rows), step := max(1, _CHUNK // max(1, size))):
        sample = np.asarray(inputs[rows[start : start + step]]).reshape(-1, size)
        alike = alike and bool((sample == first).all())
        blank += int((sample == sample[:, :1]).all(axis=1).sum())
    among = f"{len(rows):,} examples" if len(rows) == n else f"{len(rows):,} of {n:,} examples"
    if n > 1 and alike:
        warn(f"{source}: all of {among} are the same, so nothing can be learned: check the inputs")
        return
    if len(inputs.shape) != 4:
        return
    if blank >= _ALARMING * len(rows) and size > 1:
        warn(f"{source}: {blank:,} of {among} are blank, one value in all pixels: check the images")
