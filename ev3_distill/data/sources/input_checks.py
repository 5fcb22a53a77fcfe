"""Warns of inputs that are read correctly and yet are probably not what the user means."""

from collections.abc import Callable

import numpy as np

from ev3_distill.data.sources.row_file import RowFile

_LOOKED_AT = 2000  # examples
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
    sample = np.asarray(inputs[rows]).reshape(len(rows), -1)
    among = f"{len(rows):,} examples" if len(rows) == n else f"{len(rows):,} of {n:,} examples"
    if n > 1 and (sample == sample[:1]).all():
        warn(f"{source}: all of {among} are the same, so nothing can be learned: check the inputs")
        return
    if len(inputs.shape) != 4:
        return
    blank = int((sample == sample[:, :1]).all(axis=1).sum())
    if blank >= _ALARMING * len(rows) and sample.shape[1] > 1:
        warn(f"{source}: {blank:,} of {among} are blank, one value in all pixels: check the images")
    if inputs.dtype != np.uint8 and sample.min() >= 0 and sample.max() > _BYTES:
        warn(
            f"{source}: images of floats are used as they are; got values from {sample.min():.6g} to {sample.max():.6g}: "
            "divide them by their largest possible value, or save bytes as uint8"
        )
