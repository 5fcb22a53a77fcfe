"""Gradient arms: a loss, an optax optimizer, and an average of the trajectory as the proposal.

EV3 does not know which trajectory will be its last, so what is proposed is a polynomial-decay average of the iterates (Shamir
and Zhang 2013, arXiv 1212.1824, section 4): it anneals at any time, its window being a fixed fraction of the trajectory.
An arm may also anneal its updates by the share that is spent of the budget since the student began or grew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from ev3_distill.types import Arm, Draw, Growth, PyTree, Stretch, Variables


class GradientState(NamedTuple):
    """What a trajectory needs to go on."""

    iterate: Variables  # where gradients are taken
    opt_state: PyTree
    average: Variables | None  # what is proposed, if not the iterate
    age: jax.Array  # int32, steps since the arm last started afresh
    extra: PyTree = ()  # parameters that are trained beside the student's and are no part of it


def gradient_arm(
    name: str,
    apply: Callable[..., tuple[Any, Variables]],
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    extra: PyTree = (),
    average: float | None = 8.0,
    anneal: Callable[[jax.Array], jax.Array] | None = None,
    share: Callable[[jax.Array], jax.Array] | None = None,
    length: float = 1.0,
) -> Arm:
    """An arm that follows the gradient of a loss on explore.

    Args:
      name: unique within a run.
      apply: the student's forward pass, `Network.apply` or another of its arguments, such as `Network.features`.
      loss: (what `apply` returns in training, batch) -> scalar; with `extra`, (that, batch, extra) -> scalar.
      optimizer: any optax transformation; it sees the trajectory's present parameters, with `extra` the pair of both.
      extra: where parameters start that are trained beside the student's and thrown away in the end, such as a regressor
        from its features to the teacher's. Like the optimizer's state they go on with the arm and start afresh with it.
      average: eta of the polynomial-decay average; the proposal is then the average with weights
        (eta + 1) / (t + eta) for step t, a window of about t / (eta + 1) steps. None proposes the last iterate.
      anneal: (share of the budget spent since the student began or grew) -> factor on every update, such as `linear_to_zero`.
      share: (the same) -> what `apply` is given as its `share`, such as that of the rounding by `Network.straight`.
      length: of the trajectory, relative to the run's.

    Returns:
      The arm. Where the student grows, it goes on from what it last proposed, with the optimizer's moments, and a new average:
      the old window would hide for long what the larger student learns. With an `extra`, which fits the old student alone, it
      starts afresh.
    """

    pairs = bool(jax.tree.leaves(extra))

    def join(params: PyTree, beside: PyTree) -> PyTree:
        return (params, beside) if pairs else params

    def part(trained: PyTree) -> tuple[PyTree, PyTree]:
        return trained if pairs else (trained, ())

    def init(variables: Variables) -> GradientState:
        averaged = None if average is None else variables
        beside = jax.tree.map(jnp.array, extra) if pairs else ()
        opt_state = optimizer.init(join(variables.params, beside))
        return GradientState(variables, opt_state, averaged, jnp.int32(0), beside)

    def propose(state: GradientState, draw: Draw, stretch: Stretch) -> tuple[PyTree, Variables]:
        def advance(i: jax.Array, state: GradientState) -> GradientState:
            batch, key = draw(stretch.start + i)
            spent = stretch.spent + i * stretch.each
            how = {} if share is None else {"share": share(spent)}

            def objective(trained: PyTree) -> tuple[jax.Array, PyTree]:
                params, beside = part(trained)
                student = Variables(params, state.iterate.stats)
                outputs, variables = apply(student, batch.inputs, train=True, key=key, **how)
                value = loss(outputs, batch, beside) if pairs else loss(outputs, batch)
                return value, variables.stats

            trained = join(state.iterate.params, state.extra)
            gradient, stats = jax.grad(objective, has_aux=True)(trained)
            updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
            if anneal is not None:
                updates = optax.tree.scale(anneal(spent), updates)
            params, beside = part(optax.apply_updates(trained, updates))
            iterate = Variables(params, stats)
            age = state.age + 1
            return GradientState(iterate, opt_state, averaged(state.average, iterate, age, average), age, beside)

        state = jax.lax.fori_loop(0, stretch.steps, advance, state)
        return state, state.iterate if state.average is None else state.average

    def grow(state: GradientState, growth: Growth) -> GradientState:
        proposed = state.iterate if state.average is None else state.average
        begun = growth.variables(proposed)
        opt_state = _carried(state.opt_state, proposed.params, growth)
        return GradientState(begun, opt_state, None if state.average is None else begun, jnp.int32(0), ())

    return Arm(name, init, propose, length, None if pairs else grow)


def _carried(opt_state: PyTree, params: PyTree, growth: Growth) -> PyTree:
    """An optax state for the larger student: moments by their names, as trees or (`optax.flatten`) vectors; the rest stays."""
    how = {"mu": growth.like_gradient, "nu": growth.like_second_moment}
    unravel = ravel_pytree(params)[1]

    def moment(name: str, tree: PyTree) -> PyTree:
        if isinstance(tree, jax.Array | np.ndarray):
            return ravel_pytree(how[name](unravel(jnp.asarray(tree))))[0]
        return how[name](tree)

    def visit(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: visit(part) for name, part in node.items()}
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            parts = zip(node._fields, node, strict=True)
            return type(node)(*(moment(name, part) if name in how else visit(part) for name, part in parts))
        return tuple(map(visit, node)) if isinstance(node, tuple) else node

    return visit(opt_state)


def averaged(before: Variables | None, iterate: Variables, age: jax.Array, eta: float | None) -> Variables | None:
    """The polynomial-decay average after step `age`, counted from 1; None where there is none.

    References:
      Shamir and Zhang, Stochastic gradient descent for non-smooth optimization, 2013.
    """
    if before is None or eta is None:
        return None
    weight = (eta + 1) / (age + eta)
    return jax.tree.map(lambda a, x: _mix(a, x, weight), before, iterate)


def _mix(average: jax.Array, iterate: jax.Array, weight: jax.Array) -> Any:
    """A floating leaf moves towards the iterate, any other follows it."""
    if not jnp.issubdtype(average.dtype, jnp.floating):
        return iterate
    return average + weight * (iterate - average)
