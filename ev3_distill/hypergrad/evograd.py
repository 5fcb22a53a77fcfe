"""EvoGrad: a hypergradient from random copies of the parameters. Notation as in `problem.py`.

References:
  Bohdal et al., EvoGrad: Efficient gradient-based meta-learning and hyperparameter optimization. NeurIPS 2021,
    arXiv 2106.10575.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ev3_distill.hypergrad.problem import HypergradientInfo, Problem, dot, finite_copies
from ev3_distill.types import PyTree

NOISE_DISTRIBUTIONS: dict[str, Callable[..., jax.Array]] = {
    "rademacher": jax.random.rademacher,
    "gaussian": jax.random.normal,
}


def evograd(
    key: jax.Array,
    problem: Problem,
    *,
    copies: int = 2,
    sigma: float = 1e-3,
    tau: float = 0.05,
    noise: str = "rademacher",
    rate: float | None = None,
    at_once: int = 1,
) -> tuple[PyTree, HypergradientInfo]:
    """EvoGrad: copies theta_i = theta + sigma e_i, weights w = softmax(-l_i / tau), V at theta* = sum_i w_i theta_i.

    Through the weights alone, dV/dlambda = -(1 / tau) sum_i w_i (u_i - sum_j w_j u_j) dl_i/dlambda with u_i = <v, theta_i>.
    That is a one-step hypergradient of rate (sigma^2 / tau) (K - 1) / K, seen through a random projection of rank K - 1. A copy
    is regenerated from its key wherever it is needed, so memory holds `at_once` copies, whatever K is, and K numbers per
    hyperparameter. EvoGrad cannot tune a learning rate, which no training loss contains.

    Args:
      key: of the copies.
      problem: parameters, hyperparameters and losses. A copy with a non-finite loss or slope gets no weight.
      copies: K, at least 2.
      sigma: distance of the copies from theta, per parameter.
      tau: temperature of the softmax, in units of l.
      noise: distribution of e, a key of NOISE_DISTRIBUTIONS.
      rate: eta, to scale the result to one step of SGD at that rate; None for the published scale.
      at_once: copies evaluated side by side.

    Returns:
      (dV / dlambda, shaped like `hyper`, info).

    Raises:
      ValueError: fewer than two copies, or an unknown distribution.
    """
    _check(copies, noise)
    params, hyper, train_loss, val_loss = problem
    keys = jax.random.split(key, copies)

    def shift(key: jax.Array) -> PyTree:
        return _shift(key, params, sigma, noise)

    def evaluated(key: jax.Array) -> tuple[jax.Array, PyTree]:
        return jax.value_and_grad(train_loss, 1)(jax.tree.map(jnp.add, params, shift(key)), hyper, 0)

    losses_K, slopes = jax.lax.map(evaluated, keys, batch_size=at_once)
    finite_K = finite_copies(losses_K, slopes)
    left = finite_K.sum()
    weights_K = _weights(losses_K, finite_K, left, tau)

    def add(i: jax.Array, total: PyTree) -> PyTree:
        return jax.tree.map(lambda x, e: x + weights_K[i].astype(x.dtype) * e, total, shift(keys[i]))

    val, v = jax.value_and_grad(val_loss)(jax.lax.fori_loop(0, copies, add, params))
    u_K = jax.lax.map(lambda key: dot(v, shift(key)), keys, batch_size=at_once)
    pull_K = -weights_K * (u_K - weights_K @ u_K) / tau
    if rate is not None:
        pull_K = pull_K * (rate * tau / sigma**2) * left / jnp.maximum(left - 1, 1)
    discarded = (copies - left).astype(jnp.int32)
    gradient = jax.tree.map(lambda slope: _pulled(pull_K, weights_K, finite_K, slope), slopes)
    return gradient, HypergradientInfo(val, jnp.full_like(val, jnp.nan), discarded, left > 1)


def _check(copies: int, noise: str) -> None:
    if copies < 2:
        raise ValueError(f"evograd compares at least 2 copies; got {copies}: use 2, as published, or more")
    if noise not in NOISE_DISTRIBUTIONS:
        raise ValueError(f"noise must be one of {', '.join(NOISE_DISTRIBUTIONS)}; got '{noise}': use one of these")


def _weights(losses_K: jax.Array, finite_K: jax.Array, left: jax.Array, tau: float) -> jax.Array:
    """Softmax of the negative losses over the `left` finite copies, [K]; 0 if there are none."""
    weights_K = jax.nn.softmax(jnp.where(finite_K, -losses_K / tau, -jnp.inf))
    return jnp.where(left > 0, weights_K, 0)


def _shift(key: jax.Array, params: PyTree, sigma: float, noise: str) -> PyTree:
    """sigma e, shaped like the parameters."""
    leaves, treedef = jax.tree.flatten(params)
    parts = jax.random.split(key, len(leaves))
    draw = NOISE_DISTRIBUTIONS[noise]
    return jax.tree.unflatten(treedef, [sigma * draw(k, x.shape, x.dtype) for k, x in zip(parts, leaves, strict=True)])


def _pulled(pull_K: jax.Array, weights_K: jax.Array, finite_K: jax.Array, slope: jax.Array) -> jax.Array:
    """sum_i pull_i dl_i/dlambda of one leaf [K, ...].

    The pulls sum to 0, so the weighted mean slope is subtracted first: slopes that hardly differ keep their digits.
    """
    slope = jnp.where(finite_K.reshape(-1, *[1] * (slope.ndim - 1)), slope, 0)
    return jnp.tensordot(pull_K, slope - jnp.tensordot(weights_K, slope, 1), 1).astype(slope.dtype)
