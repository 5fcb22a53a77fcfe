"""Hypergradients: how the hyperparameters of a training loss move the loss on held-out examples.

theta are a student's parameters, P numbers; lambda its hyperparameters; l(theta, lambda, t) the training loss of step t, and
g its gradient in theta; V(theta) the held-out loss. What is estimated is dV(theta') / dlambda, theta' being what training
steps from theta lead to. One step of an optimizer, theta' = theta + u(g), has exactly

    dV / dlambda = d/dlambda <g(theta, lambda), w>,    w = J' v,    v = dV/dtheta at theta',    J = du/dg,

for SGD w = -eta v. Its unit is that of V over that of lambda, for the given optimizer: no method is scaled otherwise, so that
they may change places under one outer optimizer, plain SGD included. `jvp` is the method to take; the others are there to
compare with, or for longer horizons. `tangents.py` has another, for training that goes on while it is tuned.

Losses are functions of their arguments alone. What else they use, such as batches, keys of dropout and augmentation, and
statistics of BatchNorm, they hold fixed, and they drop the statistics that a training pass would leave behind: then copies
of the parameters share their random numbers, and nothing of a copy stays. `ev3_distill.hyperparameters.student_losses` makes
such losses of a student.

References:
  Luketina et al., Scalable gradient-based tuning of continuous regularization hyperparameters, 2016 (T1-T2).
  Franceschi et al., Forward and reverse gradient-based hyperparameter optimization, 2017.
  Liu et al., DARTS: Differentiable architecture search, 2019, equation 8 (two copies along v).
  Bohdal et al., EvoGrad: Efficient gradient-based meta-learning and hyperparameter optimization, 2021.
  Kemaev et al., Scalable meta-learning via mixed-mode differentiation, 2025.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ev3_distill.types import PyTree

__all__ = ["METHODS", "NOISE", "Info", "evograd", "forward", "guided", "hypergradient", "jvp", "t1t2", "unrolled"]

TrainLoss = Callable[
    [PyTree, PyTree, Any], jax.Array
]  # (params, hyper, inner step) -> scalar; one-step methods ask step 0
ValLoss = Callable[[PyTree], jax.Array]  # params -> scalar

NOISE: dict[str, Callable[..., jax.Array]] = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


class Info(NamedTuple):
    """What a method saw, scalars."""

    val_loss: jax.Array  # where the validation gradient was taken
    log_rate: jax.Array  # dV / dlog eta, for a factor eta on the optimizer's steps; nan where the method makes none
    discarded: jax.Array  # int32, copies that were not finite
    finite: jax.Array  # bool; where it is false, the gradient returned is 0


def hypergradient(
    key: jax.Array,
    params: PyTree,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    method: str = "jvp",
    **options: Any,
) -> tuple[PyTree, Info]:
    """The hypergradient by a method of METHODS, and 0 in its place where it is not finite.

    Args:
      key: of random copies; methods that draw none ignore it.
      params: theta, a pytree of floating arrays.
      hyper: lambda, a pytree of floating arrays.
      train_loss: l. A hyperparameter that it ignores gets exactly 0.
      val_loss: V.
      method: a name of METHODS.
      **options: the method's own, by its docstring.

    Returns:
      (dV / dlambda, shaped like `hyper`, info).

    Raises:
      ValueError: no such method.
    """
    if method not in METHODS:
        raise ValueError(f"a method is one of {', '.join(METHODS)}; got '{method}': name one of these")
    gradient, info = METHODS[method](key, params, hyper, train_loss, val_loss, **options)
    finite = info.finite & _finite(gradient)
    gradient = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), gradient)
    return gradient, info._replace(finite=finite)


def jvp(
    key: jax.Array,
    params: PyTree,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    gradient: PyTree | None = None,
) -> tuple[PyTree, Info]:
    """Exact for one step, forward over reverse: the derivative of dl/dlambda along w.

    Where hyperparameters enter behind the student, as in a loss on logits, dl/dlambda needs no backward pass through it: the
    meta step is one validation gradient and one forward pass with tangents, which keeps no activations.

    Args:
      key: ignored.
      params: theta.
      hyper: lambda.
      train_loss: l.
      val_loss: V.
      optimizer: of the step.
      opt_state: its state before the step; None is that of a start.
      gradient: g, where the training step has made it already; None makes it.
    """
    step = _step(params, hyper, train_loss, val_loss, optimizer=optimizer, opt_state=opt_state, gradient=gradient)
    of_hyper = jax.grad(train_loss, 1)

    def along(direction: PyTree) -> PyTree:
        return jax.jvp(lambda theta: of_hyper(theta, hyper, 0), (params,), (direction,))[1]

    # A branch, since it cannot start before the validation gradient is there: XLA would run this forward pass beside that
    # one, and keep the activations of both. A barrier does not hold it on CPUs.
    slope = jax.lax.cond(step.info.finite, along, lambda _: jax.tree.map(jnp.zeros_like, hyper), step.direction)
    return slope, step.info


def t1t2(
    key: jax.Array,
    params: PyTree,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    gradient: PyTree | None = None,
) -> tuple[PyTree, Info]:
    """Exact for one step, reverse over reverse: the gradient in lambda of <g(theta, lambda), w>; arguments as of `jvp`."""
    step = _step(params, hyper, train_loss, val_loss, optimizer=optimizer, opt_state=opt_state, gradient=gradient)

    def along(hyper: PyTree) -> jax.Array:
        return _dot(jax.grad(train_loss)(params, hyper, 0), step.direction)

    return jax.grad(along)(hyper), step.info


def guided(
    key: jax.Array,
    params: PyTree,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    gradient: PyTree | None = None,
    radius: float = 1e-3,
) -> tuple[PyTree, Info]:
    """One step by two copies: (dl/dlambda at theta + e w - dl/dlambda at theta - e w) / 2e.

    The error is of order e^2 where the loss is smooth, and of order e across the kinks of ReLU.

    That is EvoGrad with the two copies theta +- e w in place of random ones, but for its scale: with equal weights its formula
    gives -(e <v, w> / 2 tau) (dl/dlambda at theta + e w - dl/dlambda at theta - e w). Both copies are forward passes.

    Args:
      key: ignored.
      params: theta.
      hyper: lambda.
      train_loss: l.
      val_loss: V.
      optimizer: of the step; w is -eta v for SGD, and preconditioned by the state of any other.
      opt_state: its state before the step; None is that of a start.
      gradient: g, where the training step has made it already; None makes it.
      radius: |e w| over (1 + |theta|^2)^(1/2). Smaller ones cost digits, greater ones see more than the first order.
    """
    step = _step(params, hyper, train_loss, val_loss, optimizer=optimizer, opt_state=opt_state, gradient=gradient)
    length = jnp.sqrt(_dot(step.direction, step.direction))
    e = radius * jnp.sqrt(1 + _dot(params, params)) / jnp.where(length > 0, length, 1.0)

    def slope(side: jax.Array) -> tuple[jax.Array, PyTree]:
        copy = jax.tree.map(lambda x, w: x + (side * e * w).astype(x.dtype), params, step.direction)
        return jax.value_and_grad(train_loss, 1)(copy, hyper, 0)

    values, slopes = jax.lax.map(slope, jnp.array([1.0, -1.0]))
    sound = _finite_rows(values, slopes)
    gradient = jax.tree.map(lambda x: (x[0] - x[1]) / (2 * e), slopes)
    return gradient, step.info._replace(
        discarded=(~sound).sum().astype(jnp.int32), finite=step.info.finite & sound.all()
    )


def evograd(
    key: jax.Array,
    params: PyTree,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    copies: int = 2,
    sigma: float = 1e-3,
    tau: float = 0.05,
    noise: str = "rademacher",
    rate: float | None = None,
    at_once: int = 1,
) -> tuple[PyTree, Info]:
    """EvoGrad: random copies theta_i = theta + sigma e_i, weights w = softmax(-l_i / tau), V at theta* = sum_i w_i theta_i.

    Through the weights alone, dV/dlambda = -(1 / tau) sum_i w_i (u_i - sum_j w_j u_j) dl_i/dlambda with u_i = <v, theta_i>: a
    one-step hypergradient of rate (sigma^2 / tau) (K - 1) / K seen through a random projection of rank K - 1. A copy is
    made anew from its key wherever it is needed, so that memory holds one at a time (`at_once`), whatever K is, and K numbers
    per hyperparameter. It cannot tune a learning rate, which no training loss contains.

    Args:
      key: of the copies.
      params: theta.
      hyper: lambda.
      train_loss: l. A copy whose loss or slope is not finite gets no weight.
      val_loss: V.
      copies: K, at least 2.
      sigma: their distance from theta in each parameter.
      tau: the softmax's temperature, in units of l.
      noise: a name of NOISE, the distribution of e.
      rate: eta, to scale the result to a step of SGD of that rate; None leaves it as published.
      at_once: copies evaluated side by side.

    Raises:
      ValueError: fewer than two copies, or no such noise.
    """
    if copies < 2:
        raise ValueError(f"evograd compares copies, at least 2; got {copies}: take 2, as published")
    if noise not in NOISE:
        raise ValueError(f"noise is one of {', '.join(NOISE)}; got '{noise}': name one of these")
    keys = jax.random.split(key, copies)

    def shift(key: jax.Array) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        parts = jax.random.split(key, len(leaves))
        drawn = [sigma * NOISE[noise](k, x.shape, x.dtype) for k, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(treedef, drawn)

    def tried(key: jax.Array) -> tuple[jax.Array, PyTree]:
        return jax.value_and_grad(train_loss, 1)(jax.tree.map(jnp.add, params, shift(key)), hyper, 0)

    losses_K, slopes = jax.lax.map(tried, keys, batch_size=at_once)
    sound_K = _finite_rows(losses_K, slopes)
    left = sound_K.sum()
    weights_K = jax.nn.softmax(jnp.where(sound_K, -losses_K / tau, -jnp.inf))
    weights_K = jnp.where(left > 0, weights_K, 0)

    def add(i: jax.Array, total: PyTree) -> PyTree:
        return jax.tree.map(lambda x, e: x + weights_K[i].astype(x.dtype) * e, total, shift(keys[i]))

    val, v = jax.value_and_grad(val_loss)(jax.lax.fori_loop(0, copies, add, params))
    u_K = jax.lax.map(lambda key: _dot(v, shift(key)), keys, batch_size=at_once)
    pull_K = -weights_K * (u_K - weights_K @ u_K) / tau
    if rate is not None:
        pull_K = pull_K * (rate * tau / sigma**2) * left / jnp.maximum(left - 1, 1)

    def total(
        slope: jax.Array,
    ) -> jax.Array:  # the pulls sum to 0: less their mean, slopes that hardly differ keep their digits
        slope = jnp.where(sound_K.reshape(-1, *[1] * (slope.ndim - 1)), slope, 0)
        return jnp.tensordot(pull_K, slope - jnp.tensordot(weights_K, slope, 1), 1).astype(slope.dtype)

    discarded = (copies - left).astype(jnp.int32)
    return jax.tree.map(total, slopes), Info(val, jnp.full_like(val, jnp.nan), discarded, left > 1)


def unrolled(
    key: jax.Array,
    params: PyTree,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    steps: int = 1,
) -> tuple[PyTree, Info]:
    """Exact for `steps` steps of the optimizer, reverse over reverse; keeps what all of them need.

    Args:
      key: ignored.
      params: theta.
      hyper: lambda.
      train_loss: l, at the inner steps from 0.
      val_loss: V.
      optimizer: of the steps.
      opt_state: its state before them; None is that of a start.
      steps: n.
    """
    reached = _reached(params, train_loss, val_loss, optimizer=optimizer, opt_state=opt_state, steps=steps)
    val, (gradient, log_rate) = jax.value_and_grad(reached, (0, 1))(hyper, 0.0)
    return gradient, Info(val, log_rate, jnp.int32(0), jnp.bool_(True))


def forward(
    key: jax.Array,
    params: PyTree,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    steps: int = 1,
) -> tuple[PyTree, Info]:
    """Exact for `steps` steps of the optimizer, by forward tangents: memory does not grow with the steps.

    It trains anew for each number in `hyper`, one after the other: for a few of them over a longer horizon.
    Arguments as of `unrolled`.
    """
    reached = _reached(params, train_loss, val_loss, optimizer=optimizer, opt_state=opt_state, steps=steps)
    flat, unravel = ravel_pytree((hyper, jnp.zeros(())))

    def slope(tangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(lambda flat: reached(*unravel(flat)), (flat,), (tangent,))

    values, slopes = jax.lax.map(slope, jnp.eye(len(flat), dtype=flat.dtype))
    gradient, log_rate = unravel(slopes)
    return gradient, Info(values[0], log_rate, jnp.int32(0), jnp.bool_(True))


METHODS: dict[str, Callable[..., tuple[PyTree, Info]]] = {
    "jvp": jvp,
    "guided": guided,
    "evograd": evograd,
    "t1t2": t1t2,
    "unrolled": unrolled,
    "forward": forward,
}


class _Step(NamedTuple):
    """One step of the optimizer, seen from the held-out loss."""

    direction: PyTree  # w
    info: Info


def _step(
    params: PyTree,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None,
    gradient: PyTree | None,
) -> _Step:
    """Where an optimizer has no derivative, as Adam's has none at a gradient of 0 from a start, w is 0."""
    state = optimizer.init(params) if opt_state is None else opt_state
    gradient = jax.grad(train_loss)(params, hyper, 0) if gradient is None else gradient
    updates, pull = jax.vjp(lambda g: optimizer.update(g, state, params)[0], gradient)
    val, v = jax.value_and_grad(val_loss)(optax.apply_updates(params, updates))
    (direction,) = pull(v)
    direction = jax.tree.map(lambda w: jnp.where(jnp.isfinite(w), w, 0), direction)
    return _Step(direction, Info(val, _dot(v, updates), jnp.int32(0), _finite((val, v))))


def _reached(
    params: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None,
    steps: int,
) -> Callable[[PyTree, Any], jax.Array]:
    """(hyper, log of a factor on every step) -> V after the steps."""
    begin = params, optimizer.init(params) if opt_state is None else opt_state

    def reached(hyper: PyTree, log_rate: Any) -> jax.Array:
        def advance(carry: tuple[PyTree, PyTree], t: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
            theta, state = carry
            updates, state = optimizer.update(jax.grad(train_loss)(theta, hyper, t), state, theta)
            return (optax.apply_updates(theta, optax.tree.scale(jnp.exp(log_rate), updates)), state), None

        return val_loss(jax.lax.scan(advance, begin, jnp.arange(steps))[0][0])

    return reached


def _dot(one: PyTree, other: PyTree) -> jax.Array:
    parts = jax.tree.map(jnp.vdot, one, other)
    return jnp.stack(jax.tree.leaves(parts)).sum()


def _finite(tree: PyTree) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _finite_rows(values_K: jax.Array, slopes: PyTree) -> jax.Array:
    """Which copies are finite, [K] bool, in their losses and in all leaves [K, ...] of their slopes."""
    rows = [jnp.isfinite(leaf).reshape(len(values_K), -1).all(1) for leaf in jax.tree.leaves(slopes)]
    return jnp.stack([jnp.isfinite(values_K), *rows]).all(0)
