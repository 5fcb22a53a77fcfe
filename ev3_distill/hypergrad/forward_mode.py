"""Online forward-mode hypergradients: training carries tangents of its state with respect to the hyperparameters.

A one-step hypergradient asks what a hyperparameter does to the next step. If training continues while it is tuned, this may
settle beside the optimum, because what counts is the effect of all steps so far. With s the parameters and the optimizer's
state, s' = step(s, lambda), and a decay d, the tangents Z = ds / dlambda follow

    Z' = d (ds' / ds) Z + ds' / dlambda,    dV / dlambda = Z' dV / dtheta.

References:
  Franceschi et al., Forward and reverse gradient-based hyperparameter optimization. ICML 2017, arXiv 1703.01785; section 3.2
    (forward mode) and 3.3 (online, without a decay).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ev3_distill.hypergrad.problem import HypergradientInfo, TrainLoss, ValLoss
from ev3_distill.types import PyTree

__all__ = ["ForwardModeState", "forward_mode_init", "forward_mode_step"]


class ForwardModeState(NamedTuple):
    """State of training, and its tangents for H hyperparameters."""

    params: PyTree
    opt_state: PyTree
    tangents: list[jax.Array]  # [H, ...] for every floating leaf of both, d leaf / dlambda


def forward_mode_init(params: PyTree, opt_state: PyTree, hyper: PyTree) -> ForwardModeState:
    """The state before the first step, with tangents of 0."""
    count = len(ravel_pytree(hyper)[0])
    floats, _ = _floats((params, opt_state))
    return ForwardModeState(params, opt_state, [jnp.zeros((count, *leaf.shape), leaf.dtype) for leaf in floats])


def forward_mode_step(
    state: ForwardModeState,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    optimizer: optax.GradientTransformation,
    decay: float = 0.98,
) -> tuple[ForwardModeState, PyTree, HypergradientInfo]:
    """Take one training step and compute the hypergradient through all steps so far, discounted by age.

    With a decay of 1 and fixed hyperparameters, the result is that of the method "forward" over all steps; with 0, that of
    "jvp". A step costs one training step plus, per number in `hyper`, the tangents of its forward and backward pass. Memory
    grows with the size of `hyper`, not with the number of steps.

    Args:
      state: after the previous step, or from `forward_mode_init`.
      hyper: lambda, a pytree of floating arrays, H numbers in all.
      train_loss: l, evaluated at inner step 0.
      val_loss: V.
      optimizer: of the step. Where it has no derivative, such as Adam at a zero gradient in its first step, tangents are 0.
      decay: of the tangents, per step, in [0, 1]; an effect counts decay^age.

    Returns:
      (state after the step, dV / dlambda shaped like `hyper` and 0 where it is not finite, info).
    """
    flat, unravel = ravel_pytree(hyper)
    floats, rebuild = _floats((state.params, state.opt_state))

    def step(floats: list[jax.Array], flat: jax.Array) -> tuple[list[jax.Array], PyTree]:
        params, opt_state = rebuild(floats)
        updates, opt_state = optimizer.update(jax.grad(train_loss)(params, unravel(flat), 0), opt_state, params)
        after = optax.apply_updates(params, updates), opt_state
        return _floats(after)[0], after

    def along(tangents: list[jax.Array], unit: jax.Array) -> tuple[PyTree, list[jax.Array]]:
        _, moved, after = jax.jvp(step, (floats, flat), (tangents, unit), has_aux=True)
        return after, moved

    decayed = [decay * tangent for tangent in state.tangents]
    (params, opt_state), moved = jax.vmap(along, out_axes=(None, 0))(decayed, jnp.eye(len(flat), dtype=flat.dtype))
    tangents = [jnp.where(jnp.isfinite(tangent), tangent, 0) for tangent in moved]
    val, v = jax.value_and_grad(val_loss)(params)
    gradient = jnp.stack([
        jnp.tensordot(tangent, slope, slope.ndim)
        for tangent, slope in zip(tangents, jax.tree.leaves(v), strict=False)  # the parameters' tangents come first
    ]).sum(0)  # fmt: skip
    finite = jnp.isfinite(val) & jnp.isfinite(gradient).all()
    info = HypergradientInfo(val, jnp.full_like(val, jnp.nan), jnp.int32(0), finite)
    return ForwardModeState(params, opt_state, tangents), unravel(jnp.where(finite, gradient, 0)), info


def _floats(tree: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The floating leaves of a tree, and a function that puts others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]

    def rebuild(floats: list[jax.Array]) -> PyTree:
        replacements = iter(floats)
        own = zip(leaves, floating, strict=True)
        return jax.tree.unflatten(treedef, [next(replacements) if is_float else leaf for leaf, is_float in own])

    return [leaf for leaf, is_float in zip(leaves, floating, strict=True) if is_float], rebuild
