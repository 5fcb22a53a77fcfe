"""Any function of parameters, evaluated at W + L R^T without making that matrix where a product or a convolution allows it.

The function's jaxpr is run once over values some of which are `Factored`. Three operations know what to do with one:

- x W, as a dot_general that contracts all of x's last axis with W's first (or, for x W^T, with its last):
  x W + (x L) R^T;
- a convolution [B, H, W, C] with a kernel [kh, kw, C, O], without groups: that with the mean, and the low-rank term, which is
  not another convolution (under `vmap` one of kernels, slow everywhere) but C -> kh kw r products at every pixel, kh kw shifted
  sums, and r -> O products;
- calls (jit, custom derivatives, checkpoints), which are entered, whatever they are given: what is left can be run as it is.

Everything else gets the matrix itself, W + L R^T: right, at the price of one matrix per member, and of a product with it. That
is what grouped convolutions, 1x1 kernels that are sliced first, and parameters inside loops cost. Under `vmap` over L and R
alone, the terms of the mean stay one product or convolution of a larger batch, and before the first layer one for all members.

Reference: Sarkar et al., arXiv 2511.16652, where this is the reason for low-rank noise.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

Pair = tuple[int, int]


class Factored(NamedTuple):
    """mean + left right^T, with the mean as a matrix of its last axis' columns."""

    mean: jax.Array  # [..., n], m entries before the last axis
    left: jax.Array  # [m, r]
    right: jax.Array  # [n, r]

    def dense(self) -> jax.Array:
        """The array itself, [..., n]."""
        return self.mean + (self.left @ self.right.T).reshape(self.mean.shape).astype(self.mean.dtype)


def evaluate(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """function(*arguments), arguments being arrays or `Factored`; derivatives are not what this is for."""
    means = [value.mean if isinstance(value, Factored) else value for value in arguments]
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*means)
    out = _run(closed.jaxpr, closed.consts, arguments)
    return jax.tree.unflatten(jax.tree.structure(shape), [_dense(value) for value in out])


def _run(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        out = _apply(equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, out, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(equation: Any, given: list[Any]) -> Sequence[Any]:
    """One operation's results."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        inner = params[_CALLS[name]]
        return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), given)
    if any(isinstance(value, Factored) for value in given):
        if name in _RULES and isinstance(given[1], Factored) and not isinstance(given[0], Factored):
            out = _RULES[name](equation, given[0], given[1])
            if out is not None:
                return [out]
        given = [_dense(value) for value in given]
    return _bind(equation, given)


def _bind(equation: Any, given: Sequence[Any]) -> Sequence[Any]:
    out = equation.primitive.bind(*given, **equation.params)
    return out if equation.primitive.multiple_results else [out]


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, Factored) else value


def _dot(equation: Any, x: jax.Array, w: Factored) -> jax.Array | None:
    """x W, or x W^T, of a matrix W [m, n]."""
    (of_x, of_w), (batch, _) = equation.params["dimension_numbers"]
    if w.mean.ndim != 2 or batch or tuple(of_x) != (x.ndim - 1,):
        return None
    near, far = (w.left, w.right) if tuple(of_w) == (0,) else (w.right, w.left)
    out: jax.Array = _bind(equation, [x, w.mean])[0]
    return out + ((x @ near) @ far.T).astype(out.dtype)


def _convolution(equation: Any, x: jax.Array, w: Factored) -> jax.Array | None:
    """XLA's own convolution, if of the usual axes and without groups."""
    params = equation.params
    axes = params["dimension_numbers"]
    usual = (axes.lhs_spec, axes.rhs_spec, axes.out_spec) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    groups = params["feature_group_count"] * params["batch_group_count"]
    cropped = min(min(pad) for pad in params["padding"]) < 0
    if not usual or groups != 1 or set(params["lhs_dilation"]) != {1} or cropped:
        return None
    low = _by_taps(x, w, params["window_strides"], params["padding"], params["rhs_dilation"])
    out: jax.Array = _bind(equation, [x, w.mean])[0]
    return out + low.astype(out.dtype)


def _same_convolution(equation: Any, x: jax.Array, w: Factored) -> jax.Array:
    """The primitive of `students/conv.py`: "SAME" padding, and strides."""
    strides = equation.params["strides"]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], w.mean.shape[:2], strides, "SAME")
    out: jax.Array = _bind(equation, [x, w.mean])[0]
    return out + _by_taps(x, w, strides, pads, (1, 1))


def _by_taps(
    x_BxHxWxC: jax.Array, w: Factored, strides: Sequence[int], pads: Sequence[Pair], dilation: Sequence[int]
) -> jax.Array:
    """The convolution with L R^T, [B, H', W', O]: each tap of L at every pixel first, then the sum of the shifted."""
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
# Operations that hold a jaxpr of their arguments, and the parameter that it is.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
