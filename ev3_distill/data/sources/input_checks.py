"""Warns of inputs that are read correctly and yet are probably not what the user means."""

import math
from collections.abc import Callable

import numpy as np

from ev3_distill.data.sources.row_file import RowFile

_LOOKED_AT = 2000  # examples
_CHUNK = 1 << 20  # numbers looked at at a time
_ALARMING = 0.1  # share of blank images
_BYTES = 32  # floats from 0 that exceed this are bytes rather than scaled pixels


def check_inputs(inputs: np.ndarray | RowFile, source: str, warn: Callable[[str], None]) -> None:
    """Looks at some examples: all alike, blank images, and float images with the values of bytes.

    Args:
      inputs: [N, ...] uint8 or float32.
      source: for messages.
      warn: called with each warning.
    """
    n = len(inputs)
    rows = np.linspace(0, n - 1, min(n, _LOOKED_AT)).astype(int)
    first, size = np.asarray(inputs[:1]).ravel(), math.prod(inputs.shape[1:])
    alike, blank, low, high = True, 0, math.inf, -math.inf
    for start in range(0, len(rows), step := max(1, _CHUNK // max(1, size))):
        sample = np.asarray(inputs[rows[start : start + step]]).reshape(-1, size)
        alike = alike and bool((sample == first).all())
        blank += int((sample == sample[:, :1]).all(axis=1).sum())
        low, high = min(low, float(sample.min())), max(high, float(sample.max()))
    among = f"{len(rows):,} examples" if len(rows) == n else f"{len(rows):,} of {n:,} examples"
    if n > 1 and alike:
        warn(f"{source}: all of {among} are the same, so nothing can be learned: check the inputs")
        return
    if len(inputs.shape) != 4:
        return
    if blank >= _ALARMING * len(rows) and size > 1:
        warn(f"{source}: {blank:,} of {among} are blank, one value in all pixels: check the images")
    if inputs.dtype != np.uint8 and low >= 0 and high > _BYTES:
        warn(
            f"{source}: images of floats are used as they are; got values from {low:.6g} to {high:.6g}: "
            "divide them by their largest possible value, or save bytes as uint8"
        )
