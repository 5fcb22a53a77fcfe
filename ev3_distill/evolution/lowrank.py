"""Evaluate any function of parameters at W + L R^T, without forming that matrix in products and convolutions.

The function's jaxpr is evaluated over values some of which are `Factored`. Three kinds of operation handle a factored value:

- A product x W: a dot_general that contracts the last axis of x with the first of W (or the last, for x W^T). It becomes
  x W + (x L) R^T.
- A convolution [B, H, W, C] with a kernel [kh, kw, C, O], without groups. It becomes the convolution with the mean plus a
  low-rank term: C -> kh kw r products at every pixel, kh kw shifted sums, and r -> O products. Under `vmap`, a second
  convolution would be one with a batch of kernels, which is slow on every backend.
- A call (jit, custom derivative, checkpoint). It is entered.

Every other operation gets the matrix W + L R^T itself. The result is correct, at the price of one matrix per member and a
product with it. Grouped convolutions, 1x1 kernels that are sliced first, and parameters inside loops pay this price. Under
`vmap` over L and R alone, the terms of the mean remain one product or convolution of a larger batch, and before the first layer
one for all members.

References:
  Sarkar et al.: Evolution strategies at the hyperscale (EGGROLL). arXiv 2511.16652.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.runtime.jaxpr import CALLS, called, is_variable
from ev3_distill.types import PyTree

Pair = tuple[int, int]


class Factored(NamedTuple):
    """mean + left right^T, where the mean is viewed as a matrix with its last axis as columns."""

    mean: jax.Array  # [..., n], m entries before the last axis
    left: jax.Array  # [m, r]
    right: jax.Array  # [n, r]

    def dense(self) -> jax.Array:
        """The array itself, [..., n]."""
        return self.mean + (self.left @ self.right.T).reshape(self.mean.shape).astype(self.mean.dtype)


def evaluate(function: Callable[..., PyTree], arguments: Sequence[Any]) -> PyTree:
    """Compute function(*arguments), where each argument is an array or `Factored`. Not meant to be differentiated."""
    means = [value.mean if isinstance(value, Factored) else value for value in arguments]
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*means)
    out = _run(closed, arguments)
    return jax.tree.unflatten(jax.tree.structure(shape), [_dense(value) for value in out])


def _run(program: Any, arguments: Sequence[Any]) -> list[Any]:
    """Outputs of a closed jaxpr."""
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return values[atom] if is_variable(atom) else atom.val

    for equation in jaxpr.eqns:
        out = _apply(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """Outputs of one operation."""
    name = equation.primitive.name
    if name in CALLS:
        return _run(called(equation), inputs)
    if any(isinstance(value, Factored) for value in inputs):
        if name in _RULES and isinstance(inputs[1], Factored) and not isinstance(inputs[0], Factored):
            out = _RULES[name](equation, inputs[0], inputs[1])
            if out is not None:
                return [out]
        inputs = [_dense(value) for value in inputs]
    return _bind(equation, inputs)


def _bind(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    out = equation.primitive.bind(*inputs, **equation.params)
    return out if equation.primitive.multiple_results else [out]


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, Factored) else value


def _dot(equation: Any, x: jax.Array, w: Factored) -> jax.Array | None:
    """x W or x W^T for a matrix W [m, n]; None for any other contraction."""
    (x_axes, w_axes), (batch, _) = equation.params["dimension_numbers"]
    if w.mean.ndim != 2 or batch or tuple(x_axes) != (x.ndim - 1,):
        return None
    near, far = (w.left, w.right) if tuple(w_axes) == (0,) else (w.right, w.left)
    out: jax.Array = _bind(equation, [x, w.mean])[0]
    return out + ((x @ near) @ far.T).astype(out.dtype)


def _convolution(equation: Any, x: jax.Array, w: Factored) -> jax.Array | None:
    """XLA's own convolution; None unless it is NHWC with HWIO kernels, without groups."""
    params = equation.params
    axes = params["dimension_numbers"]
    nhwc = (axes.lhs_spec, axes.rhs_spec, axes.out_spec) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    groups = params["feature_group_count"] * params["batch_group_count"]
    cropped = min(min(pad) for pad in params["padding"]) < 0
    if not nhwc or groups != 1 or set(params["lhs_dilation"]) != {1} or cropped:
        return None
    low = _by_taps(x, w, params["window_strides"], params["padding"], params["rhs_dilation"])
    out: jax.Array = _bind(equation, [x, w.mean])[0]
    return out + low.astype(out.dtype)


def _same_convolution(equation: Any, x: jax.Array, w: Factored) -> jax.Array:
    """The "students_conv" primitive: "SAME" padding, and strides."""
    strides = equation.params["strides"]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], w.mean.shape[:2], strides, "SAME")
    out: jax.Array = _bind(equation, [x, w.mean])[0]
    return out + _by_taps(x, w, strides, pads, (1, 1))


def _by_taps(
    x_BxHxWxC: jax.Array, w: Factored, strides: Sequence[int], pads: Sequence[Pair], dilation: Sequence[int]
) -> jax.Array:
    """The convolution with L R^T, [B, H', W', O]: apply each tap of L at every pixel, then sum the shifted results."""
    (kh, kw, channels, _), rank = w.mean.shape, w.left.shape[-1]
    left = w.left.reshape(kh * kw, channels, rank).transpose(1, 0, 2).reshape(channels, -1)
    taps = (x_BxHxWxC @ left).reshape(*x_BxHxWxC.shape[:3], kh, kw, rank)
    taps = jnp.pad(taps, ((0, 0), *pads, (0, 0), (0, 0), (0, 0)))
    size = [taps.shape[1 + i] - (w.mean.shape[i] - 1) * dilation[i] for i in (0, 1)]  # of a tap's window
    shifted = [
        taps[:, i * dilation[0] :, j * dilation[1] :, i, j][:, : size[0] : strides[0], : size[1] : strides[1]]
        for i in range(kh)
        for j in range(kw)
    ]
    return sum(shifted[1:], shifted[0]) @ w.right.T


_RULES: dict[str, Callable[[Any, jax.Array, Factored], jax.Array | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "students_conv": _same_convolution,
}
