"""Kernels for convolution and BatchNorm in C++, which this machine compiles once.

XLA:CPU's own convolutions are slow in training steps (see `conv.py`). The files in `kernels/` compute convolutions of float32
images and their gradients, with Winograd's method where it applies, as typed handlers of XLA's foreign function interface.
Programs that call them can be stored in a compilation cache.

A child process compiles the files and compares every handler with NumPy (`compiled_probe.py`), once for each jaxlib, processor
and version of the files; a wrong one could crash it. The library and the answer are stored in the cache directory, which only
its owner may use. Where there is no compiler, or a handler is wrong, `conv.py` uses XLA's own convolutions, and a run says so.

The environment variable CXX names a C++17 compiler; the default is c++, g++, clang++ or the package `ziglang`.
EV3_DISTILL_KERNELS=0 turns the kernels off.
"""

import contextlib
import contextvars
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from ev3_distill.runtime import compile_cache
from ev3_distill.runtime.files import atomic_write, cache_root

HANDLERS = (
    "ev3_convolution",
    "ev3_convolution_x",
    "ev3_convolution_kernel",
    "ev3_depthwise",
    "ev3_depthwise_x",
    "ev3_depthwise_kernel",
    "ev3_channel_sums",
)
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")
SOURCES = pathlib.Path(__file__).parent / "kernels"
PROBE = ("-m", "ev3_distill.students.layers.compiled_probe")
PROBE_S = 300.0  # time limit of the child process; it compiles for about 7 s
FAILED = 3  # exit code of the child process if the kernels do not compile or compute something else
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)  # what wrong code may end in
NO_COMPILER = "no C++ compiler: install g++, or `pip install ziglang`"
TRIED = "a test of the kernels"  # how the reasons begin that a test has found
AVOIDABLE = (TRIED, NO_COMPILER)  # reasons that a run warns of
FOLDER = "kernels"  # in the cache directory


_WITHOUT = contextvars.ContextVar("_WITHOUT", default=False)
_STANDARD = contextvars.ContextVar("_STANDARD", default=False)


@contextlib.contextmanager
def standard_convolutions() -> Iterator[None]:
    """Context in which traced programs use XLA's standard operations, which exporters and other tools know."""
    token = _STANDARD.set(True)
    try:
        yield
    finally:
        _STANDARD.reset(token)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Context in which traced layers use no kernels: XLA cannot split their calls over devices that share a batch."""
    token = _WITHOUT.set(True)
    try:
        yield
    finally:
        _WITHOUT.reset(token)


def standard() -> bool:
    """Whether layers use XLA's standard operations alone: inside `standard_convolutions`, and on accelerators."""
    return _STANDARD.get() or jax.default_backend() != "cpu"


def available() -> bool:
    """Whether convolutions go through the kernels; constant within a process."""
    return not reason()


@functools.cache
def reason() -> str:
    """Why convolutions do not go through the kernels here, or "". Compiles and registers them on the first call."""
    if os.environ.get("EV3_DISTILL_KERNELS", "1") == "0":
        return "EV3_DISTILL_KERNELS=0"
    try:
        if " avx2 " not in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            return "the processor has no AVX2"
    except OSError:
        return "the system does not name its processor"
    if problem := compile_cache.make_private(cache_root() / FOLDER):
        return problem
    if not compiler() and _known() is None:
        return NO_COMPILER
    with _alone():
        if (known := _known()) is None:
            known, certain = _probe()
            if certain:
                _remember(known)
    if not known:
        register(library())
    return known


def can_take(*arrays: jax.Array) -> bool:
    """Whether the kernels compute with these arrays."""
    return (
        not standard() and not _WITHOUT.get() and all(a.dtype == jnp.float32 and a.size for a in arrays) and available()
    )


def call(
    handler: str,
    one: jax.typing.ArrayLike,
    other: jax.typing.ArrayLike,
    shape: Sequence[int],
    window: Sequence[int] = (),
) -> jax.Array:
    """Calls a handler.

    Args:
      handler: one of HANDLERS.
      one: float32 images [B, H, W, C], of inputs or of the output's gradient.
      other: a float32 kernel [kh, kw, C, O], or the output's gradient [B, H', W', O] for the kernel's gradient.
      shape: of the result.
      window: of a convolution: strides of H and W, and paddings before H and W. Those behind follow from the shapes.
    """
    attributes = {"window": np.array(window, np.int64)} if window else {}
    result: jax.Array = jax.ffi.ffi_call(handler, jax.ShapeDtypeStruct(tuple(shape), jnp.float32))(
        one, other, **attributes
    )
    return result


def compiler() -> list[str]:
    """The command of a C++ compiler, or []."""
    if command := os.environ.get("CXX"):
        return shlex.split(command)
    if path := next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None):
        return [path]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else []


def compile_kernels(to: pathlib.Path) -> str:
    """Compiles the library; returns what is wrong, or ""."""
    command = [*compiler(), *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCES / "handlers.cc"), "-o", str(to)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return "" if done.returncode == 0 else f"{command[0]}: {errors[0] if errors else 'no message'}"


def register(path: pathlib.Path) -> None:
    """Loads a library and registers its handlers with JAX."""
    loaded = ctypes.CDLL(str(path))
    for name in HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")


def library() -> pathlib.Path:
    """Where the compiled library is."""
    return _file("so")


def _file(ending: str) -> pathlib.Path:
    return cache_root() / FOLDER / f"{compile_cache.version()}-{_digest()}.{ending}"


@functools.cache
def _digest() -> str:
    """Of the files and how they are compiled."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Lets one process at a time compile, on file systems that can lock."""
    with open(cache_root() / FOLDER / "lock", "wb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _known() -> str | None:
    """The reason that an earlier probe has found, or ""; None if there was none, or if the library is damaged."""
    try:
        answer = json.loads(_file("json").read_text(encoding="utf-8"))
        found, digest = answer["reason"], answer["sha256"]
        if not found and digest != hashlib.sha256(library().read_bytes()).hexdigest():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _probe() -> tuple[str, bool]:
    """Compiles and tests the kernels in a child process, which they may crash.

    Returns:
      Why they do not work, or "", and whether that is certain. A child that was killed, ran out of time or could not start
      proves nothing, so a later process tries again.
    """
    own = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryDirectory(dir=cache_root() / FOLDER, ignore_cleanup_errors=True) as folder:
        path = pathlib.Path(folder, "kernels.so")
        try:
            done = subprocess.run(
                [sys.executable, *PROBE, str(path)],
                env={**own, "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                timeout=PROBE_S,
                check=False,
            )
            if done.returncode == 0:
                os.replace(path, library())
                return "", True
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{TRIED} did not end ({type(error).__name__})", False
    if done.returncode < 0:
        return f"{TRIED} with jaxlib {jaxlib.__version__} crashed", -done.returncode in CRASHES
    lines = done.stderr.strip().splitlines()
    message = lines[-1][:200] if lines else "no message"
    return f"{TRIED} with jaxlib {jaxlib.__version__} failed: {message}", done.returncode == FAILED


def _remember(found: str) -> None:
    """Stores the answer for later processes, if the cache directory can be written."""
    with contextlib.suppress(OSError):
        digest = "" if found else hashlib.sha256(library().read_bytes()).hexdigest()
        with atomic_write(_file("json")) as file:
            file.write(json.dumps({"reason": found, "sha256": digest}).encode())
