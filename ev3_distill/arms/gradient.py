"""Gradient arms: a loss, an optax optimizer, and an average of the trajectory as the proposal.

EV3 does not know which trajectory will be its last. So an arm proposes a polynomial-decay average of its iterates, which
anneals at any time because its window is a fixed fraction of the trajectory. An arm may also scale its updates by the
fraction of the budget spent since the student started or grew.

References:
  Shamir and Zhang: Stochastic gradient descent for non-smooth optimization. ICML 2013, arXiv 1212.1824; section 4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.types import Arm, Draw, PyTree, Stretch, Variables

Schedule = Callable[[jax.Array], jax.Array]  # fraction of the budget spent since the student started or grew -> factor


class GradientState(NamedTuple):
    """State of an arm's trajectory."""

    iterate: Variables  # where gradients are computed
    opt_state: PyTree
    average: Variables | None  # what is proposed; None to propose the iterate
    age: jax.Array  # int32, steps since the arm last started
    extra: PyTree = ()  # parameters of the loss, trained with the student's


class LossWithParams(NamedTuple):
    """A loss with trainable parameters of its own, such as a regressor from student features to teacher features."""

    value: Callable[..., jax.Array]  # (outputs, batch, params) -> scalar
    params: PyTree  # initial values


def gradient_arm(
    name: str,
    apply: Callable[..., tuple[Any, Variables]],
    loss: Callable[..., jax.Array] | LossWithParams,
    optimizer: optax.GradientTransformation,
    *,
    average: float | None = 8.0,
    anneal: Schedule | None = None,
    rounding: Schedule | None = None,
    length: float = 1.0,
) -> Arm:
    """An arm that follows the gradient of a loss on the explore split.

    Args:
      name: unique within a run.
      apply: the student's forward pass: `Network.apply`, or another function of the same arguments, such as `Network.features`.
      loss: (outputs of `apply`, batch) -> scalar. A `LossWithParams` trains its parameters with the student's; like the
        optimizer's state, they belong to the arm and are dropped after the run.
      optimizer: any optax transformation. It gets the current parameters of the trajectory; with a `LossWithParams`, the
        pair of the student's and the loss's parameters.
      average: eta of the polynomial-decay average, which gives step t the weight (eta + 1) / (t + eta): a window of about
        t / (eta + 1) steps. None proposes the last iterate.
      anneal: schedule of a factor on every update, such as `arms.up_and_down`.
      rounding: schedule of the `share` argument of `apply`, for students that train with rounded weights (`Network.straight`).
      length: of the trajectory, relative to the run's.

    Returns:
      The arm.
    """
    trains_loss = isinstance(loss, LossWithParams)
    loss_params: PyTree = loss.params if isinstance(loss, LossWithParams) else ()
    step = _step(apply, loss, optimizer, anneal=anneal, rounding=rounding, average=average)

    def init(variables: Variables) -> GradientState:
        start = None if average is None else variables
        extra = jax.tree.map(jnp.array, loss_params) if trains_loss else ()
        opt_state = optimizer.init((variables.params, extra) if trains_loss else variables.params)
        return GradientState(variables, opt_state, start, jnp.int32(0), extra)

    def propose(state: GradientState, draw: Draw, stretch: Stretch) -> tuple[PyTree, Variables]:
        state = jax.lax.fori_loop(0, stretch.steps, lambda i, state: step(state, draw, stretch, i), state)
        return state, _proposal(state)

    return Arm(name, init, propose, length)


def _step(
    apply: Callable[..., tuple[Any, Variables]],
    loss: Callable[..., jax.Array] | LossWithParams,
    optimizer: optax.GradientTransformation,
    *,
    anneal: Schedule | None,
    rounding: Schedule | None,
    average: float | None,
) -> Callable[[GradientState, Draw, Stretch, jax.Array], GradientState]:
    """One training step: (state, draw, stretch, index of the step within the stretch) -> state."""
    trains_loss = isinstance(loss, LossWithParams)
    loss_value = loss.value if isinstance(loss, LossWithParams) else lambda outputs, batch, extra: loss(outputs, batch)

    def step(state: GradientState, draw: Draw, stretch: Stretch, i: jax.Array) -> GradientState:
        batch, key = draw(stretch.start + i)
        spent = stretch.spent + i * stretch.per_step
        options = {} if rounding is None else {"share": rounding(spent)}

        def objective(trained: PyTree) -> tuple[jax.Array, PyTree]:
            params, extra = trained if trains_loss else (trained, ())
            student = Variables(params, state.iterate.stats)
            outputs, variables = apply(student, batch.inputs, train=True, key=key, **options)
            return loss_value(outputs, batch, extra), variables.stats

        trained = (state.iterate.params, state.extra) if trains_loss else state.iterate.params
        gradient, stats = jax.grad(objective, has_aux=True)(trained)
        updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
        if anneal is not None:
            updates = optax.tree.scale(anneal(spent), updates)
        trained = optax.apply_updates(trained, updates)
        params, extra = trained if trains_loss else (trained, ())
        iterate = Variables(params, stats)
        age = state.age + 1
        return GradientState(iterate, opt_state, update_average(state.average, iterate, age, average), age, extra)

    return step


def _proposal(state: GradientState) -> Variables:
    return state.iterate if state.average is None else state.average


def update_average(
    average: Variables | None, iterate: Variables, age: jax.Array, eta: float | None
) -> Variables | None:
    """The polynomial-decay average after step `age`, counted from 1; None if there is no average.

    References:
      Shamir and Zhang: Stochastic gradient descent for non-smooth optimization. ICML 2013, arXiv 1212.1824; section 4.
    """
    if average is None or eta is None:
        return None
    weight = (eta + 1) / (age + eta)
    return jax.tree.map(lambda a, x: _mix(a, x, weight), average, iterate)


def _mix(average: jax.Array, iterate: jax.Array, weight: jax.Array) -> Any:
    """Move a floating leaf towards the iterate; replace any other."""
    if not jnp.issubdtype(average.dtype, jnp.floating):
        return iterate
    return average + weight * (iterate - average)
