"""Files: written whole or not at all, named by their content, kept in the cache that all runs share."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_root() -> Path:
    """Where what can be computed again is kept between runs.

    The environment variable EV3_DISTILL_CACHE names it; else it is `ev3-distill` in the user's cache directory.
    """
    if named := os.environ.get("EV3_DISTILL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ev3-distill"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name, synced, when the block ends, and not at all if it raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder, so that the replacement is atomic
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
