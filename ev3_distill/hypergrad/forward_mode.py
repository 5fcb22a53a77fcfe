"""Tangents that training carries along: how its parameters depend on the hyperparameters it has had so far.

One step's slope (`hypergrad.jvp`) asks what a hyperparameter does to the next step. Where training goes on while it is tuned,
that may settle beside the optimum: what matters is what all steps so far have made of the parameters. In the symbols of
`hypergrad.py`, with s the parameters and the optimizer's state, s' = step(s, lambda), and a decay d,

    Z' = d (ds' / ds) Z + ds' / dlambda,    dV / dlambda = Z' dV / dtheta.

References:
  Franceschi et al., Forward and reverse gradient-based hyperparameter optimization, 2017.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ev3_distill.hypergrad.one_step import Info, TrainLoss, ValLoss
from ev3_distill.types import PyTree

__all__ = ["Carried", "carried", "carrying"]


class Carried(NamedTuple):
    """A training that knows how it depends on H hyperparameters."""

    params: PyTree
    opt_state: PyTree
    tangents: list[jax.Array]  # [H, ...] of every floating leaf of both, d leaf / dlambda


def carrying(params: PyTree, opt_state: PyTree, hyper: PyTree) -> Carried:
    """Before the first step, which nothing depends on yet."""
    count = len(ravel_pytree(hyper)[0])
    floats, _ = _floats((params, opt_state))
    return Carried(params, opt_state, [jnp.zeros((count, *leaf.shape), leaf.dtype) for leaf in floats])


def carried(
    carry: Carried,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    optimizer: optax.GradientTransformation,
    decay: float = 0.98,
) -> tuple[Carried, PyTree, Info]:
    """A step of training, and the hypergradient after it through all the steps before, the older the less.

    With a decay of 1 and fixed hyperparameters it is that of `hypergrad.forward` over all steps; with 0, that of
    `hypergrad.jvp`. A step costs one of training and, per number in `hyper`, the tangents of its passes, forward and backward;
    memory grows with these numbers, and not with the steps.

    Args:
      carry: of the step before, or of `carrying`.
      hyper: lambda, a pytree of floating arrays, H numbers in all.
      train_loss: l, asked for step 0.
      val_loss: V.
      optimizer: of the step. Where it has no derivative, as Adam has none at gradients of 0 from a start, tangents are 0.
      decay: of the tangents, a step, in [0, 1]: what an older step did counts decay^age.

    Returns:
      (after the step, dV / dlambda shaped like `hyper` and 0 where it is not finite, info).

    References:
      Franceschi et al. 2017, section 3.2 (forward mode), and 3.3: in real time, there without a decay.
    """
    flat, unravel = ravel_pytree(hyper)
    floats, rebuilt = _floats((carry.params, carry.opt_state))

    def step(floats: list[jax.Array], flat: jax.Array) -> tuple[list[jax.Array], PyTree]:
        params, opt_state = rebuilt(floats)
        updates, opt_state = optimizer.update(jax.grad(train_loss)(params, unravel(flat), 0), opt_state, params)
        after = optax.apply_updates(params, updates), opt_state
        return _floats(after)[0], after

    def along(tangents: list[jax.Array], unit: jax.Array) -> tuple[PyTree, list[jax.Array]]:
        _, moved, after = jax.jvp(step, (floats, flat), (tangents, unit), has_aux=True)
        return after, moved

    older = [decay * tangent for tangent in carry.tangents]
    (params, opt_state), moved = jax.vmap(along, out_axes=(None, 0))(older, jnp.eye(len(flat), dtype=flat.dtype))
    tangents = [jnp.where(jnp.isfinite(tangent), tangent, 0) for tangent in moved]
    val, v = jax.value_and_grad(val_loss)(params)
    gradient = jnp.stack([
        jnp.tensordot(tangent, slope, slope.ndim)
        for tangent, slope in zip(tangents, jax.tree.leaves(v), strict=False)  # the parameters' come first
    ]).sum(0)  # fmt: skip
    finite = jnp.isfinite(val) & jnp.isfinite(gradient).all()
    info = Info(val, jnp.full_like(val, jnp.nan), jnp.int32(0), finite)
    return Carried(params, opt_state, tangents), unravel(jnp.where(finite, gradient, 0)), info


def _floats(tree: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The floating leaves of a tree, and what puts others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]

    def rebuilt(floats: list[jax.Array]) -> PyTree:
        given = iter(floats)
        own = zip(leaves, floating, strict=True)
        return jax.tree.unflatten(treedef, [next(given) if is_float else leaf for leaf, is_float in own])

    return [leaf for leaf, is_float in zip(leaves, floating, strict=True) if is_float], rebuilt
