"""Pixels of more than 8 bits: their values as saved, and their conversion to 8 bits."""

import io
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from ev3_distill.data.sources.unreadable import Unreadable

if TYPE_CHECKING:
    from PIL import Image

MAX_BITS = 16

_GRAY_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_COLOR_MODES = ("RGB", "RGBA")
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # by byte order: B is big-endian


class WidePixels:
    """The pixels of an image of more than 8 bits.

    Attributes:
      values: [H, W] (gray) or [H, W, 3], as saved.
      bits: that the file says are used.
    """

    def __init__(self, values: np.ndarray, bits: int):
        self.values, self.bits = values, bits

    @property
    def maximum(self) -> int:
        """The largest value."""
        return int(self.values.max(initial=0))

    def in_bytes(self, bits: int) -> np.ndarray:
        """The values as uint8; the largest one that fits into `bits` becomes 255.

        Raises:
          Unreadable: a value needs more bits.
        """
        bits = bits or self.bits
        largest = 2**bits - 1
        if self.maximum > largest:
            raise Unreadable(f"its largest value, {self.maximum}, has more than {bits} bits")
        scaled: np.ndarray = ((self.values * 255 + largest // 2) // largest).astype(np.uint8)
        return scaled


def wide_pixels(image: "Image.Image", content: bytes, bits: int) -> WidePixels | None:
    """The pixels of an image of more than 8 bits; None if it has 8.

    Args:
      image: opened and not yet decoded.
      content: of its file.
      bits: that the user says are used; 0 without a word.

    Raises:
      Unreadable: the image has more than 16 bits, or `bits` is of no use for its format.
    """
    modes = [str(_raw_mode(tile)) for tile in getattr(image, "tile", ())]
    if image.mode in _GRAY_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() < 2**MAX_BITS:
            raise Unreadable("its pixels have more than 16 bits: save it with 8")
        return WidePixels(values, 12 if any(";12" in mode for mode in modes) else MAX_BITS)
    if not any(";16" in mode for mode in modes):
        return None
    plain = image.mode in _COLOR_MODES and all(_is_plain(mode, image.mode) for mode in modes)
    if not plain and bits:
        raise Unreadable(f"`bits` cannot be applied to its kind of 16-bit pixels, {modes[0]}: save it as gray or RGB")
    return WidePixels(_both_bytes(image, content)[..., :3], MAX_BITS) if plain else None


def _is_plain(raw_mode: str, mode: str) -> bool:
    name, _, order = raw_mode.partition(";16")
    return name == mode and order in _OTHER_BYTE


def _both_bytes(image: "Image.Image", content: bytes) -> np.ndarray:
    """16-bit colors [H, W, C]. Pillow decodes the high bytes alone; read in the other byte order, the low ones."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=[str(image.format)]) as other:
        other.tile = [_in_other_order(tile) for tile in other.tile]
        low = np.asarray(other)
    return np.asarray(image).astype(np.int64) * 256 + low


def _raw_mode(tile: Any) -> Any:
    return tile.args if isinstance(tile.args, str) or not tile.args else tile.args[0]


def _in_other_order(tile: Any) -> Any:
    mode = str(_raw_mode(tile))
    swapped = mode[:-1] + _OTHER_BYTE[mode[-1]]
    return tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:]))
