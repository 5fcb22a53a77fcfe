"""Decodes one image from the bytes of its file."""

import functools
import io
from typing import TYPE_CHECKING

import numpy as np

from ev3_distill.data.sources.image_alpha import alpha_of, flatten
from ev3_distill.data.sources.image_depth import MAX_BITS, wide_pixels
from ev3_distill.data.sources.image_options import IGNORE, ImageOptions
from ev3_distill.data.sources.image_traits import Decoded, Traits
from ev3_distill.data.sources.unreadable import Unreadable

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".webp", ".avif", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)

_FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "WEBP",
    "AVIF",
    "GIF",
    "TIFF",
    "PPM",
)  # without those that start a program, such as EPS
_WITH_FRAMES = ("PNG", "WEBP", "AVIF", "GIF", "TIFF")  # photos of phones, JPEG, have other pictures beside the main one
_GRAY_MODES = ("1", "L", "LA", "La")
_ORIENTATION = 0x0112  # tag of EXIF
_EXIF = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where Pillow looks for it


def decode_image(content: bytes, options: ImageOptions) -> Decoded:
    """Decodes an image.

    Transparent pixels are composited on the background, 16 bits become 8, and the EXIF orientation is applied, in this order
    and before the size is changed.

    Args:
      content: of the file.
      options: of the source.

    Returns:
      [H, W, 1] if it is gray, [H, W, 3] if it has color; uint8.

    Raises:
      Unreadable: the content is damaged or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            frames = _has_frames(image)
            converted, traits = _convert_mode(image, content, options)
            turn = None if options.orientation == IGNORE else _turn_of(image)
            if turn is not None:
                converted = converted.transpose(turn)
            if options.size and converted.size != options.size[::-1]:
                converted = converted.resize(options.size[::-1], Image.Resampling.BILINEAR)
            array = np.asarray(converted)  # decodes
    except (MemoryError, Unreadable):
        raise
    except UnidentifiedImageError:
        raise Unreadable("empty" if not content else "not an image of a known format") from None
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None
    traits = traits._replace(frames=frames, turned=turn is not None)
    return Decoded(array[..., None] if array.ndim == 2 else array, traits)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that the installed Pillow supports."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _has_frames(image: "Image.Image") -> bool:
    if image.format not in _WITH_FRAMES:
        return False
    try:
        return getattr(image, "n_frames", 1) > 1
    except Exception:  # damage behind the first frame, which is read nevertheless
        return True


def _turn_of(image: "Image.Image") -> "Image.Transpose | None":
    """What turns an image upright, according to its EXIF data; None if nothing is to be done. TIFF is upright once decoded."""
    from PIL import Image

    if not _EXIF & image.info.keys():
        return None
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data in an intact image
        return None


def _convert_mode(image: "Image.Image", content: bytes, options: ImageOptions) -> tuple["Image.Image", Traits]:
    """Converts to 8-bit gray or RGB; without a number of channels, to the one that loses nothing."""
    from PIL import Image

    wide = wide_pixels(image, content, options.bits)
    image.load()
    alpha = alpha_of(image, wide) if options.color else None
    traits = Traits(transparent=alpha is not None)
    if wide is not None:
        bits = options.bits or wide.bits
        traits = traits._replace(maximum=wide.maximum, scaled=bits != MAX_BITS)
        if wide.values.ndim == 2 or bits != MAX_BITS:  # Pillow has reduced the colors of 16 bits to their high bytes
            image = Image.fromarray(wide.in_bytes(bits))
    if image.mode == "F":
        raise Unreadable("its pixels are floats: save it with 8 bits")
    is_gray = image.mode in _GRAY_MODES or (image.mode == "P" and _has_gray_palette(image.getpalette()))
    if alpha is not None and options.color:
        image = flatten(image, alpha, options.color, is_gray=is_gray)
        is_gray = image.mode == "L"
    mode = "L" if options.channels == 1 or (is_gray and not options.channels) else "RGB"
    return image if image.mode == mode else image.convert(mode), traits


def _has_gray_palette(palette: list[int] | None) -> bool:
    colors = np.array(palette or [0, 0, 0]).reshape(-1, 3)
    return bool((colors == colors[:, :1]).all())
