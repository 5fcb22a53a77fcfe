"""What the shape and values of an array of inputs say about its meaning: layout of images, token ids."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ev3_distill.errors import InputError

LAYOUTS = ("nhwc", "nchw")
TOKEN_NAMES = ("input_ids", "token_ids", "tokens", "ids")
TOKEN_ROWS = 1000
"""Rows that are enough to recognize token ids."""

_CHANNELS = (1, 3, 4)  # gray, RGB, RGBA: the sizes that tell an axis of channels from one of pixels
_PIXELS = 5  # smallest height and width of what is recognized as an image
_IDS = 256  # a vocabulary has more; fewer may be bytes
_COLUMNS = 8  # shortest texts that are recognized
_PAIRS = 64  # pairs of columns that are looked at


def check_layout(name: str, shape: tuple[int, ...], layout: str, path: Path) -> bool:
    """Whether images have their channels first.

    Args:
      name: of the array.
      shape: of the array, N first.
      layout: that the user named; empty without one.
      path: of the file, for messages.

    Raises:
      InputError: a layout for something else than images, or images whose channels seem to be first and no layout.
    """
    if layout and len(shape) != 4:
        raise InputError(
            f"{path}: layout is an option of images with 4 axes; got {name} {list(shape)}: remove it from the source"
        )
    if not layout and len(shape) == 4 and _seems_nchw(shape):
        n, c, h, w = shape
        raise InputError(
            f"{path}: images must be [N, H, W, C]; got {name} {list(shape)}, which looks like [N, C, H, W]: name the source "
            f"npz:{path},layout=nchw; if it does hold {n} images of {c}x{h} with {w} channels, ,layout=nhwc"
        )
    return layout == "nchw"


def _seems_nchw(shape: tuple[int, ...]) -> bool:
    return shape[1] in _CHANNELS and min(shape[2:]) >= _PIXELS


def warn_of_token_ids(name: str, rows: np.ndarray, warn: Callable[[str], None]) -> None:
    """Warns if rows of integers look like token ids.

    Args:
      name: of the file and array, for the message.
      rows: [n, L] integers, in any dtype; `TOKEN_ROWS` of them are enough.
      warn: called with the warning.
    """
    sample = rows.astype(np.float64)
    if _seem_token_ids(sample):
        warn(
            f"{name} looks like token ids: [N, {rows.shape[1]}] integers from 0 to {int(sample.max())} whose columns share "
            "their values. A student reads them as quantities and learns little: save their embeddings, averaged [N, F] or "
            "as sequences [N, L, C]. Numbers that are quantities can be saved as floats, which avoids this warning"
        )


def _seem_token_ids(sample: np.ndarray) -> bool:
    """Whether all columns [n, L] have about the same wide range of values from 0, and neighbors are unrelated.

    Neighboring pixels, and values of a spectrum or time series, are related; columns of a table differ in range.
    """
    n, columns = sample.shape
    if columns < _COLUMNS or n < _COLUMNS or sample.min() < 0 or sample.max() < _IDS:
        return False
    padding = np.bincount(
        sample[:, -1].astype(np.int64) % (1 << 20)
    ).argmax()  # of texts that end before the last column
    inside = sample != padding
    highest = np.where(inside, sample, 0).max(axis=0)
    used = highest > 0
    if used.sum() < 2 or np.mean(highest[used] >= sample.max() / 4) < 0.5:
        return False
    pairs = np.linspace(0, columns - 2, min(_PAIRS, columns - 1)).astype(int)
    related = [r for j in pairs if (r := _correlation(sample[:, j], sample[:, j + 1], inside[:, j] & inside[:, j + 1]))]
    return not related or float(np.median(np.abs(related))) < 0.5


def _correlation(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """Pearson's; 0 if it is undefined."""
    a, b = a[where], b[where]
    if len(a) < _COLUMNS or not a.std() or not b.std():
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
