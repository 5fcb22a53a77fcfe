"""Hyperparameters that are tuned while a student trains: their bounds, their outer steps, and the losses they are in.

A space is a pytree of bijections, one per hyperparameter, from free numbers to those that the loss takes: a temperature
above 0, the weights of a mix on the simplex, a rate in log space. Outer steps are an optax optimizer's on the free numbers,
so that no hyperparameter leaves its range; what a run reports, or hands on, is their exponential moving average.

References:
  Ren et al., Learning to reweight examples for robust deep learning, 2018 (a weight for each example).
  Shu et al., Meta-Weight-Net: Learning an explicit mapping for sample weighting, 2019 (a net from loss to weight).
  Bishop, Training with noise is equivalent to Tikhonov regularization, Neural Computation 7(1), 1995 (noise on inputs).
  Kingma and Welling, Auto-encoding variational Bayes, 2014, section 2.4 (the reparametrisation by which noise has a slope).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.hypergrad.one_step import TrainLoss, ValLoss
from ev3_distill.tasks.classification import losses
from ev3_distill.types import Apply, Batch, Loss, PyTree, Variables

__all__ = [
    "FREE", "LOG", "POSITIVE", "SHARE", "SIMPLEX", "Bijection", "Tuned", "constrain", "distillation", "net_weights",
    "noisy", "outer_step", "start", "student_losses", "table_weights", "tuned_values", "unconstrain", "weight_net",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Bijection:
    """Between free numbers and a hyperparameter's range."""

    forward: Callable[[jax.Array], jax.Array]  # free -> in range
    inverse: Callable[[jax.Array], jax.Array]  # in range -> free


def _log_ratios(x: jax.Array) -> jax.Array:
    return jnp.log(x[..., :-1]) - jnp.log(x[..., -1:])


def _shares(free: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.concatenate([free, jnp.zeros_like(free[..., :1])], -1))


FREE = Bijection(lambda x: x, lambda x: x)  # any number
POSITIVE = Bijection(jax.nn.softplus, lambda x: x + jnp.log(-jnp.expm1(-x)))  # above 0, additive far from it
LOG = Bijection(jnp.exp, jnp.log)  # above 0, multiplicative: learning rates, weight decay
SHARE = Bijection(jax.nn.sigmoid, jax.scipy.special.logit)  # in (0, 1)
SIMPLEX = Bijection(_shares, _log_ratios)  # M positive numbers of sum 1, from M - 1 free ones


def constrain(space: PyTree, free: PyTree) -> PyTree:
    """The hyperparameters of free numbers; `space` has a bijection where `free` has an array."""
    return jax.tree.map(lambda bijection, x: bijection.forward(x), space, free)


def unconstrain(space: PyTree, hyper: PyTree) -> PyTree:
    """The free numbers of hyperparameters, as arrays."""
    return jax.tree.map(lambda bijection, x: bijection.inverse(jnp.asarray(x, jnp.result_type(float))), space, hyper)


class Tuned(NamedTuple):
    """Hyperparameters under way."""

    free: PyTree
    average: PyTree  # of `free`, exponential
    opt_state: PyTree
    steps: jax.Array  # int32, outer steps made; those refused are not counted


def start(space: PyTree, hyper: PyTree, optimizer: optax.GradientTransformation) -> Tuned:
    """Hyperparameters before their first outer step."""
    free = unconstrain(space, hyper)
    return Tuned(free, free, optimizer.init(free), jnp.int32(0))


def outer_step(
    tuned: Tuned,
    gradient: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    sound: jax.Array | bool = True,
    decay: jax.Array | float = 0.9,
) -> Tuned:
    """One step of the outer optimizer.

    Args:
      tuned: before.
      gradient: the hypergradient in the free numbers. One that is not finite changes nothing.
      optimizer: the one `start` was given.
      sound: whether there is a gradient, `Info.finite` of the one given; without, nothing changes.
      decay: of the average, in [0, 1); 0 is the last iterate.
    """
    updates, opt_state = optimizer.update(gradient, tuned.opt_state, tuned.free)
    free = optax.apply_updates(tuned.free, updates)
    average = jax.tree.map(lambda a, x: decay * a + (1 - decay) * x, tuned.average, free)
    after = Tuned(free, average, opt_state, tuned.steps + 1)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, free))]).all()
    return jax.tree.map(lambda new, old: jnp.where(sound & finite, new, old), after, tuned)


def tuned_values(space: PyTree, tuned: Tuned) -> PyTree:
    """What the averages of the free numbers say."""
    return constrain(space, tuned.average)


def distillation(hyper: PyTree) -> Loss:
    """mix_0 kd(T) + mix_1 ce of weighted examples, for `hyper` with "temperature", "mix" [2] and perhaps "weights".

    Args:
      hyper: in range. "weights" are those of the batch's examples and multiply `batch.weight`: [B] in both terms, or [B, 2]
        with a column for each term. They are relative, since each term is a weighted mean.

    References:
      Hinton et al., Distilling the knowledge in a neural network, 2015, section 2.
    """
    parts = losses.kd(temperature=hyper["temperature"]), losses.cross_entropy()

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        weights = hyper.get("weights", jnp.ones_like(batch.weight))
        columns = weights.T if weights.ndim == 2 else (weights, weights)
        of_teacher, of_labels = (batch._replace(weight=batch.weight * column) for column in columns)
        return hyper["mix"][0] * parts[0](logits, of_teacher) + hyper["mix"][1] * parts[1](logits, of_labels)

    return loss


def table_weights(table: jax.Array, batch: Batch) -> jax.Array:
    """The weights [B] of a batch's examples in a table [N] of positive numbers by `batch.index`."""
    return table[batch.index]


def weight_net(key: jax.Array, *, inputs: int = 1, outputs: int = 1, hidden: int = 100) -> PyTree:
    """The parameters of a net from what is seen of an example, such as its loss, to weights that all begin at 1/2."""
    return {
        "w1": jax.random.normal(key, (inputs, hidden)) / inputs**0.5, "b1": jnp.zeros(hidden),
        "w2": jnp.zeros((hidden, outputs)), "b2": jnp.zeros(outputs),
    }  # fmt: skip


def net_weights(net: PyTree, seen: jax.Array) -> jax.Array:
    """The weights [B, O] in (0, 1) of examples of which values [B, I], at least 0, are seen; these count as data.

    They enter as log(1 + value), so that a few extreme ones do not saturate the net.
    """
    values = jnp.log1p(jax.lax.stop_gradient(seen))
    return jax.nn.sigmoid(jax.nn.relu(values @ net["w1"] + net["b1"]) @ net["w2"] + net["b2"])


def noisy(inputs: jax.Array, strength: jax.Array | float, key: jax.Array) -> jax.Array:
    """x + s std(x) e of inputs [B, ...] with e ~ N(0, 1): a function of s, whose slope is std(x) e, as the key fixes e.

    Args:
      inputs: x, floating, or uint8, which are taken as x / 255, as networks take them.
      strength: s, above 0.
      key: of e, for each step another.

    Returns:
      [B, ...] floating; std(x) is one number, over all of the batch.

    References:
      Bishop 1995: where s is small that is a penalty on how steep the student is, of weight (s std(x))^2 / 2.
      Kingma and Welling 2014, section 2.4.
    """
    x = inputs.astype(jnp.float32) / 255 if inputs.dtype == jnp.uint8 else inputs
    return x + (strength * jax.lax.stop_gradient(x.std()) * jax.random.normal(key, x.shape, x.dtype)).astype(x.dtype)


def student_losses(
    apply: Apply,
    variables: Variables,
    train_batch: Batch,
    val_batch: Batch,
    *,
    loss: Callable[[PyTree, jax.Array, Batch], jax.Array],
    val_loss: Loss,
    key: jax.Array | None = None,
    batch_statistics: bool = True,
    inputs_of: Callable[[PyTree, Batch], jax.Array] | None = None,
    parts: int = 1,
) -> tuple[TrainLoss, ValLoss]:
    """A student's losses as functions of its parameters, which is what `hypergradient` takes.

    Both hold the student's statistics fixed and drop what a training pass makes of them; all copies of the parameters share the
    key's random numbers.

    Args:
      apply: the student's.
      variables: of which the statistics are used.
      train_batch: whose loss has hyperparameters, of every inner step.
      val_batch: held out.
      loss: (hyper, logits [B, K], batch) -> scalar.
      val_loss: on the held-out batch.
      key: of dropout in training.
      batch_statistics: whether BatchNorm takes the held-out batch's own statistics, or the running ones, which a young student
        has hardly gathered.
      inputs_of: (hyper, batch) -> [B, ...], the inputs that a training pass sees; None: the batch's own. The loss takes the
        batch as it is.
      parts: of the held-out batch, which they divide; its loss is the mean of theirs. Gradients are made of one part after the
        other, so that memory is that of one; to BatchNorm each is a batch of its own.
    """

    def forward(params: Any, inputs: jax.Array, train: bool) -> jax.Array:
        return apply(Variables(params, variables.stats), inputs, train=train, key=key)[0]

    def training(params: PyTree, hyper: PyTree, step: Any) -> jax.Array:
        inputs = train_batch.inputs if inputs_of is None else inputs_of(hyper, train_batch)
        return loss(hyper, forward(params, inputs, True), train_batch)

    def validation(params: PyTree, batch: Batch) -> jax.Array:
        return val_loss(forward(params, batch.inputs, batch_statistics), batch)

    return training, _mean_of_parts(validation, val_batch, parts)


def _mean_of_parts(loss: Callable[[PyTree, Batch], jax.Array], batch: Batch, parts: int) -> ValLoss:
    """The mean loss of a batch's parts, whose gradient is made and added up where the value is: no part's pass is kept."""
    if parts == 1:
        return lambda params: loss(params, batch)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(parts, len(leaf) // parts, *leaf.shape[1:]), batch)

    @jax.custom_jvp
    def mean(params: PyTree) -> jax.Array:
        return jax.lax.map(lambda part: loss(params, part), stacked).mean()

    @mean.defjvp
    def _(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[jax.Array, jax.Array]:
        (params,), (tangent,) = primals, tangents

        def add(total: PyTree, part: Batch) -> tuple[PyTree, jax.Array]:
            value, gradient = jax.value_and_grad(loss)(params, part)
            return jax.tree.map(lambda t, g: t + g / parts, total, gradient), value

        gradient, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), stacked)
        along = jax.tree.map(jnp.vdot, gradient, tangent)
        return values.mean(), jnp.stack(jax.tree.leaves(along)).sum()

    return mean
