"""Assess: held-out scores of every proposal, example by example; proposals -> evidence.

EV3 (arXiv 2310.18893), section 3.2. A finite held-out split is evaluated whole, in the order of its examples: all students
meet the same examples, so their scores are paired, and nothing is resampled as if it were fresh.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.core.explore import alone
from ev3_distill.types import (
    Apply,
    Batch,
    Evidence,
    Goal,
    GoalEvidence,
    Objective,
    Proposals,
    Share,
    Standing,
    Variables,
)


def logits_of(apply: Apply, variables: Variables, inputs: jax.Array, *, batch_size: int) -> jax.Array:
    """Logits [N, K] in evaluation mode, in chunks of `batch_size` so that memory does not follow N.

    The last chunk ends with the last example and overlaps the one before it: so none is padded, and nothing copied.
    """
    n = inputs.shape[0]
    if n <= batch_size:
        return apply(variables, inputs, train=False)[0]

    def chunk(start: jax.Array) -> jax.Array:
        return apply(variables, jax.lax.dynamic_slice_in_dim(inputs, start, batch_size), train=False)[0]

    starts = jnp.minimum(jnp.arange(0, n, batch_size), n - batch_size)
    logits_CxBxK = jax.lax.map(chunk, starts)
    new = n - (len(starts) - 1) * batch_size  # of the last chunk
    return jnp.concatenate([logits_CxBxK[:-1].reshape(n - new, -1), logits_CxBxK[-1, batch_size - new :]])


class Measures(NamedTuple):
    """What students are measured by."""

    select: Objective
    promise: Objective
    goals: tuple[Goal, ...] = ()

    def of(self, logits: jax.Array, split: Batch) -> Evidence:
        """The scores of one student, leaves [N]; those for goals [G, N]."""
        return Evidence(self.select(logits, split), self.promise(logits, split), self._goals(logits, split))

    def _goals(self, logits: jax.Array, split: Batch) -> GoalEvidence | tuple[()]:
        if not self.goals:
            return ()
        return GoalEvidence(
            smooth=jnp.stack([goal.smooth(logits, split) for goal in self.goals]),
            score=jnp.stack([goal.score(logits, split) for goal in self.goals]),
            focus=jnp.stack([goal.focus(logits, split) for goal in self.goals]),
        )

    def standing(self, logits: jax.Array, split: Batch, evidence: Evidence) -> Standing | tuple[()]:
        """How a student with that evidence on assess stands on decide."""
        if not isinstance(evidence.goals, GoalEvidence):
            return ()
        focus = evidence.goals.focus
        return Standing(
            compared=jnp.stack([goal.compared(logits, split, focus[g]) for g, goal in enumerate(self.goals)]),
            metric=jnp.stack([goal.score(logits, split).mean() for goal in self.goals]),
        )


def score(apply: Apply, variables: Variables, split: Batch, measures: Measures, *, batch_size: int) -> Evidence:
    """The scores of one student on a split, leaves [N]; those for goals [G, N]."""
    return measures.of(logits_of(apply, variables, split.inputs, batch_size=batch_size), split)


def assess(
    apply: Apply,
    proposals: Proposals,
    split: Batch,
    measures: Measures,
    *,
    batch_size: int,
    share: Share = alone,
) -> Evidence:
    """Scores of all proposals, leaves [P, N]; nan, at no cost, for one that is inactive. `share` says who scores which."""

    if proposals.active.shape[0] == 1:  # one arm is all but always active: no loop and no branch around it
        first = jax.tree.map(lambda leaf: leaf[0], proposals.variables)
        scored = score(apply, first, split, measures, batch_size=batch_size)
        return jax.tree.map(lambda x: jnp.where(proposals.active[0], x, _blank(x))[None], scored)

    def work(mine: jax.Array, given: tuple[Proposals, Batch]) -> tuple[Evidence, ...]:
        theirs, examples = given

        def one(row: tuple[Variables, jax.Array]) -> Evidence:
            variables, active = row
            scored = functools.partial(score, apply, variables, examples, measures, batch_size=batch_size)
            blank = jax.tree.map(_blank, jax.eval_shape(scored))
            return jax.lax.cond(active, scored, lambda: blank)

        scores = jax.lax.map(one, (theirs.variables, theirs.active & mine))
        return tuple(jax.tree.map(operator.itemgetter(i), scores) for i in range(len(mine)))

    given = proposals._replace(arm_states=()), split
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *share(work, proposals.active, given))


def _blank(like: Any) -> jax.Array:
    """Scores of nobody."""
    return jnp.full(like.shape, jnp.nan if jnp.issubdtype(like.dtype, jnp.floating) else 0, like.dtype)


def paired(scores: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean difference of scores over the last axis, the examples, and its standard error."""
    difference = scores - reference
    n = difference.shape[-1]
    return difference.mean(axis=-1), difference.std(axis=-1) / jnp.sqrt(jnp.maximum(n - 1, 1))
