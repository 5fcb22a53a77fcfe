"""Compiled programs that outlive a process: JAX's persistent compilation cache, in the cache directory of this tool.

JAX writes its files in place: a killed process leaves half a file, which is neither read nor replaced. `Store` replaces
JAX's own one. It renames complete files, each with a digest that is verified before the program in it is loaded.
Programs are machine code, so only the user may have access to the directory.

A function of JAX that is not public is replaced, the one that opens a store. Where JAX does not have it, nothing is stored.
"""

import contextlib
import functools
import hashlib
import os
import platform
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib

from ev3_distill.runtime.cpu import cores
from ev3_distill.runtime.files import cache_root

try:
    from jax._src import compilation_cache
    from jax._src.compilation_cache_interface import CacheInterface

    OPEN = compilation_cache.get_file_cache
except (ImportError, AttributeError):  # another version of JAX
    compilation_cache, CacheInterface = None, object  # type: ignore[assignment, misc]

FOLDER = "compiled"  # in the cache directory
LIMIT = 1 << 30  # bytes of all versions together; a command that begins deletes what was not used for longest
STALE_S = 3600.0  # after this, a temporary file belongs to a process that was killed
FAILURES = "Error (reading|writing) persistent compilation cache entry for "  # JAX warns and compiles
DIGEST_BYTES = hashlib.sha256().digest_size
PROCESSOR = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")  # lines of /proc/cpuinfo
NAME_CHARS = 200  # of a key, from its end, where its hash is


class Store(CacheInterface):
    """Compiled programs in a directory, safe beside other processes and after kills.

    A file is the SHA-256 of its content, then the content. A damaged file is deleted, and a failure to read or write is a
    miss: the program is then compiled. Reading renews the modification time, by which `trim` deletes.

    Attributes:
      reads: programs that JAX asked for.
      hits: those that were in the store.
    """

    def __init__(self, directory: Path):
        self.reads = self.hits = 0
        self._path = directory

    def get(self, key: str) -> bytes | None:
        """The value of a key; None if there is none."""
        self.reads += 1
        path = self._file(key)
        try:
            content = path.read_bytes()
            if hashlib.sha256(content[DIGEST_BYTES:]).digest() != content[:DIGEST_BYTES]:
                path.unlink()
                return None
            os.utime(path)
        except OSError:
            return None
        self.hits += 1
        return content[DIGEST_BYTES:]

    def put(self, key: str, value: bytes) -> None:
        """Stores a value, in place of one that could not be loaded."""
        with contextlib.suppress(OSError), _replacing(self._file(key)) as file:
            file.write(hashlib.sha256(value).digest())
            file.write(value)

    def _file(self, key: str) -> Path:
        return self._path / key[-NAME_CHARS:]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """As `files.atomic_write`, for several threads and without syncing: a digest finds what a crash of the machine loses."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def start() -> str:
    """Stores compiled programs from now on, unless JAX_COMPILATION_CACHE_DIR names a place of the user's own.

    Call it before the first program is compiled. In several processes that share one run, stored programs were seen to
    hang, so do not call it there.

    Returns:
      Why programs are not stored, or "".
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None or store() is not None:
        return ""
    if compilation_cache is None:
        return f"jax {jax.__version__} does not allow it"
    root = cache_root() / FOLDER
    if reason := make_private(root):
        return reason
    trim(root)
    directory = root / version()
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        return str(error)
    _install(Store(directory))
    return ""


def store() -> Store | None:
    """The store that `start` has opened in this process, if any."""
    return _OPENED[0] if _OPENED else None


def usage() -> dict[str, int]:
    """How many programs this process has needed so far, and how many of them were stored; empty without a store."""
    return {"programs": _OPENED[0].reads, "from_cache": _OPENED[0].hits} if _OPENED else {}


def trim(root: Path, limit: int = LIMIT) -> None:
    """Deletes the files that were not used for longest until those in `root` have at most `limit` bytes.

    Other processes may read, write and trim at the same time: a file that is gone is compiled again.
    """
    files, now = [], time.time()
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if path.suffix == ".tmp" and now - status.st_mtime > STALE_S:
                path.unlink()
            else:
                files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


@functools.cache
def version() -> str:
    """Name of the directory for this jaxlib, these XLA flags and this processor. JAX's keys contain the compiler options."""
    try:
        processor, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
        facts = [line for line in processor.splitlines() if line.startswith(PROCESSOR)]
    except OSError:
        facts = [platform.processor()]
    facts += [platform.machine(), str(cores()), os.environ.get("XLA_FLAGS", ""), jax.__version__]
    return f"{jaxlib.__version__}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


_OPENED: list[Store] = []


def make_private(root: Path) -> str:
    """Creates a directory that only its owner may use; returns why it cannot be used, or ""."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
    except OSError as error:
        return str(error)
    if not stat.S_ISDIR(status.st_mode):
        return f"{root} is a link"
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        return f"{root} belongs to another user"
    if status.st_mode & 0o077:
        return f"other users have access to {root}: delete it"
    return ""


def _install(opened: Store) -> None:
    _OPENED.append(opened)
    compilation_cache.get_file_cache = lambda path: (opened, path) if path == str(opened._path) else OPEN(path)
    warnings.filterwarnings("ignore", FAILURES, UserWarning, r"jax\._src\.compiler")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:  # XLA would write files of its own
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_compilation_cache_dir", str(opened._path))
