"""Arms that tune their loss while they train: temperature, mix, example weights, learning rate, noise on inputs.

Every few training steps, an outer step follows the hypergradient of the held-out loss, exact for the training step just taken
(`hypergrad.one_step.jvp`). The held-out loss is that of the proposal, the averaged iterate. With the iterate's own loss, tuning
favored whatever calms the last steps, such as a high temperature, and moved away from the best settings. The temperature moves
in log space; with softplus it hardly left 20. The hyperparameters are part of the arm's state.

If examples are weighted, the held-out loss is the Brier score. Cross-entropy punishes confidence on the few held-out examples
that the student gets wrong, and wrong labels make a student less confident: in one of five runs their weights, near 0 for
thousands of steps, rose above all others within a hundred. Scores that punish confidence less did not show this.

References:
  Bohdal et al., EvoGrad. NeurIPS 2021, arXiv 2106.10575.
  Bishop, Training with noise is equivalent to Tikhonov regularization, Neural Computation 7(1), 1995.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.arms.gradient import GradientState, Schedule, update_average
from ev3_distill.arms.tunable_loss import add_noise, distillation, label_losses, net_weights, weight_net
from ev3_distill.errors import InputError
from ev3_distill.hypergrad import (
    OuterState,
    hypergradient,
    outer_init,
    outer_step,
    student_train_loss,
    student_val_loss,
)
from ev3_distill.hypergrad.spaces import FREE, LOG, SIMPLEX, constrain
from ev3_distill.tasks.classification import example_scores, losses
from ev3_distill.types import Apply, Arm, Batch, Draw, Loss, PyTree, Stretch, Variables

TUNABLE = ("temperature", "mix", "weights", "rate", "noise")
VAL_PARTS = 2  # parts of a held-out batch: an outer step then needs less memory than the training step before it
NOISE_SALT = (
    0x6E6F6973  # folded into a step's key; far from the small numbers that dropout and held-out batches fold in
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What a tuned arm tunes, and how.

    Noise is added to the inputs of training passes only. Labels, teacher outputs and the held-out loss refer to the original
    examples. Noise enters before the network, so its outer step takes a backward pass with tangents through the network, where
    the other hyperparameters take a forward pass. Its slope in log s has a part of mean 0 that falls as s, and an informative
    part that falls as s^2. A small strength is therefore moved mostly by chance, and the strength of a young student may become
    small before noise would help.

    Attributes:
      tune: hyperparameters to tune, of TUNABLE. "weights" is a network from an example's `label_losses` to its weights in both
        terms; "rate" a factor on the optimizer's steps; "noise" the strength of Gaussian noise on the inputs (`add_noise`),
        which is off unless tuned.
      temperature: T at the start.
      mix: weight of the teacher's term at the start, in (0, 1).
      noise: strength at the start, above 0, in units of the inputs' standard deviation.
      outer_optimizer: of the unconstrained hyperparameters. None: Adam at 0.2, which is invariant to scale, and at 0.01 for the
        network of weights; at 0.2 it soon returns the same weight for all examples.
      val_loss: held-out loss of the proposed student. None: cross-entropy of the labels, or their Brier score if "weights" are
        tuned.
      every: training steps per outer step.
      method: of `hypergradient`, one for a single optimizer step.

    Raises:
      InputError: `tune` contains something else.
    """

    tune: tuple[str, ...] = ("temperature", "mix")
    temperature: float = 4.0
    mix: float = 0.9
    noise: float = 0.1
    outer_optimizer: optax.GradientTransformation | None = None
    val_loss: Loss | None = None
    every: int = 5
    method: str = "jvp"

    def __post_init__(self) -> None:
        for name in self.tune:
            if name not in TUNABLE:
                raise InputError(f"an arm can tune {', '.join(TUNABLE)}; got '{name}': choose some of these")


class TunedState(NamedTuple):
    """State of a tuned trajectory."""

    trajectory: GradientState
    tuned: OuterState


def tuned_arm(
    name: str,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    config: TuningConfig | None = None,
    *,
    average: float = 8.0,
    anneal: Schedule | None = None,
) -> Arm:
    """An arm with the loss mix kd(T) + (1 - mix) ce, some of whose hyperparameters follow the held-out loss.

    Args:
      name: unique within a run.
      apply: the student's forward pass.
      optimizer: of the student.
      config: what to tune, and how; None for the defaults of `TuningConfig`.
      average: eta of the proposal's polynomial-decay average, as in `gradient_arm`.
      anneal: schedule of a factor on every update, as in `gradient_arm`.
    """
    config = config or TuningConfig()
    loss = _tunable_loss(config)
    outer = config.outer_optimizer or _default_outer_optimizer(loss.start)
    step = _step(_Setup(apply, optimizer, outer, loss, config, average, anneal))

    def init(variables: Variables) -> TunedState:
        opt_state, age = optimizer.init(variables.params), jnp.int32(0)
        tuned = outer_init(loss.space, loss.start, outer)
        return TunedState(GradientState(variables, opt_state, variables, age), tuned)

    def propose(state: TunedState, draw: Draw, stretch: Stretch, held_out: Draw) -> tuple[TunedState, Variables]:
        def advance(i: jax.Array, state: TunedState) -> TunedState:
            return step(state, draw, held_out, stretch, i)

        state = jax.lax.fori_loop(0, stretch.steps, advance, state)
        return state, state.trajectory.average or state.trajectory.iterate

    def shows(state: TunedState) -> dict[str, jax.Array]:
        return {name: x for name, x in constrain(loss.space, state.tuned.average).items() if name != "weights"}

    return Arm(name, init, propose, uses_held_out=True, hyperparameters=shows)


class _TunableLoss(NamedTuple):
    """A loss of unconstrained hyperparameters."""

    value: Callable[[PyTree, jax.Array, Batch], jax.Array]  # (free, logits, batch) -> scalar
    val: Loss  # held-out loss
    space: PyTree  # bijections of the tuned hyperparameters
    start: PyTree  # their initial values


def _tunable_loss(config: TuningConfig) -> _TunableLoss:
    ranges = {"temperature": LOG, "mix": SIMPLEX, "rate": LOG, "noise": LOG, "weights": FREE}
    fixed = {"temperature": jnp.float32(config.temperature), "mix": jnp.array([config.mix, 1 - config.mix])}
    starts = fixed | {"rate": jnp.float32(1), "noise": jnp.float32(config.noise)}
    start = {name: starts[name] for name in config.tune if name != "weights"}
    weighs = "weights" in config.tune
    if weighs:
        start["weights"] = weight_net(jax.random.key(0), inputs=2, outputs=2)
        ranges["weights"] = jax.tree.map(lambda _: FREE, start["weights"])
    space = {name: ranges[name] for name in start}

    def value(free: PyTree, logits: jax.Array, batch: Batch) -> jax.Array:
        hyper = fixed | constrain(space, free)
        if weighs:
            hyper["weights"] = net_weights(hyper["weights"], label_losses(logits, batch))
        return distillation(hyper)(logits, batch)

    val = config.val_loss or (losses.negated(example_scores.brier) if weighs else losses.cross_entropy())
    return _TunableLoss(value, val, space, start)


class _Setup(NamedTuple):
    """All that the steps of a tuned arm are built from."""

    apply: Apply
    optimizer: optax.GradientTransformation
    outer: optax.GradientTransformation
    loss: _TunableLoss
    config: TuningConfig
    average: float
    anneal: Schedule | None


class _Training(NamedTuple):
    """One training step, as the outer step that follows it needs it."""

    before: GradientState
    batch: Batch
    key: jax.Array
    gradient: PyTree
    stats: PyTree  # after the step
    rate: jax.Array | float  # factor on the update
    age: jax.Array  # int32, after the step


def _step(setup: _Setup) -> Callable[[TunedState, Draw, Draw, Stretch, jax.Array], TunedState]:
    """One training step, and every few of them an outer step after it."""
    apply, optimizer, _, loss, config, average, anneal = setup

    def step(state: TunedState, draw: Draw, held_out: Draw, stretch: Stretch, i: jax.Array) -> TunedState:
        before, tuned = state
        batch, key = draw(stretch.start + i)

        def objective(params: PyTree) -> tuple[jax.Array, PyTree]:
            inputs = _training_inputs(tuned.free, batch, key=key)
            logits, after = apply(Variables(params, before.iterate.stats), inputs, train=True, key=key)
            return loss.value(tuned.free, logits, batch), after.stats

        params = before.iterate.params
        gradient, stats = jax.grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, before.opt_state, params)
        rate = jnp.exp(tuned.free["rate"]) if "rate" in config.tune else 1.0
        if anneal is not None:
            rate *= anneal(stretch.spent + i * stretch.per_step)
        iterate = Variables(optax.apply_updates(params, optax.tree.scale(rate, updates)), stats)
        age = before.age + 1
        training = _Training(before, batch, key, gradient, stats, rate, age)

        if loss.start:
            tuned = jax.lax.cond(
                (age % config.every) == 0,
                lambda tuned: _outer_step(setup, training, tuned, held_out(stretch.start + i)[0]),
                lambda tuned: tuned,
                tuned,
            )
        following = update_average(before.average, iterate, age, average)
        return TunedState(GradientState(iterate, opt_state, following, age), tuned)

    return step


def _outer_step(setup: _Setup, training: _Training, tuned: OuterState, held_out: Batch) -> OuterState:
    """Move the hyperparameters along the hypergradient of the proposal's held-out loss."""
    apply, optimizer, outer, loss, config, average, _ = setup
    before, batch, key, gradient, stats, rate, age = training
    student, params = before.iterate, before.iterate.params
    inputs_of = functools.partial(_training_inputs, key=key)  # the same noise as in the training step
    train_loss = student_train_loss(apply, student.stats, batch, loss.value, key=key, inputs_of=inputs_of)
    parts = math.gcd(VAL_PARTS, len(held_out.index))
    student_loss = student_val_loss(apply, student.stats, held_out, loss.val, key=key, parts=parts)

    def proposal_loss(params: PyTree) -> jax.Array:
        proposed = update_average(before.average, Variables(params, stats), age, average)
        return student_loss(params if proposed is None else proposed.params)

    factor = optax.scale(rate)
    slope, info = hypergradient(
        key,
        params,
        tuned.free,
        train_loss,
        proposal_loss,
        method=config.method,
        optimizer=optax.chain(optimizer, factor),
        opt_state=(before.opt_state, factor.init(params)),
        gradient=gradient,
    )
    if "rate" in config.tune:
        slope["rate"] = info.log_rate
    return outer_step(tuned, slope, outer, valid=info.finite)


def _default_outer_optimizer(start: PyTree) -> optax.GradientTransformation:
    if "weights" not in start:
        return optax.adam(0.2)
    rates = {"net": optax.adam(0.01), "number": optax.adam(0.2)}
    return optax.partition(rates, {name: "net" if name == "weights" else "number" for name in start})


def _training_inputs(free: PyTree, batch: Batch, *, key: jax.Array) -> jax.Array:
    """The inputs of a training pass: the batch's, with noise if its strength is tuned."""
    if "noise" not in free:
        return batch.inputs
    return add_noise(batch.inputs, LOG.forward(free["noise"]), jax.random.fold_in(key, NOISE_SALT))
