"""Gradient arms that tune their loss while they train: temperature, mix, weights of examples, learning rate, noise on inputs.

Every few training steps an outer step follows the hypergradient of the loss on held-out examples, exact for the training step
just made (`hypergrad.jvp`). The loss is that of the proposal, the average iterate: that of the iterate itself favours whatever
calms its last steps, such as a high temperature, and led away from the best settings. The temperature moves in log space: by
softplus it hardly left 20. The hyperparameters are a part of the arm's state: what is rejected leaves nothing of them behind.

Where examples are weighted, the loss is the Brier score. Cross-entropy counts how sure a student is of the few held-out
examples that it gets wrong, and labels that are wrong make it less sure: in one of five runs their weights, near 0 for
thousands of steps, rose above all others within a hundred. By scores that count it less, or not at all, they did not.

References:
  Bishop, Training with noise is equivalent to Tikhonov regularization, Neural Computation 7(1), 1995.
  Kingma and Welling, Auto-encoding variational Bayes, 2014.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.arms.gradient import GradientState, averaged
from ev3_distill.errors import InputError
from ev3_distill.hypergrad.one_step import hypergradient
from ev3_distill.hypergrad.spaces import (
    FREE,
    LOG,
    SIMPLEX,
    Tuned,
    constrain,
    distillation,
    net_weights,
    noisy,
    outer_step,
    start,
    student_losses,
    weight_net,
)
from ev3_distill.tasks.classification import example_scores, losses
from ev3_distill.types import Apply, Arm, Batch, Draw, Loss, PyTree, Stretch, Variables

TUNABLE = ("temperature", "mix", "weights", "rate", "noise")
PARTS = 2  # of a held-out batch: an outer step then needs less memory than the training step before it
NOISE = 0x6E6F6973  # folded into a step's key: far from the small numbers that dropout and held-out batches fold in


class TunedState(NamedTuple):
    """What a tuned trajectory needs to go on."""

    trajectory: GradientState
    tuned: Tuned


def tuned_arm(
    name: str,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    tune: Sequence[str] = ("temperature", "mix"),
    temperature: float = 4.0,
    mix: float = 0.9,
    noise: float = 0.1,
    outer: optax.GradientTransformation | None = None,
    val_loss: Loss | None = None,
    every: int = 5,
    method: str = "jvp",
    average: float = 8.0,
    anneal: Callable[[jax.Array], jax.Array] | None = None,
) -> Arm:
    """An arm of the loss mix kd(T) + (1 - mix) ce, some of whose hyperparameters follow the held-out loss.

    Noise is on what the student sees in training alone: what labels and teacher say is of the example as it is, and so is the
    held-out loss. It enters before the network, so that an outer step takes a backward pass with tangents through it, where
    the others take a forward one. Its slope in log s has a part of mean 0 that falls as s, and one that tells something and
    falls as s^2: chance leads a strength that is small, and a young student's may become so before it would help.

    Args:
      name: unique within a run.
      apply: the student's forward pass.
      optimizer: of the student.
      tune: names of TUNABLE; "weights" is a net from `seen` of an example to its weights in both terms, "rate" a factor on
        the optimizer's steps, "noise" the strength of Gaussian noise on the inputs, see `noisy`; without it there is none.
      temperature: T, at the start.
      mix: the teacher's share, at the start, in (0, 1).
      noise: its strength at the start, above 0, in units of the inputs' standard deviation.
      outer: of the hyperparameters' free numbers; None is Adam, which needs no scale, at 0.2, and at 0.01 for the net of
        weights: at 0.2 it soon says the same of all examples.
      val_loss: what outer steps lower, for the student that is proposed; None is the labels' cross-entropy, and their Brier
        score where "weights" are tuned.
      every: training steps to an outer step.
      method: of `hypergrad.METHODS`, for one step of an optimizer.
      average: eta of the proposal's polynomial-decay average, as of `gradient_arm`.
      anneal: factor on every update by the share of the budget that is spent, as of `gradient_arm`.

    Raises:
      InputError: nothing that can be tuned by that name.
    """
    for what in tune:
        if what not in TUNABLE:
            raise InputError(f"what can be tuned is {', '.join(TUNABLE)}; got '{what}': name some of these")
    val_loss = val_loss or (losses.negated(example_scores.brier) if "weights" in tune else losses.cross_entropy())
    space = {"temperature": LOG, "mix": SIMPLEX, "rate": LOG, "noise": LOG, "weights": FREE}
    fixed = {"temperature": jnp.float32(temperature), "mix": jnp.array([mix, 1 - mix])}
    starts = fixed | {"rate": jnp.float32(1), "noise": jnp.float32(noise)}
    begun = {what: starts[what] for what in tune if what != "weights"}
    if "weights" in tune:
        begun["weights"] = weight_net(jax.random.key(0), inputs=2, outputs=2)
        space["weights"] = jax.tree.map(lambda _: FREE, begun["weights"])
    space = {what: space[what] for what in begun}
    outer = _adam(begun) if outer is None else outer

    def loss(free: PyTree, logits: jax.Array, batch: Batch) -> jax.Array:
        hyper = fixed | constrain(space, free)
        if "weights" in tune:
            hyper["weights"] = net_weights(hyper["weights"], seen(logits, batch))
        return distillation(hyper)(logits, batch)

    def init(variables: Variables) -> TunedState:
        opt_state, age = optimizer.init(variables.params), jnp.int32(0)
        return TunedState(GradientState(variables, opt_state, variables, age), start(space, begun, outer))

    def propose(state: TunedState, draw: Draw, stretch: Stretch, held: Draw) -> tuple[TunedState, Variables]:
        def advance(i: jax.Array, state: TunedState) -> TunedState:
            before, tuned = state
            batch, key = draw(stretch.start + i)
            sees = functools.partial(_inputs_of, key=key)  # of the gradient and of the hypergradient: the same noise

            def objective(params: PyTree) -> tuple[jax.Array, PyTree]:
                inputs = sees(tuned.free, batch)
                logits, after = apply(Variables(params, before.iterate.stats), inputs, train=True, key=key)
                return loss(tuned.free, logits, batch), after.stats

            params = before.iterate.params
            gradient, stats = jax.grad(objective, has_aux=True)(params)
            updates, opt_state = optimizer.update(gradient, before.opt_state, params)
            rate = jnp.exp(tuned.free["rate"]) if "rate" in tune else 1.0
            if anneal is not None:
                rate *= anneal(stretch.spent + i * stretch.each)
            iterate = Variables(optax.apply_updates(params, optax.tree.scale(rate, updates)), stats)
            age = before.age + 1

            def tuning(tuned: Tuned) -> Tuned:
                held_out, _ = held(stretch.start + i)
                train_loss, of_student = student_losses(
                    apply, before.iterate, batch, held_out, loss=loss, val_loss=val_loss, key=key, inputs_of=sees,
                    parts=math.gcd(PARTS, len(held_out.index)),
                )  # fmt: skip

                def of_proposal(params: PyTree) -> jax.Array:
                    proposed = averaged(before.average, Variables(params, stats), age, average)
                    return of_student(params if proposed is None else proposed.params)

                factor = optax.scale(rate)
                at_step = {
                    "optimizer": optax.chain(optimizer, factor),
                    "opt_state": (before.opt_state, factor.init(params)),
                    "gradient": gradient,
                }
                slope, info = hypergradient(key, params, tuned.free, train_loss, of_proposal, method=method, **at_step)
                if "rate" in tune:
                    slope["rate"] = info.log_rate
                return outer_step(tuned, slope, outer, sound=info.finite)

            if begun:
                tuned = jax.lax.cond((age % every) == 0, tuning, lambda tuned: tuned, tuned)
            average_now = averaged(before.average, iterate, age, average)
            return TunedState(GradientState(iterate, opt_state, average_now, age), tuned)

        state = jax.lax.fori_loop(0, stretch.steps, advance, state)
        return state, state.trajectory.average or state.trajectory.iterate

    def shows(state: TunedState) -> dict[str, jax.Array]:
        return {what: x for what, x in constrain(space, state.tuned.average).items() if what != "weights"}

    return Arm(name, init, propose, held=True, shows=shows)


def _adam(begun: PyTree) -> optax.GradientTransformation:
    """Of what is tuned, by name."""
    if "weights" not in begun:
        return optax.adam(0.2)
    rates = {"net": optax.adam(0.01), "number": optax.adam(0.2)}
    return optax.partition(rates, {what: "net" if what == "weights" else "number" for what in begun})


def _inputs_of(free: PyTree, batch: Batch, *, key: jax.Array) -> jax.Array:
    """What a step of that key shows the student of a batch: its inputs, with noise where that is tuned."""
    if "noise" not in free:
        return batch.inputs
    return noisy(batch.inputs, LOG.forward(free["noise"]), jax.random.fold_in(key, NOISE))


def seen(logits: jax.Array, batch: Batch) -> jax.Array:
    """What tells whether to believe an example's label and teacher: the losses of both by its label, [B, 2]; 0 without one."""

    def by_label(logits: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(batch.targets, 0)[:, None], -1)[:, 0]
        return jnp.where(batch.targets >= 0, -picked, 0.0)

    return jnp.stack([by_label(logits), by_label(batch.teacher["logits"])], 1)
