"""Options after the place of a source, as in `DIR,size=32,channels=1`."""

import re
from collections.abc import Callable

_OPTION = re.compile(r"(?P<place>.*),(?P<name>\w+)=(?P<value>[^,/]*)")


def split_options(place: str, exists: Callable[[str], bool]) -> tuple[str, dict[str, str]]:
    """Separates the options from a place.

    Args:
      place: with or without options.
      exists: whether a place exists under its full name, commas included; such a place has no options.

    Returns:
      The place, and the values of its options by name. The last of several values counts.
    """
    options: dict[str, str] = {}
    while not exists(place) and (match := _OPTION.fullmatch(place)):
        place, options = match["place"], {match["name"]: match["value"]} | options
    return place, options
