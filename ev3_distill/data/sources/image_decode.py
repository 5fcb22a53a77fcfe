"""Decodes one image from the bytes of its file."""

import functools
import io
from typing import TYPE_CHECKING

import numpy as np

from ev3_distill.data.sources.image_options import ImageOptions

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # without those that start a program, such as EPS
_GRAY_MODES = ("1", "L", "LA", "La")
_16_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class Unreadable(Exception):
    """An example cannot be read; the message gives a short reason."""


def decode_image(content: bytes, options: ImageOptions) -> np.ndarray:
    """Decodes an image.

    Args:
      content: of the file.
      options: size and channels of the result.

    Returns:
      [H, W, 1] if it is gray, [H, W, 3] if it has color; uint8. Alpha is dropped, 16 bits become 8.

    Raises:
      Unreadable: the content is damaged or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            converted = _convert_mode(image, options.channels)
            if options.size and converted.size != options.size[::-1]:
                converted = converted.resize(options.size[::-1], Image.Resampling.BILINEAR)
            array = np.asarray(converted)  # decodes
    except (MemoryError, Unreadable):
        raise
    except UnidentifiedImageError:
        raise Unreadable("empty" if not content else "not an image of a known format") from None
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None
    return array[..., None] if array.ndim == 2 else array


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that the installed Pillow supports."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _convert_mode(image: "Image.Image", channels: int) -> "Image.Image":
    """Converts to 8-bit gray or RGB; without a number of channels, to the one that loses nothing."""
    if image.mode in _16_BIT_MODES:
        image = _to_8_bits(image)
    if image.mode == "F":
        raise Unreadable("its pixels are floats: save it with 8 bits")
    is_gray = image.mode in _GRAY_MODES or (image.mode == "P" and _has_gray_palette(image.getpalette()))
    mode = "L" if channels == 1 or (is_gray and not channels) else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _has_gray_palette(palette: list[int] | None) -> bool:
    colors = np.array(palette or [0, 0, 0]).reshape(-1, 3)
    return bool((colors == colors[:, :1]).all())


def _to_8_bits(image: "Image.Image") -> "Image.Image":
    """Scales 16 bits to 8: 65,535 becomes 255."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() < 2**16:
        raise Unreadable("its pixels have more than 16 bits: save it with 8")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
