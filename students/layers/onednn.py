"""oneDNN's convolution, which x86 builds of jaxlib contain but XLA:CPU does not use by itself.

A custom call makes it available in any jitted program, inside and outside of loops. This is not a public interface: its
configuration has changed between versions of jaxlib, and a wrong one crashes the process. So a child process tries it, once
for each jaxlib and processor (`onednn_probe.py`), and the answer is kept in the cache directory. Where the call does not
work, `conv.py` uses XLA's own convolution, and a run says so.

EV3_DISTILL_ONEDNN=0 turns it off. Programs with such a call are not stored in a compilation cache: XLA would read memory at
random to write one.

Activations are [B, H, W, C]. The call has no derivatives; `conv.py` defines them.
"""

import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

import jax
import jaxlib

from ev3_distill.runtime import compile_cache
from ev3_distill.runtime.files import atomic_write, cache_root

CALL = "__onednn$convolution"
PROBE = ("-m", "ev3_distill.students.layers.onednn_probe")
PROBE_S = 120.0  # time limit of the child process
FAILED = 3  # exit code of the child process if the call does not work
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)  # what a wrong call may end in
TRIED = "a test of oneDNN in"  # how the reasons begin that a test has found
FOLDER = "convolution"  # in the cache directory
Pair = tuple[int, int]


def available() -> bool:
    """Whether convolutions go through oneDNN; constant on one machine."""
    return not reason()


@functools.cache
def reason() -> str:
    """Why convolutions do not go through oneDNN here, or ""."""
    if os.environ.get("EV3_DISTILL_ONEDNN", "1") == "0":
        return "EV3_DISTILL_ONEDNN=0"
    try:
        if " avx2 " not in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            return "the processor has no AVX2"
    except OSError:
        return "the system does not name its processor"
    if not compile_cache.never_store(CALL):
        return f"jax {jax.__version__} would store programs that call it"
    if (known := _known()) is not None:
        return known
    found, certain = _probe()
    if certain:
        _remember(found)
    return found


def _path() -> pathlib.Path:
    return cache_root() / FOLDER / f"{compile_cache.version()}.json"


def _known() -> str | None:
    """The reason that an earlier probe has found, or ""; None if there was none."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _probe() -> tuple[str, bool]:
    """Tries the call in a child process, which a wrong configuration may crash.

    Returns:
      Why it does not work, or "", and whether that is certain. A child that was killed, ran out of time or could not start
      proves nothing, so a later process tries again.
    """
    own = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    try:
        done = subprocess.run(
            [sys.executable, *PROBE],
            env={**own, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{TRIED} jaxlib {jaxlib.__version__} did not end ({type(error).__name__})", False
    if done.returncode == 0:
        return "", True
    if done.returncode < 0:
        return f"{TRIED} jaxlib {jaxlib.__version__} crashed", -done.returncode in CRASHES
    lines = done.stderr.strip().splitlines()
    message = lines[-1][:200] if lines else "no message"
    return f"{TRIED} jaxlib {jaxlib.__version__} failed: {message}", done.returncode == FAILED


def _remember(found: str) -> None:
    """Stores the answer for later processes, if the cache directory can be written."""
    with contextlib.suppress(OSError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(_path()) as file:
            file.write(json.dumps({"reason": found}).encode())


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    pads: Sequence[Pair],
    *,
    strides: Pair = (1, 1),
    dilation: Pair = (1, 1),
    axes: str = "HWIO",
) -> jax.Array:
    """Computes a float32 convolution.

    Args:
      x: [B, H, W, C].
      kernel: with dimensions kh, kw, C and O in the order of `axes`.
      pads: (before, after) for H and W.
      strides: of H and W.
      dilation: of the kernel.
      axes: order of the kernel's axes H, W, I (input channels) and O (output channels).

    Returns:
      [B, H', W', O].

    Raises:
      ValueError: a negative padding, which would crash oneDNN.
    """
    if min(min(pad) for pad in pads) < 0:
        raise ValueError(f"oneDNN needs paddings of at least 0; got {list(pads)}: crop the images instead")
    i, o, *spatial = (axes.index(name) for name in "IOHW")
    out = tuple(
        (n + sum(pad) - (kernel.shape[axis] - 1) * d - 1) // s + 1
        for n, pad, axis, d, s in zip(x.shape[1:3], pads, spatial, dilation, strides, strict=True)
    )
    image = {"dims": 4, "data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    kernel_layout = {"input_feature_dim": i, "output_feature_dim": o, "spatial_dims": spatial}
    low, high = zip(*pads, strict=True)
    config = {
        "dims": 4,
        "input": image,
        "kernel": {"dims": 4, "filter": kernel_layout},
        "output": image,
        "window": {
            "size": [kernel.shape[axis] for axis in spatial],
            "pad_left": low,
            "pad_right": high,
            "strides": strides,
            "window_dilations": dilation,
        },
        "feature_groups": 1,
    }
    call = jax.ffi.ffi_call(
        CALL,
        jax.ShapeDtypeStruct((x.shape[0], *out, kernel.shape[o]), x.dtype),
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )
    result: jax.Array = call(x, kernel)
    return result
