"""Tries oneDNN's convolution in a process of its own, which may crash. Exits with 0 if it computes what XLA does, else 3.

`python -m ev3_distill.students.layers.onednn_probe`; `onednn.py` starts it.
"""

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.students.layers import onednn

TOLERANCE = 1e-4  # of the largest entry
# Shapes of images and kernels [kh, kw, C, O], paddings, strides and dilation of the kernel: what `conv.py` asks for.
CASES = (
    ((2, 9, 8, 3), (3, 3, 3, 16), ((1, 1), (1, 1)), (1, 1), (1, 1)),
    ((5, 8, 9, 16), (3, 3, 16, 33), ((0, 1), (0, 1)), (2, 2), (1, 1)),
    ((1, 7, 7, 8), (5, 3, 8, 8), ((2, 2), (1, 1)), (1, 2), (1, 1)),
    ((3, 1, 20, 12), (1, 5, 12, 8), ((0, 0), (2, 2)), (1, 1), (1, 1)),
    ((2, 12, 11, 8), (4, 3, 8, 16), ((1, 2), (0, 3)), (1, 1), (2, 3)),
)
AXES = ("HWIO", "IHWO")


def check() -> str:
    """What is wrong with the call, or ""."""
    try:
        return _check()
    except jax.errors.JaxRuntimeError as error:  # no such call, or not with this configuration
        return str(error).partition("\n")[0]


def _check() -> str:
    rng = np.random.default_rng(0)
    for shape, kernel_shape, pads, strides, dilation in CASES:
        x, kernel = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, kernel_shape))
        wanted = jax.lax.conv_general_dilated(
            x, kernel, strides, pads, rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for axes in AXES:
            turned = kernel.transpose(["HWIO".index(axis) for axis in axes])
            convolution = functools.partial(
                onednn.convolution, pads=pads, strides=strides, dilation=dilation, axes=axes
            )
            got = jax.jit(functools.partial(_twice, convolution))(x, turned, jnp.zeros_like(wanted))
            if not float(jnp.abs(got - wanted).max()) <= TOLERANCE * float(jnp.abs(wanted).max()):
                return f"a convolution with a kernel of {kernel_shape}, axes {axes}, differs from XLA's"
    return ""


def _twice(convolution: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, zeros: jax.Array) -> jax.Array:
    """The mean of two equal convolutions in a loop, where programs of training have them."""
    return jax.lax.fori_loop(0, 2, lambda _, total: total + convolution(x, kernel), zeros) / 2


if __name__ == "__main__":
    if problem := check():
        print(problem, file=sys.stderr)
        raise SystemExit(onednn.FAILED)
