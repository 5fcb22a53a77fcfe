"""Statistics of the explore split by which a student standardizes its inputs.

Vectors [N, F] are standardized by column: mean and standard deviation. So are the channels of sequences [N, L, C]. Images
[N, H, W, C] keep their proportions: uint8 counts as x / 255, and other images whose values exceed 8 in magnitude are divided by
the smallest 2^b - 1 that is not below any of them: 255 for bytes that are saved as int64 or float32, 4095 for 12 bits, 65535
for 16 bits.
"""

from typing import Any

import numpy as np

from ev3_distill.data.sources.row_file import RowFile

LARGEST_UNSCALED = 8.0  # magnitude of pixels; images in [0, 1] and images that are standardized by channel are below it
_CHUNK = 8 << 20  # bytes read at a time


def input_statistics(inputs: np.ndarray | RowFile, rows: np.ndarray) -> dict[str, Any] | None:
    """Mean and scale by which a student standardizes inputs; None if it takes them as they are.

    Args:
      inputs: [N, ...] uint8, which counts as x / 255, or float32.
      rows: positions of the explore split; no other rows are read.

    Returns:
      `mean` and `scale`: lists of float32 numbers, by entry of the last axis, or with one number for all. They are computed in
      float64. A constant column has the scale 1.
    """
    if inputs.ndim == 4:
        return None if inputs.dtype == np.uint8 else _pixel_scale(inputs, rows)
    count, mean, squares = 0, np.zeros(inputs.shape[-1]), np.zeros(inputs.shape[-1])
    for part in _parts(inputs, rows):
        values = part.reshape(-1, part.shape[-1]).astype(np.float64)
        own = values.mean(0)
        total, apart = count + len(values), own - mean
        squares += ((values - own) ** 2).sum(0) + apart**2 * (count * len(values) / total)
        mean += apart * (len(values) / total)
        count = total
    scale = np.sqrt(squares / count).astype(np.float32)
    spread = scale > np.spacing(np.abs(mean).astype(np.float32)) / 16  # else rounding of one constant
    return {"mean": mean.astype(np.float32).tolist(), "scale": np.where(spread, scale, np.float32(1)).tolist()}


def _pixel_scale(inputs: np.ndarray | RowFile, rows: np.ndarray) -> dict[str, Any] | None:
    largest = max(float(np.abs(part).max()) for part in _parts(inputs, rows))
    if largest <= LARGEST_UNSCALED:
        return None
    bits = min(int(np.ceil(np.log2(largest + 1))), 127)
    return {"mean": [0.0], "scale": [float(np.float32(2.0**bits - 1))]}


def _parts(inputs: np.ndarray | RowFile, rows: np.ndarray) -> Any:
    """The rows as float32, in parts."""
    size = max(1, _CHUNK // (4 * int(np.prod(inputs.shape[1:], dtype=np.int64))))
    for start in range(0, len(rows), size):
        part = np.asarray(inputs[rows[start : start + size]])
        yield part.astype(np.float32) / np.float32(255) if part.dtype == np.uint8 else part
