"""Files: atomic writes, content digests and the cache directory that all runs share."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_root() -> Path:
    """Directory of the cache.

    The environment variable EV3_DISTILL_CACHE names it. The default is `ev3-distill` in the user's cache directory.
    """
    if directory := os.environ.get("EV3_DISTILL_CACHE"):
        return Path(directory).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ev3-distill"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` when the block ends.

    Readers see the old file or the complete new one. The content is synced to disk first. If the block raises, `path` stays
    as it was.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary directory that is renamed to `path` when the block ends, and removed if the block raises.

    Args:
      path: of the directory; its parents are created.
      overwrite: whether to replace an existing directory at `path`, deleted just before the rename. Then this process is
        the only writer, so temporary directories that killed processes left are deleted too.

    Raises:
      OSError: `path` is a non-empty directory and `overwrite` is false.
    """
    temporary = _temporary(path)
    for stale in path.parent.glob(f".{path.name}.*.tmp") if overwrite else [temporary]:
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if overwrite:
            shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Syncs the entries of a directory to disk. `atomic_write` syncs the content of a file, not its name."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of the content of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary(path: Path) -> Path:
    """A name in the same directory, so that the rename is atomic; unique to this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
