"""Noise on a network's parameters, drawn anew from a key wherever it is needed: nothing of it is stored.

A member is mean + scale E, where the entries of E have mean 0 and variance 1. Full-rank noise is Gaussian. Low-rank noise is
E = A B^T / sqrt(r) for a matrix W [m, n], with Gaussian A [m, r] and B [n, r]; a kernel [kh, kw, C, O] is the matrix
[kh kw C, O], vectors and what is too small to gain stay full-rank. A member's products are then those of the mean and cheap
ones, x W + scale (x A) B^T / sqrt(r): see `lowrank.py`.

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
    """A family of noise on parameters of one structure. What is drawn is one vector, of `size` numbers."""

    size: int  # numbers per draw
    member: Callable[[Callable[[PyTree], Any], jax.Array, jax.Array], Any]  # (function, drawn [size], scale) ->
    # function(mean + scale E)
    weigh: Callable[[jax.Array, jax.Array], PyTree]  # (weights [c], drawn [c, size]) -> sum_i w_i E_i, as the mean

    def draw(self, key: jax.Array) -> jax.Array:
        """Standard normal numbers [size]."""
        return jax.random.normal(key, (self.size,))


def full_rank(mean: PyTree) -> Noise:
    """Gaussian noise on every parameter."""
    vector, back = ravel_pytree(mean)

    def member(function: Callable[[PyTree], Any], drawn: jax.Array, scale: jax.Array) -> Any:
        return function(back(vector + scale * drawn))

    def weigh(weights: jax.Array, drawn: jax.Array) -> PyTree:
        return back(weights @ drawn)

    return Noise(vector.size, member, weigh)


def low_rank(mean: PyTree, rank: int) -> Noise:
    """Noise of a rank r on every matrix and kernel for which r (m + n) < m n, Gaussian noise on all else.

    Args:
      mean: whose members are drawn.
      rank: r, at least 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of noise is at least 1; got {rank}: leave it out for noise of full rank")
    leaves, treedef = jax.tree.flatten(mean)
    counts = [_count(leaf.shape, rank) for leaf in leaves]
    ends = [sum(counts[:i]) for i in range(1, len(counts))]

    def member(function: Callable[[PyTree], Any], drawn: jax.Array, scale: jax.Array) -> Any:
        parts = jnp.split(drawn, ends)
        noisy = [
            Factored(leaf, scale / math.sqrt(rank) * left, right)
            if _factors(leaf.shape, rank)
            else leaf + scale * part.reshape(leaf.shape)
            for leaf, part in zip(leaves, parts, strict=True)
            for left, right in [_split(part, leaf.shape, rank)]
        ]
        return evaluate(lambda *leaves: function(jax.tree.unflatten(treedef, leaves)), noisy)

    def weigh(weights: jax.Array, drawn: jax.Array) -> PyTree:
        summed = [
            _sum_of_products(weights / math.sqrt(rank), part, leaf.shape, rank)
            if _factors(leaf.shape, rank)
            else (weights @ part).reshape(leaf.shape)
            for leaf, part in zip(leaves, jnp.split(drawn, ends, axis=1), strict=True)
        ]
        return jax.tree.unflatten(treedef, summed)

    return Noise(sum(counts), member, weigh)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _factors(shape: Sequence[int], rank: int) -> bool:
    """Whether an array of this shape gets noise of low rank."""
    return len(shape) > 1 and rank * sum(_matrix(shape)) < math.prod(shape)


def _count(shape: Sequence[int], rank: int) -> int:
    return rank * sum(_matrix(shape)) if _factors(shape, rank) else math.prod(shape)


def _split(part: jax.Array, shape: Sequence[int], rank: int) -> tuple[jax.Array, jax.Array]:
    """[..., r (m + n)] into A [..., m, r] and B [..., n, r]; of no meaning where nothing factors."""
    if not _factors(shape, rank):
        return part, part
    m, n = _matrix(shape)
    left, right = part[..., : rank * m], part[..., rank * m :]
    return left.reshape(*left.shape[:-1], m, rank), right.reshape(*right.shape[:-1], n, rank)


def _sum_of_products(weights: jax.Array, drawn: jax.Array, shape: Sequence[int], rank: int) -> jax.Array:
    """sum_i w_i A_i B_i^T as one product of [m, c r] and [c r, n]."""
    left, right = _split(drawn, shape, rank)
    return jnp.einsum("c,cmr,cnr->mn", weights, left, right, optimize="optimal").reshape(shape)
