"""Options of a source of images: size and channels."""

import re
from collections.abc import Callable
from typing import NamedTuple

from ev3_distill.errors import InputError

_OPTION = re.compile(r"(?P<place>.*),(?P<name>\w+)=(?P<value>[^,/]*)")
_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


class ImageOptions(NamedTuple):
    """Size and channels of all images of a source."""

    size: tuple[int, int] | None = None  # height and width; None: unchanged
    channels: int = 0  # 1 or 3; 0: unchanged


def parse_place(place: str, exists: Callable[[str], bool]) -> tuple[str, ImageOptions]:
    """Separates the options from a place, as in `DIR,size=32x48,channels=1`.

    Args:
      place: with or without options.
      exists: whether a place exists under its full name, commas included; such a place has no options.

    Raises:
      InputError: an unknown option or a bad value.
    """
    options: dict[str, str] = {}
    while not exists(place) and (match := _OPTION.fullmatch(place)):
        place, options = match["place"], {match["name"]: match["value"]} | options
    size, channels = options.pop("size", ""), options.pop("channels", "0")
    if options:
        raise InputError(f"the options of a source of images are size and channels; got {min(options)}: try size=32")
    if channels not in ("0", "1", "3"):
        raise InputError(f"channels of a source of images is 1 or 3; got '{channels}': omit it to keep them")
    sides = _SIZE.fullmatch(size)
    if size and not (sides and int(sides[1]) and int(sides[2] or 1)):
        raise InputError(f"size of a source of images is a height and a width; got '{size}': try 32 or 32x48")
    return place, ImageOptions((int(sides[1]), int(sides[2] or sides[1])) if sides else None, int(channels))
