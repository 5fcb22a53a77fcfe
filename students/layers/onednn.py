"""oneDNN's convolution, which x86 builds of jaxlib contain but XLA:CPU does not use by itself.

A custom call makes it available in any jitted program, inside and outside of loops. This is not a public interface: its
configuration has changed between versions of jaxlib, and a wrong one crashes the process. So it is used only with the
versions in `TESTED_VERSIONS`, on processors that oneDNN has fast code for; everywhere else `conv.py` uses XLA's own
convolution. To add a version, run `pytest tests/students/test_conv_layers.py` and `ev3-distill bench speed` with it.

EV3_DISTILL_ONEDNN=0 turns it off. Programs with such a call are not stored in a compilation cache: XLA would read memory at
random to write one.

Activations are [B, H, W, C]. The call has no derivatives; `conv.py` defines them.
"""

import functools
import json
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxlib

from ev3_distill.runtime import compile_cache

TESTED_VERSIONS = ("0.10.2",)
CALL = "__onednn$convolution"
Pair = tuple[int, int]


@functools.cache
def available() -> bool:
    """Whether the call exists and was tested with this jaxlib; constant on one machine."""
    if os.environ.get("EV3_DISTILL_ONEDNN", "1") == "0":
        return False
    if jaxlib.__version__ not in TESTED_VERSIONS or not compile_cache.never_store(CALL):
        return False
    try:
        if " avx2 " not in pathlib.Path("/proc/cpuinfo").read_text():
            return False
        with jax.ensure_compile_time_eval():  # also during tracing
            x = jnp.arange(8.0).reshape(1, 2, 2, 2)
            got = convolution(x, jnp.ones((1, 1, 2, 1)), [(0, 0), (0, 0)])
            return bool((got[..., 0] == x.sum(-1)).all())
    except (OSError, jax.errors.JaxRuntimeError):  # no such file or no such call: another operating system or build
        return False


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
