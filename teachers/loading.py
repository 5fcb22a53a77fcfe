"""Where a teacher's bytes are: the file behind the text that a user gave, and the packages that read it."""

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ev3_distill.errors import InputError, summary


def file_and_names(place: str, *, kind: str) -> tuple[Path, tuple[str, ...]]:
    """Splits `FILE#NAME,NAME` into a file that is there and names of outputs.

    Raises:
      InputError: no such file.
    """
    text, _, names = place.partition("#")
    path = Path(text).expanduser()
    if not text or not path.is_file():
        raise InputError(
            f"{kind}:FILE needs a file; got '{text}', which does not exist or is not a file: check the path"
        )
    return path, tuple(name for name in names.split(",") if name)


def package(name: str, *, kind: str, install: str) -> Any:
    """The package of that name.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{kind} teachers need the package {name}; got {summary(error)}: pip install '{install}'"
        ) from None


def digest_of(parts: Sequence[str | bytes]) -> str:
    """The SHA-256 of parts, none of which can run into the next, in hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()
