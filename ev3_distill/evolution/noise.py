"""Noise on a network's parameters. It is regenerated from a key wherever it is needed, and never stored.

A member is mean + scale E, where the entries of E have mean 0 and variance 1. Full-rank noise is Gaussian. Low-rank noise for a
matrix W [m, n] is E = A B^T / sqrt(r), with Gaussian A [m, r] and B [n, r]. A kernel [kh, kw, C, O] is treated as the matrix
[kh kw C, O]. Vectors, and matrices too small to gain, keep full-rank noise. A product with a member is then a product with the
mean plus a cheap term, x W + scale (x A) B^T / sqrt(r); see `lowrank.py`.

References:
  Salimans et al.: Evolution strategies as a scalable alternative to reinforcement learning. arXiv 1703.03864.
  Sarkar et al.: Evolution strategies at the hyperscale (EGGROLL). arXiv 2511.16652; section 4 for E and its update.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ev3_distill.evolution.lowrank import Factored, evaluate
from ev3_distill.types import PyTree


class Noise(NamedTuple):
    """A noise distribution on parameters of one structure. A draw is one vector of `size` numbers."""

    size: int  # numbers per draw
    member: Callable[[Callable[[PyTree], Any], jax.Array, jax.Array], Any]
    # (function, draw [size], scale) -> function(mean + scale E)
    weigh: Callable[
        [jax.Array, jax.Array], PyTree
    ]  # (weights [c], draws [c, size]) -> sum_i w_i E_i, shaped like the mean

    def draw(self, key: jax.Array) -> jax.Array:
        """Standard normal numbers [size]."""
        return jax.random.normal(key, (self.size,))


def full_rank(mean: PyTree) -> Noise:
    """Gaussian noise on every parameter."""
    vector, unravel = ravel_pytree(mean)

    def member(function: Callable[[PyTree], Any], drawn: jax.Array, scale: jax.Array) -> Any:
        return function(unravel(vector + scale * drawn))

    def weigh(weights: jax.Array, drawn: jax.Array) -> PyTree:
        return unravel(weights @ drawn)

    return Noise(vector.size, member, weigh)


def low_rank(mean: PyTree, rank: int) -> Noise:
    """Noise of rank r on every matrix and kernel with r (m + n) < m n, Gaussian noise on the rest.

    Args:
      mean: parameters of the mean.
      rank: r, at least 1.

    Raises:
      ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of the noise must be at least 1; got {rank}: use None for full-rank noise")
    leaves, treedef = jax.tree.flatten(mean)
    counts = [_count(leaf.shape, rank) for leaf in leaves]
    ends = [sum(counts[:i]) for i in range(1, len(counts))]

    def member(function: Callable[[PyTree], Any], drawn: jax.Array, scale: jax.Array) -> Any:
        parts = jnp.split(drawn, ends)
        noisy = [
            Factored(leaf, scale / math.sqrt(rank) * left, right)
            if _is_low_rank(leaf.shape, rank)
            else leaf + scale * part.reshape(leaf.shape)
            for leaf, part in zip(leaves, parts, strict=True)
            for left, right in [_split(part, leaf.shape, rank)]
        ]
        return evaluate(lambda *leaves: function(jax.tree.unflatten(treedef, leaves)), noisy)

    def weigh(weights: jax.Array, drawn: jax.Array) -> PyTree:
        summed = [
            _sum_of_products(weights / math.sqrt(rank), part, leaf.shape, rank)
            if _is_low_rank(leaf.shape, rank)
            else (weights @ part).reshape(leaf.shape)
            for leaf, part in zip(leaves, jnp.split(drawn, ends, axis=1), strict=True)
        ]
        return jax.tree.unflatten(treedef, summed)

    return Noise(sum(counts), member, weigh)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _is_low_rank(shape: Sequence[int], rank: int) -> bool:
    """Whether an array of this shape gets low-rank noise."""
    return len(shape) > 1 and rank * sum(_matrix(shape)) < math.prod(shape)


def _count(shape: Sequence[int], rank: int) -> int:
    """Numbers per draw for an array of this shape."""
    return rank * sum(_matrix(shape)) if _is_low_rank(shape, rank) else math.prod(shape)


def _split(part: jax.Array, shape: Sequence[int], rank: int) -> tuple[jax.Array, jax.Array]:
    """Split [..., r (m + n)] into A [..., m, r] and B [..., n, r]; for full-rank noise, return the draw twice."""
    if not _is_low_rank(shape, rank):
        return part, part
    m, n = _matrix(shape)
    left, right = part[..., : rank * m], part[..., rank * m :]
    return left.reshape(*left.shape[:-1], m, rank), right.reshape(*right.shape[:-1], n, rank)


def _sum_of_products(weights: jax.Array, drawn: jax.Array, shape: Sequence[int], rank: int) -> jax.Array:
    """sum_i w_i A_i B_i^T, as one product of [m, c r] and [c r, n]."""
    left, right = _split(drawn, shape, rank)
    return jnp.einsum("c,cmr,cnr->mn", weights, left, right, optimize="optimal").reshape(shape)
