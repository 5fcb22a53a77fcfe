"""What images are made into, as a source's options say."""

import re
from collections.abc import Callable
from typing import NamedTuple

from ev3_distill.errors import InputError

_OPTION = re.compile(r"(?P<place>.*),(?P<name>\w+)=(?P<value>[^,/]*)")
_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


class Form(NamedTuple):
    """Size and channels of all images of a source."""

    size: tuple[int, int] | None = None  # height and width; none: as they are
    channels: int = 0  # 1 or 3; 0: as they are


def parsed(place: str, exists: Callable[[str], bool]) -> tuple[str, Form]:
    """Takes the options off a place: `DIR,size=32x48,channels=1`.

    Args:
      place: with or without options.
      exists: whether a place is there as it stands, commas and all; then it has no options.

    Raises:
      InputError: an option is unknown, or its value is.
    """
    options: dict[str, str] = {}
    while not exists(place) and (match := _OPTION.fullmatch(place)):
        place, options = match["place"], {match["name"]: match["value"]} | options
    size, channels = options.pop("size", ""), options.pop("channels", "0")
    if options:
        raise InputError(f"the options of a source of images are size and channels; got {min(options)}: try size=32")
    if channels not in ("0", "1", "3"):
        raise InputError(f"channels of a source's images is 1 or 3; got '{channels}': leave it out to keep them")
    sides = _SIZE.fullmatch(size)
    if size and not (sides and int(sides[1]) and int(sides[2] or 1)):
        raise InputError(f"size of a source's images is a height and a width; got '{size}': try 32 or 32x48")
    return place, Form((int(sides[1]), int(sides[2] or sides[1])) if sides else None, int(channels))
