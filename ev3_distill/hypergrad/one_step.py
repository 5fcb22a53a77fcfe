"""Hypergradients through one step of an optimizer. Notation as in `problem.py`.

One step theta' = theta + u(g) has exactly

    dV / dlambda = d/dlambda <g(theta, lambda), w>,    w = J' v,    v = dV/dtheta at theta',    J = du/dg.

For SGD, w = -eta v. All methods here estimate this quantity, with no other scaling, so they are interchangeable under one outer
optimizer, including plain SGD. Prefer `jvp`; `t1t2` and `guided` are here for comparison.

References:
  Luketina et al., Scalable gradient-based tuning of continuous regularization hyperparameters, 2016 (T1-T2).
  Liu et al., DARTS: Differentiable architecture search, 2019, equation 8 (two copies along v).
  Kemaev et al., Scalable meta-learning via mixed-mode differentiation, 2025.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.hypergrad.problem import HypergradientInfo, Problem, dot, finite_copies, is_finite
from ev3_distill.types import PyTree


def jvp(
    key: jax.Array,
    problem: Problem,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    gradient: PyTree | None = None,
) -> tuple[PyTree, HypergradientInfo]:
    """Exact for one step, forward over reverse: the derivative of dl/dlambda along w.

    If hyperparameters enter after the student, as in a loss on logits, dl/dlambda needs no backward pass through it. The meta
    step is then one validation gradient and one forward pass with tangents, which stores no activations.

    Args:
      key: ignored.
      problem: parameters, hyperparameters and losses.
      optimizer: of the step.
      opt_state: its state before the step; None for a newly initialized one.
      gradient: g, if the training step has computed it already; None to compute it.

    Returns:
      (dV / dlambda, shaped like `hyper`, info).
    """
    step = _step(problem, optimizer=optimizer, opt_state=opt_state, gradient=gradient)
    hyper_gradient = jax.grad(problem.train_loss, 1)

    def along(direction: PyTree) -> PyTree:
        return jax.jvp(lambda theta: hyper_gradient(theta, problem.hyper, 0), (problem.params,), (direction,))[1]

    # The branch delays this forward pass until the validation gradient is there. Otherwise XLA runs both at once and keeps the
    # activations of both. An optimization barrier does not prevent that on CPUs.
    slope = jax.lax.cond(step.info.finite, along, lambda _: jax.tree.map(jnp.zeros_like, problem.hyper), step.direction)
    return slope, step.info


def t1t2(
    key: jax.Array,
    problem: Problem,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    gradient: PyTree | None = None,
) -> tuple[PyTree, HypergradientInfo]:
    """Exact for one step, reverse over reverse: the gradient of <g(theta, lambda), w> in lambda. Arguments as for `jvp`."""
    step = _step(problem, optimizer=optimizer, opt_state=opt_state, gradient=gradient)

    def along(hyper: PyTree) -> jax.Array:
        return dot(jax.grad(problem.train_loss)(problem.params, hyper, 0), step.direction)

    return jax.grad(along)(problem.hyper), step.info


def guided(
    key: jax.Array,
    problem: Problem,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    gradient: PyTree | None = None,
    radius: float = 1e-3,
) -> tuple[PyTree, HypergradientInfo]:
    """One step from two perturbed copies: (dl/dlambda at theta + e w - dl/dlambda at theta - e w) / 2e.

    The error is of order e^2 where the loss is smooth, and of order e across the kinks of ReLU. Both copies are forward passes.

    This is EvoGrad with the copies theta ± e w in place of random ones, up to scale: with equal weights, EvoGrad's formula
    gives -(e <v, w> / 2 tau) (dl/dlambda at theta + e w - dl/dlambda at theta - e w).

    Args:
      key: ignored.
      problem: parameters, hyperparameters and losses.
      optimizer: of the step; w is -eta v for SGD, and preconditioned by the state of any other.
      opt_state: its state before the step; None for a newly initialized one.
      gradient: g, if the training step has computed it already; None to compute it.
      radius: |e w| over (1 + |theta|^2)^(1/2). A smaller one loses digits; a larger one leaves the first order.

    Returns:
      (dV / dlambda, shaped like `hyper`, info).
    """
    step = _step(problem, optimizer=optimizer, opt_state=opt_state, gradient=gradient)
    length = jnp.sqrt(dot(step.direction, step.direction))
    e = radius * jnp.sqrt(1 + dot(problem.params, problem.params)) / jnp.where(length > 0, length, 1.0)

    def slope(side: jax.Array) -> tuple[jax.Array, PyTree]:
        copy = jax.tree.map(lambda x, w: x + (side * e * w).astype(x.dtype), problem.params, step.direction)
        return jax.value_and_grad(problem.train_loss, 1)(copy, problem.hyper, 0)

    values, slopes = jax.lax.map(slope, jnp.array([1.0, -1.0]))
    finite = finite_copies(values, slopes)
    difference = jax.tree.map(lambda x: (x[0] - x[1]) / (2 * e), slopes)
    return difference, step.info._replace(
        discarded=(~finite).sum().astype(jnp.int32), finite=step.info.finite & finite.all()
    )


class _Step(NamedTuple):
    """One step of the optimizer, as the held-out loss sees it."""

    direction: PyTree  # w
    info: HypergradientInfo


def _step(
    problem: Problem,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None,
    gradient: PyTree | None,
) -> _Step:
    """Take one step. Where the optimizer has no derivative, such as Adam at a zero gradient in its first step, w is 0."""
    params, hyper, train_loss, val_loss = problem
    state = optimizer.init(params) if opt_state is None else opt_state
    gradient = jax.grad(train_loss)(params, hyper, 0) if gradient is None else gradient
    updates, pull = jax.vjp(lambda g: optimizer.update(g, state, params)[0], gradient)
    val, v = jax.value_and_grad(val_loss)(optax.apply_updates(params, updates))
    (direction,) = pull(v)
    direction = jax.tree.map(lambda w: jnp.where(jnp.isfinite(w), w, 0), direction)
    return _Step(direction, HypergradientInfo(val, dot(v, updates), jnp.int32(0), is_finite((val, v))))
