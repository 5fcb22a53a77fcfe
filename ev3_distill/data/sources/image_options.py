"""Options of a source of images: how their pixels become arrays."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ev3_distill.data.sources.place_options import split_options
from ev3_distill.errors import InputError, check

IGNORE = "ignore"

_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")
_COLORS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
_DEFAULT_BACKGROUND = "white"
_MIN_BITS, _MAX_BITS = 8, 16


class ImageOptions(NamedTuple):
    """How the pixels of all images of a source become arrays."""

    size: tuple[int, int] | None = None  # height and width; None: unchanged
    channels: int = 0  # 1 or 3; 0: unchanged
    background: str = ""  # behind transparent pixels: a color or `ignore`; empty: white, with a warning
    bits: int = 0  # used by the values of 16-bit files; 0: all 16, with a warning if few of them occur
    orientation: str = ""  # in the EXIF data: `apply` or `ignore`; empty: apply

    @property
    def form(self) -> tuple[tuple[int, int] | None, int]:
        """What determines the shape of all images."""
        return self.size, self.channels

    def as_stored(self) -> "ImageOptions":
        """Ignores transparency and orientation where the source does not decide."""
        return self._replace(
            background=self.background or IGNORE, bits=self.bits or _MAX_BITS, orientation=self.orientation or IGNORE
        )

    @property
    def color(self) -> tuple[int, int, int] | None:
        """The background in red, green and blue; None if transparency is ignored."""
        name = self.background or _DEFAULT_BACKGROUND
        if name == IGNORE:
            return None
        return _COLORS[name] if name in _COLORS else tuple(bytes.fromhex(name))  # type: ignore[return-value]


def parse_place(place: str, exists: Callable[[str], bool]) -> tuple[str, ImageOptions]:
    """Separates the options from a place, as in `DIR,size=32x48,channels=1`.

    Args:
      place: with or without options.
      exists: whether a place exists under its full name, commas included; such a place has no options.

    Raises:
      InputError: an unknown option or a bad value.
    """
    place, values = split_options(place, exists)
    if unknown := sorted(values.keys() - set(ImageOptions._fields)):
        raise InputError(
            f"the options of a source of images are {', '.join(ImageOptions._fields)}; got {unknown[0]}: try size=32"
        )
    return place, ImageOptions()._replace(**{name: _PARSERS[name](value) for name, value in values.items()})


def _size(value: str) -> tuple[int, int] | None:
    sides = _SIZE.fullmatch(value)
    ok = bool(not value or (sides and int(sides[1]) and int(sides[2] or 1)))
    check(ok, "size of a source of images is a height and a width", f"'{value}'", "try 32 or 32x48")
    return (int(sides[1]), int(sides[2] or sides[1])) if sides else None


def _channels(value: str) -> int:
    check(value in ("0", "1", "3"), "channels of a source of images is 1 or 3", f"'{value}'", "omit it to keep them")
    return int(value)


def _background(value: str) -> str:
    ok = value in (*_COLORS, IGNORE) or re.fullmatch("[0-9a-fA-F]{6}", value) is not None
    rule = f"background of a source of images is {', '.join(_COLORS)}, RRGGBB or {IGNORE}"
    check(ok, rule, f"'{value}'", "try background=black")
    return value.lower()


def _bits(value: str) -> int:
    ok = value.isdecimal() and len(value) < 3 and _MIN_BITS <= int(value) <= _MAX_BITS
    check(ok, f"bits of a source of images is {_MIN_BITS} to {_MAX_BITS}", f"'{value}'", "try bits=12")
    return int(value)


def _orientation(value: str) -> str:
    ok = value in ("apply", IGNORE)
    check(ok, f"orientation of a source of images is apply or {IGNORE}", f"'{value}'", "omit it to apply EXIF data")
    return value


_PARSERS: dict[str, Callable[[str], Any]] = {
    "size": _size,
    "channels": _channels,
    "background": _background,
    "bits": _bits,
    "orientation": _orientation,
}
