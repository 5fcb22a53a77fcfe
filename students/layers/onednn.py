"""oneDNN's convolution, that the x86 builds of jaxlib carry and XLA:CPU does not use by itself.

A custom call reaches it from any jitted program, in and out of loops. Nobody promises this door: its configuration has
changed between versions of jaxlib, and a wrong one ends the process. So it is opened for the versions it was tried with,
`TRIED`, on processors oneDNN has fast code for, and `students/conv.py` has XLA's own convolution for everything else.
To add a version: `pytest tests/test_conv.py` with it, and `ev3-distill bench speed`. EV3_DISTILL_ONEDNN=0 closes the door, and
so does a persistent compilation cache: a program with such a call cannot be written to one.

Activations are [B, H, W, C]. The call has no derivatives; who uses it writes them.
"""

import functools
import json
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxlib

TRIED = ("0.10.2",)
Pair = tuple[int, int]


@functools.cache
def usable() -> bool:
    """Whether the call is there, and is known; the same at every start on one machine."""
    if os.environ.get("EV3_DISTILL_ONEDNN", "1") == "0" or getattr(jax.config, "jax_compilation_cache_dir", None):
        return False
    if jaxlib.__version__ not in TRIED:
        return False
    try:
        if " avx2 " not in pathlib.Path("/proc/cpuinfo").read_text():
            return False
        with jax.ensure_compile_time_eval():  # also where somebody is tracing
            x = jnp.arange(8.0).reshape(1, 2, 2, 2)
            got = convolution(x, jnp.ones((1, 1, 2, 1)), [(0, 0), (0, 0)])
            return bool((got[..., 0] == x.sum(-1)).all())
    except (OSError, jax.errors.JaxRuntimeError):  # no such file, no such call: another system, another build
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
    """A convolution of float32.

    Args:
      x: [B, H, W, C].
      kernel: kh, kw, C and O in the order of `axes`, where they are H, W, I and O.
      pads: below and above, of H and W.
      strides: of H and W.
      dilation: of the kernel.
      axes: of the kernel.

    Returns:
      [B, H', W', O].

    Raises:
      ValueError: a negative padding, at which oneDNN would end the process.
    """
    if min(min(pad) for pad in pads) < 0:
        raise ValueError(f"oneDNN takes no negative paddings; got {list(pads)}: crop the images instead")
    i, o, *spatial = (axes.index(name) for name in "IOHW")
    out = tuple(
        (n + sum(pad) - (kernel.shape[axis] - 1) * d - 1) // s + 1
        for n, pad, axis, d, s in zip(x.shape[1:3], pads, spatial, dilation, strides, strict=True)
    )
    image = {"dims": 4, "data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    of_kernel = {"input_feature_dim": i, "output_feature_dim": o, "spatial_dims": spatial}
    low, high = zip(*pads, strict=True)
    config = {
        "dims": 4,
        "input": image,
        "kernel": {"dims": 4, "filter": of_kernel},
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
        "__onednn$convolution",
        jax.ShapeDtypeStruct((x.shape[0], *out, kernel.shape[o]), x.dtype),
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )
    result: jax.Array = call(x, kernel)
    return result
