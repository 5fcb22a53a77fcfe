"""Explore: every active arm continues its trajectory; arms -> proposals.

EV3 (arXiv 2310.18893), section 3.1. All arms see the same batches and the same keys (common random numbers), so that
their proposals differ only by what the arms do.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ev3_distill.types import Arm, Batch, Draw, Fit, Proposals, PyTree, Sample, Stretch, Variables

FIT_BATCHES = 4  # batches of a stretch whose statistics `fitting` collects


def draw_from(pool: PyTree, sample: Sample, key: jax.Array) -> Draw:
    """Builds a pure function from global step to batch and key: a resumed run needs no state of a data loader.

    Args:
      pool: `Pools.explore`.
      sample: makes the batch of a step.
      key: of the run; the step is folded in.
    """

    def draw(step: jax.Array) -> tuple[Batch, jax.Array]:
        return sample(pool, step), jax.random.fold_in(key, step)

    return draw


def held_from(split: Batch, key: jax.Array, *, batch_size: int) -> Draw:
    """Builds batches of a held-out split, for arms that tune by them: rows drawn with replacement, by the global step alone.

    Args:
      split: assess. With decide or test, the guarantees about them would not hold.
      key: of the run; the batches and keys of explore do not depend on these draws.
      batch_size: B.
    """

    def held(step: jax.Array) -> tuple[Batch, jax.Array]:
        own = jax.random.fold_in(jax.random.fold_in(key, step), 1)
        rows = jax.random.randint(own, (batch_size,), 0, split.index.shape[0])
        return jax.tree.map(lambda leaf: leaf[rows], split), own

    return held


def on_one_device(
    work: Callable[[jax.Array, PyTree], tuple[PyTree, ...]], active: jax.Array, inputs: PyTree
) -> tuple[PyTree, ...]:
    """The `Distribute` of a single device, which computes all rows."""
    return work(jnp.ones_like(active), inputs)


def roll(
    arms: Sequence[Arm], arm_states: Sequence[PyTree], draw: Draw, stretches: Sequence[Stretch], held: Draw
) -> tuple[tuple[PyTree, ...], tuple[Variables, ...]]:
    """Rolls out every arm over its stretch, a whole trajectory or the next part of one.

    Args:
      arms: A of them.
      arm_states: to continue from; those of the run do not change here.
      draw: batches by global step.
      stretches: of each arm, with 0 steps for an arm that rests.
      held: batches of assess by global step, for the arms that need them.

    Returns:
      The arms' states and the students that they propose.
    """
    proposed = [
        arm.propose(arm_states[i], draw, stretches[i], *([held] if arm.uses_held_out else []))
        for i, arm in enumerate(arms)
    ]
    return tuple(arm_state for arm_state, _ in proposed), tuple(student for _, student in proposed)


def fitting(arm: Arm, fit: Fit) -> Arm:
    """The arm, whose proposals then have statistics of FIT_BATCHES batches of their stretch; see `Network.fit`."""

    def propose(state: PyTree, draw: Draw, stretch: Stretch, *held: Draw) -> tuple[PyTree, Variables]:
        after, student = arm.propose(state, draw, stretch, *held)

        def fitted(student: Variables) -> Variables:
            steps = stretch.start + stretch.steps * jnp.arange(FIT_BATCHES) // FIT_BATCHES
            inputs = jax.lax.map(lambda step: draw(step)[0].inputs, steps)
            return fit(student, inputs.reshape(-1, *inputs.shape[2:]))

        return after, jax.lax.cond(stretch.steps > 0, fitted, lambda student: student, student)

    return arm._replace(propose=propose)


def proposals_of(arm_states: tuple[PyTree, ...], students: Sequence[Variables], steps: jax.Array) -> Proposals:
    """Collects the arms' proposals.

    Args:
      arm_states: A of them.
      students: A of them.
      steps: [A] int32, 0 for an arm that rested in this iteration.

    Returns:
      Proposals. One with a non-finite entry, in the student or in the arm's state, is inactive; it does not affect the
      others.
    """
    pairs = zip(arm_states, students, strict=True)
    active = jnp.stack([(steps[i] > 0) & all_finite(proposed) for i, proposed in enumerate(pairs)])
    return Proposals(jax.tree.map(lambda *leaves: jnp.stack(leaves), *students), arm_states, active)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every floating entry of the tree is finite, a scalar bool."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.isfinite(jnp.concatenate([leaf.reshape(-1) for leaf in floats])).all()
