"""Assess: held-out scores of every proposal, example by example; proposals -> evidence.

EV3 (arXiv 2310.18893), section 3.2. A finite held-out split is evaluated whole, in the order of its examples: all students
meet the same examples, so their scores are paired, and nothing is resampled as if it were fresh.
"""

import jax
import jax.numpy as jnp

from ev3_distill.types import Apply, Batch, Evidence, Objective, Proposals, Variables


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


def score(
    apply: Apply, variables: Variables, split: Batch, select: Objective, promise: Objective, *, batch_size: int
) -> Evidence:
    """Both scores of one student on a split, leaves [N]."""
    logits = logits_of(apply, variables, split.inputs, batch_size=batch_size)
    return Evidence(select(logits, split), promise(logits, split))


def assess(
    apply: Apply, proposals: Proposals, split: Batch, select: Objective, promise: Objective, *, batch_size: int
) -> Evidence:
    """Scores of all proposals, leaves [P, N]; nan, at no cost, for one that is inactive."""
    blank = Evidence(*[jnp.full(split.index.shape, jnp.nan)] * 2)

    def one(row: tuple[Variables, jax.Array]) -> Evidence:
        variables, active = row
        return jax.lax.cond(
            active,
            lambda: score(apply, variables, split, select, promise, batch_size=batch_size),
            lambda: blank,
        )

    if proposals.active.shape[0] == 1:  # one arm is all but always active: no loop and no branch around it
        alone = jax.tree.map(lambda leaf: leaf[0], proposals.variables)
        scored = score(apply, alone, split, select, promise, batch_size=batch_size)
        return jax.tree.map(lambda x, none: jnp.where(proposals.active[0], x, none)[None], scored, blank)
    return jax.lax.map(one, (proposals.variables, proposals.active))


def paired(scores: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean difference of scores over the last axis, the examples, and its standard error."""
    difference = scores - reference
    n = difference.shape[-1]
    return difference.mean(axis=-1), difference.std(axis=-1) / jnp.sqrt(jnp.maximum(n - 1, 1))
