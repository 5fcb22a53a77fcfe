"""The pixels of one image, from the bytes of its file."""

import functools
import io
from typing import TYPE_CHECKING

import numpy as np

from ev3_distill.data.sources.image_options import Form

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # none that would run a program, as EPS does
_GREY = ("1", "L", "LA", "La")
_WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class Unreadable(Exception):
    """An example that cannot be read; the message says why, in a few words."""


def pixels(content: bytes, form: Form) -> np.ndarray:
    """Decodes an image.

    Args:
      content: of its file.
      form: that it shall have.

    Returns:
      [H, W, 1] if it is grey, [H, W, 3] if it is coloured, uint8. Alpha is dropped, 16 bits become 8.

    Raises:
      Unreadable: it is damaged, or no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            shown = _in_mode(image, form.channels)
            if form.size and shown.size != form.size[::-1]:
                shown = shown.resize(form.size[::-1], Image.Resampling.BILINEAR)
            array = np.asarray(shown)  # decodes
    except (MemoryError, Unreadable):
        raise
    except UnidentifiedImageError:
        raise Unreadable("empty" if not content else "not an image of a known format") from None
    except Exception as error:  # a decoder may raise anything at damaged bytes
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None
    return array[..., None] if array.ndim == 2 else array


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow was built with."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _in_mode(image: "Image.Image", channels: int) -> "Image.Image":
    """As 8-bit grey or RGB, whichever loses nothing unless the number of channels is given."""
    if image.mode in _WIDE:
        image = _narrowed(image)
    if image.mode == "F":
        raise Unreadable("its pixels are floats: save it with 8 bits")
    grey = image.mode in _GREY or (image.mode == "P" and _is_grey(image.getpalette()))
    mode = "L" if channels == 1 or (grey and not channels) else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _is_grey(palette: list[int] | None) -> bool:
    colours = np.array(palette or [0, 0, 0]).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _narrowed(image: "Image.Image") -> "Image.Image":
    """16 bits to 8: 65,535 becomes 255."""
    from PIL import Image

    wide = np.asarray(image).astype(np.int64)
    if wide.size and not 0 <= wide.min() <= wide.max() < 2**16:
        raise Unreadable("its pixels have more than 16 bits: save it with 8")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
