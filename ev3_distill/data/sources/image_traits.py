"""What the files of a source of images have in common that a user should know: transparency, turned photos, unused bits."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.data.sources.image_depth import MAX_BITS
from ev3_distill.data.sources.image_options import ImageOptions
from ev3_distill.data.sources.row_cache import Notes

_UNUSED_BITS = 2  # of 16: fewer may be dark pictures


class Traits(NamedTuple):
    """What is noteworthy about one image: four flags and a number."""

    transparent: bool = False  # composited on the background
    turned: bool = False  # upright by its EXIF orientation
    frames: bool = False  # has more than the one that is read
    scaled: bool = False  # from another number of bits than 8 and 16
    maximum: int = -1  # value in a 16-bit file; -1 for other files


class Decoded(NamedTuple):
    """One image."""

    pixels: np.ndarray  # [H, W, 1] or [H, W, 3] uint8
    traits: Traits


class TraitsRecord:
    """The traits of all images of a source."""

    def __init__(self, n: int, options: ImageOptions):
        self._options = options
        self._flags = np.zeros((n, 4), bool)
        self._maxima = np.full(n, -1)

    def add(self, index: int, decoded: Decoded) -> np.ndarray:
        """Records the traits of an image, and returns its pixels. Several threads may call it."""
        self._flags[index], self._maxima[index] = decoded.traits[:4], decoded.traits.maximum
        return decoded.pixels

    def notes(self) -> Notes:
        """For the cache: `decoding` has the options that made a difference, `images` number and first of the noteworthy."""
        options, seen = self._options, {name: self._flags[:, i] for i, name in enumerate(Traits._fields[:4])}
        seen["deep"] = self._maxima >= 0
        images = {name: [int(flags.sum()), int(flags.argmax())] for name, flags in seen.items() if flags.any()}
        if "deep" in images:
            images["deep"][1] = int(self._maxima.argmax())
        values: dict[str, tuple[str, Any]] = {
            "transparent": ("background", options.color),
            "turned": ("orientation", "apply"),
            "scaled": ("bits", options.bits),
        }
        decoding = dict(value for trait, value in values.items() if trait in images)
        return {"decoding": decoding, "images": images, "maximum": int(self._maxima.max(initial=-1))}


def warn_of_traits(
    notes: Notes, names: Sequence[str], place: str, options: ImageOptions, warn: Callable[[str], None]
) -> None:
    """Warns of what the user may have meant otherwise and did not decide by an option.

    Args:
      notes: of `TraitsRecord`.
      names: of all images.
      place: of the source, for messages.
      options: of the source.
      warn: called with each warning.
    """
    images = notes["images"]
    if "transparent" in images and not options.background:
        count, first = images["transparent"]
        warn(
            f"{place}: {count:,} of {len(names):,} images have transparent pixels, such as {names[first]}; they are drawn on "
            "white: ,background=white after the source confirms that, ,background=black or ,background=RRGGBB changes it"
        )
    if "frames" in images:
        count, first = images["frames"]
        warn(f"{place}: {count:,} images have several frames, such as {names[first]}; the first one is used")
    maximum = notes["maximum"]
    if (
        "deep" in images
        and not options.bits
        and not notes["decoding"].get("bits")
        and maximum < 2 ** (MAX_BITS - _UNUSED_BITS)
    ):
        bits = max(8, int(maximum).bit_length())
        bits += bits % 2
        count, first = images["deep"]
        warn(
            f"{place}: {count:,} images have 16 bits, and their largest value is {maximum:,} of 65,535, in {names[first]}: "
            f"most levels are lost in the conversion to 8 bits. ,bits={bits} after the source scales 0 to {2**bits - 1:,}; "
            ",bits=16 confirms the present scale"
        )
