"""Compiles the kernels and compares each with NumPy, in a process of its own, which they may crash.

`python -m ev3_distill.students.layers.compiled_probe LIBRARY`; `compiled.py` starts it. Exits with 0 if all is well, else 3.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ev3_distill.students.layers import compiled

TOLERANCE = 1e-4  # of the largest entry
# Shapes of images, of kernels [kh, kw, C / groups, O], and strides: Winograd's method, sums over positions, depthwise
CASES = (
    ((3, 9, 8, 20), (3, 3, 20, 33), (1, 1)),
    ((2, 7, 9, 3), (3, 3, 3, 16), (1, 1)),
    ((5, 8, 9, 16), (3, 3, 16, 33), (2, 2)),
    ((1, 40, 33, 8), (5, 3, 8, 8), (3, 2)),
    ((3, 1, 20, 12), (1, 5, 12, 8), (1, 1)),
    ((3, 9, 8, 20), (3, 3, 1, 20), (1, 1)),
    ((2, 8, 9, 33), (5, 3, 1, 33), (2, 2)),
)


def check() -> str:
    """What is wrong with the registered kernels, or ""."""
    try:
        return next(filter(None, (_problem(*case) for case in CASES)), "") or _problem_of_sums()
    except jax.errors.JaxRuntimeError as error:  # another version of the interface
        return str(error).partition("\n")[0]


def _problem(shape: tuple[int, ...], kernel_shape: tuple[int, ...], strides: tuple[int, int]) -> str:
    """Compares a convolution and both gradients."""
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=shape), np.float32)
    kernel = np.asarray(rng.normal(size=kernel_shape), np.float32)
    depthwise = kernel_shape[2] < shape[3]
    pads = jax.lax.padtype_to_pads(shape[1:3], kernel_shape[:2], strides, "SAME")
    out, dx, dkernel, gradient = _reference(x, kernel, strides, pads, depthwise)
    name, before = ("ev3_depthwise" if depthwise else "ev3_convolution"), [low for low, _ in pads]
    for suffix, one, other, wanted in (
        ("", x, kernel, out),
        ("_x", gradient, kernel, dx),
        ("_kernel", x, gradient, dkernel),
    ):

        def function(one: jax.Array, other: jax.Array, suffix: str = suffix, wanted: np.ndarray = wanted) -> jax.Array:
            return compiled.call(name + suffix, one, other, wanted.shape, (*strides, *before))

        got = jax.jit(_twice, static_argnums=0)(function, one, other, np.zeros(wanted.shape, np.float32))
        if not np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max():
            return f"{name + suffix} with a kernel of {kernel_shape} differs from NumPy"
    return ""


def _reference(
    x: np.ndarray, kernel: np.ndarray, strides: tuple[int, int], pads: Sequence[tuple[int, int]], depthwise: bool
) -> tuple[np.ndarray, ...]:
    """The convolution, both gradients for some gradient of the output, and that gradient, in float64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)))
    kh, kw = kernel.shape[:2]
    height, width = (-(-n // s) for n, s in zip(x.shape[1:3], strides, strict=True))
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    gradient = np.asarray(np.random.default_rng(1).normal(size=out.shape), np.float32)
    dpadded, dkernel = np.zeros(padded.shape), np.zeros(kernel.shape)
    for p in range(kh):
        for q in range(kw):
            pixels = (
                slice(None),
                slice(p, p + strides[0] * height, strides[0]),
                slice(q, q + strides[1] * width, strides[1]),
            )
            if depthwise:
                out += padded[pixels] * kernel[p, q]
                dpadded[pixels] += gradient * kernel[p, q]
                dkernel[p, q, 0] = (padded[pixels] * gradient).sum((0, 1, 2))
            else:
                out += padded[pixels] @ kernel[p, q]
                dpadded[pixels] += gradient @ kernel[p, q].T
                dkernel[p, q] = np.einsum("bhwc,bhwo->co", padded[pixels], gradient)
    (top, _), (left, _) = pads
    return out, dpadded[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel, gradient


def _problem_of_sums() -> str:
    """Compares sums over pixels."""
    for shape in ((3, 50, 16), (1, 7, 5), (40, 33, 3, 24)):
        one, other = (np.asarray(np.random.default_rng(seed).normal(size=shape), np.float32) for seed in (0, 1))
        got = np.asarray(compiled.call("ev3_channel_sums", one, other, (2, shape[-1])))
        for sums, values in zip(got, (one, one * other), strict=True):
            axes = tuple(range(values.ndim - 1))
            if not (np.abs(sums - values.sum(axes)) <= TOLERANCE * np.abs(values).sum(axes)).all():
                return f"ev3_channel_sums of {shape} differs from NumPy"
    return ""


def _twice(function: Callable[..., jax.Array], one: jax.Array, other: jax.Array, zeros: jax.Array) -> jax.Array:
    """The mean of two equal results in a loop, where training steps have them."""
    return jax.lax.fori_loop(0, 2, lambda _, total: total + function(one, other), zeros) / 2


def _main(path: pathlib.Path) -> str:
    if problem := compiled.compile_kernels(path):
        return problem
    compiled.register(path)
    return check()


if __name__ == "__main__":
    if problem := _main(pathlib.Path(sys.argv[1])):
        print(problem, file=sys.stderr)
        raise SystemExit(compiled.FAILED)
