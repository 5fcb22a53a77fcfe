"""Helpers to load a teacher: its file, the package that reads it, and a digest."""

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ev3_distill.errors import InputError, summary


def split_file_and_outputs(place: str, *, kind: str) -> tuple[Path, tuple[str, ...]]:
    """Splits `FILE#NAME,NAME` into the path of an existing file and the names of outputs.

    Raises:
      InputError: there is no such file.
    """
    text, _, names = place.partition("#")
    path = Path(text).expanduser()
    if not text or not path.is_file():
        raise InputError(
            f"{kind}:FILE needs a file; got '{text}', which does not exist or is not a file: check the path"
        )
    return path, tuple(name for name in names.split(",") if name)


def import_package(name: str, *, kind: str, install: str) -> Any:
    """Imports an optional package.

    Args:
      name: of the package.
      kind: of the teacher that needs it, for the error.
      install: what to pass to `pip install`.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{kind} teachers need the package {name}; got {summary(error)}: pip install '{install}'"
        ) from None


def digest_of(parts: Sequence[str | bytes | memoryview]) -> str:
    """SHA-256 of a sequence of parts, in hexadecimal. Parts are hashed one by one, so their boundaries count."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()
