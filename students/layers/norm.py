"""Fast BatchNorm for convolutional students.

Reverse mode of BatchNorm needs sums over pixels of (x, x^2) and of (g, g x). XLA:CPU reads its operands once for each; the
kernels of `compiled.py` take both sums in one pass. So two primitives, each the transpose of the other, replace what XLA would
derive: sums and affine functions, both linear in their first argument.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ev3_distill.students.layers import compiled


class BatchNorm(nnx.Module):
    """nnx.BatchNorm over all axes except the last, with momentum 0.9 and epsilon 1e-5, in fewer passes over memory.

    y = x a + b, with a = scale / sqrt(var + epsilon) and b = bias - mean a. In this form, reverse mode needs only the sums over
    g and g x and one pass dx = g a + x c + d. As in Flax, var = E[x^2] - E[x]^2 is biased, the running one too.

    References:
      Ioffe and Szegedy, Batch Normalization, ICML 2015; arXiv:1502.03167.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        del rngs  # nothing is random, but every Flax layer takes it
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))
        self.use_running_average = False  # set by eval() and train()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., C]; in training, updates the running statistics."""
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, mean_square = _sums(x, x) * (x.shape[-1] / x.size)
            var = jnp.maximum(0.0, mean_square - mean * mean)
            # not `[...] =`: Flax would ask a tracer for its sharding, and the resulting error searches the whole program
            self.mean.set_value(0.9 * self.mean[...] + 0.1 * mean)
            self.var.set_value(0.9 * self.var[...] + 0.1 * var)
        slope = self.scale[...] * jax.lax.rsqrt(var + 1e-5)
        return _affine(jnp.stack([self.bias[...] - mean * slope, slope]), x)


def _sums(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums over all axes except the last of a and a b; a and b [..., C], result [2, C]."""
    if not compiled.can_take(a, b):
        return _plain_sums(a, b)
    out: jax.Array = _sums_p.bind(a, b)
    return out


def _affine(pair: jax.Array, x: jax.Array) -> jax.Array:
    """pair[0] + pair[1] x; pair [2, C], x [..., C]."""
    if not compiled.can_take(pair, x):
        return _plain_affine(pair, x)
    out: jax.Array = _affine_p.bind(pair, x)
    return out


def _plain_sums(a: jax.Array, b: jax.Array) -> jax.Array:
    """First over axis 0, then over the rest, in wide rows that vectorize."""

    def total(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1).sum(0).reshape(-1, x.shape[-1]).sum(0)

    return jnp.stack([total(a), total(a * b)])


def _plain_affine(pair: jax.Array, x: jax.Array) -> jax.Array:
    return pair[0] + pair[1] * x


def _call_sums(a: jax.Array, b: jax.Array) -> jax.Array:
    return compiled.call("ev3_channel_sums", a, b, (2, a.shape[-1]))


def _primitive(name: str, function: Any, plain: Any, shape: Any) -> Primitive:
    """A primitive of two arrays that `function` computes, and `plain` where it is vectorized."""
    primitive = Primitive(name)
    primitive.def_impl(function)
    primitive.def_abstract_eval(lambda one, other: jax.core.ShapedArray(shape(one, other), one.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))

    def batch(args: Sequence[jax.Array], axes: Sequence[int | None]) -> tuple[jax.Array, int]:
        return jax.vmap(plain, axes)(*args), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


_sums_p = _primitive("students_sums", _call_sums, _plain_sums, lambda a, b: (2, a.shape[-1]))
_affine_p = _primitive("students_affine", _plain_affine, _plain_affine, lambda pair, x: x.shape)
# Tangents: the same function of the tangent of the first argument, and what is linear in that of the second.
ad.defjvp(
    _sums_p,
    lambda da, a, b: _sums_p.bind(da, b),
    lambda db, a, b: _sums_p.bind(db, a).at[0].set(0.0),
)
ad.defjvp(_affine_p, lambda dpair, pair, x: _affine_p.bind(dpair, x), lambda dx, pair, x: pair[1] * dx)
ad.primitive_transposes[_sums_p] = lambda g, a, b: (_affine_p.bind(g, b), None)
ad.primitive_transposes[_affine_p] = lambda g, pair, x: (_sums_p.bind(g, x), None)
