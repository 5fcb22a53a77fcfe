"""Gradient arms: a loss, an optax optimizer, and an average of the trajectory as the proposal.

EV3 does not know its horizon, so no schedule can anneal towards its end. A polynomial-decay average of the iterates (Shamir
and Zhang 2013, arXiv 1212.1824, section 4) anneals at any time instead: its window is a fixed fraction of the trajectory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.types import Apply, Arm, Draw, Loss, PyTree, Variables


class GradientState(NamedTuple):
    """What a trajectory needs to go on."""

    iterate: Variables  # where gradients are taken
    opt_state: PyTree
    average: Variables | None  # what is proposed, if not the iterate
    age: jax.Array  # int32, steps since the arm last started afresh


def gradient_arm(
    name: str,
    apply: Apply,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    average: float | None = 8.0,
    length: float = 1.0,
) -> Arm:
    """An arm that follows the gradient of a loss on explore.

    Args:
      name: unique within a run.
      apply: the student's forward pass.
      loss: of training logits and batch.
      optimizer: any optax transformation; it sees the trajectory's present parameters.
      average: eta of the polynomial-decay average; the proposal is then the average with weights
        (eta + 1) / (t + eta) for step t, a window of about t / (eta + 1) steps. None proposes the last iterate.
      length: of the trajectory, relative to the run's.
    """

    def init(variables: Variables) -> GradientState:
        averaged = None if average is None else variables
        return GradientState(variables, optimizer.init(variables.params), averaged, jnp.int32(0))

    def propose(state: GradientState, draw: Draw, start: jax.Array, steps: jax.Array) -> tuple[PyTree, Variables]:
        def advance(i: jax.Array, state: GradientState) -> GradientState:
            batch, key = draw(start + i)

            def objective(params: PyTree) -> tuple[jax.Array, PyTree]:
                logits, variables = apply(Variables(params, state.iterate.stats), batch.inputs, train=True, key=key)
                return loss(logits, batch), variables.stats

            gradient, stats = jax.grad(objective, has_aux=True)(state.iterate.params)
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.iterate.params)
            iterate = Variables(optax.apply_updates(state.iterate.params, updates), stats)
            age = state.age + 1
            return GradientState(iterate, opt_state, _averaged(state.average, iterate, age), age)

        def _averaged(before: Variables | None, iterate: Variables, age: jax.Array) -> Variables | None:
            if before is None or average is None:
                return None
            weight = (average + 1) / (age + average)
            return jax.tree.map(lambda a, x: _mix(a, x, weight), before, iterate)

        state = jax.lax.fori_loop(0, steps, advance, state)
        return state, state.iterate if state.average is None else state.average

    return Arm(name, init, propose, length)


def _mix(average: jax.Array, iterate: jax.Array, weight: jax.Array) -> Any:
    """A floating leaf moves towards the iterate, any other follows it."""
    if not jnp.issubdtype(average.dtype, jnp.floating):
        return iterate
    return average + weight * (iterate - average)
