"""Explore: every active arm rolls out its trajectory from the current student; arms -> proposals.

EV3 (arXiv 2310.18893), section 3.1. All arms see the same batches and the same keys (common random numbers), so that the
differences between their proposals are the arms' own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ev3_distill.types import Arm, Batch, Draw, Pools, Proposals, PyTree, Rows, State, Variables


def draw_from(pools: Pools, rows: Rows, key: jax.Array) -> Draw:
    """The batch and key of a global step, a pure function of the step alone: a resume needs no loader's state.

    Args:
      pools: the data; only explore and its order are touched.
      rows: (order, global step) -> rows [B] of explore.
      key: the run's own; each step folds itself in.
    """

    def draw(step: jax.Array) -> tuple[Batch, jax.Array]:
        chosen = rows(pools.order, step)
        return jax.tree.map(lambda leaf: leaf[chosen], pools.explore), jax.random.fold_in(key, step)

    return draw


def explore(arms: Sequence[Arm], state: State, draw: Draw, steps: jax.Array) -> Proposals:
    """Rolls out every arm and adds the average of their proposals where there are several arms.

    Args:
      arms: A of them.
      state: arms go on from `state.arm_states`; a rejected proposal thus leaves nothing behind.
      draw: batches by global step.
      steps: [A] int32, 0 for an arm that rests in this iteration.

    Returns:
      Proposals, P = A + 1 (P = 1 for a single arm). A proposal with a non-finite entry, in the student or in the arm's
      state, is inactive and out of the average; the others never meet it.
    """
    made = [arm.propose(state.arm_states[i], draw, state.position, steps[i]) for i, arm in enumerate(arms)]
    active = jnp.stack([(steps[i] > 0) & all_finite(proposed) for i, proposed in enumerate(made)])
    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(student for _, student in made))
    arm_states = tuple(arm_state for arm_state, _ in made)
    if len(arms) == 1:
        return Proposals(variables, arm_states, active)
    average = mean_of(variables, active)
    variables = jax.tree.map(lambda rows, row: jnp.concatenate([rows, row[None]]), variables, average)
    return Proposals(variables, arm_states, jnp.append(active, active.sum() >= 2))


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every floating entry of the tree is finite, a scalar bool."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]))


def mean_of(variables: Variables, active: jax.Array) -> Variables:
    """The average over the active rows of leaves [P, ...]; zeros where none is active."""

    def mean(leaf: jax.Array) -> jax.Array:
        mask = active.reshape(-1, *[1] * (leaf.ndim - 1))
        total = jnp.where(mask, leaf, 0).sum(axis=0)
        return (total / jnp.maximum(active.sum(), 1)).astype(leaf.dtype)

    return jax.tree.map(mean, variables)
