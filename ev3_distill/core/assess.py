"""Assess: held-out scores of every proposal, per example; proposals -> evidence.

EV3 (arXiv 2310.18893), section 3.2. A finite held-out split is evaluated whole, in the order of its examples. All
students are scored on the same examples, so their scores are paired, and no example is resampled as if it were new.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from ev3_distill.core.explore import on_one_device
from ev3_distill.types import Apply, Batch, Distribute, Evidence, Objectives, Proposals, Variables


def outputs_of(apply: Apply, variables: Variables, inputs: jax.Array, *, batch_size: int) -> Any:
    """Outputs in evaluation mode, leaves [N, ...], in chunks of `batch_size` so that memory does not grow with N.

    The last chunk ends with the last example and overlaps the one before it, so that nothing is padded or copied.
    """
    n = inputs.shape[0]
    if n <= batch_size:
        return apply(variables, inputs, train=False)[0]

    def chunk(start: jax.Array) -> Any:
        return apply(variables, jax.lax.dynamic_slice_in_dim(inputs, start, batch_size), train=False)[0]

    starts = jnp.minimum(jnp.arange(0, n, batch_size), n - batch_size)
    new = n - (len(starts) - 1) * batch_size  # examples that only the last chunk has

    def join(chunks: jax.Array) -> jax.Array:
        return jnp.concatenate([chunks[:-1].reshape(n - new, *chunks.shape[2:]), chunks[-1, batch_size - new :]])

    return jax.tree.map(join, jax.lax.map(chunk, starts))


def score(apply: Apply, variables: Variables, split: Batch, objectives: Objectives, *, batch_size: int) -> Evidence:
    """The scores of one student on a split, leaves [N]; those for goals [G, N]."""
    return objectives.evidence(outputs_of(apply, variables, split.inputs, batch_size=batch_size), split)


def assess(
    apply: Apply,
    proposals: Proposals,
    split: Batch,
    objectives: Objectives,
    *,
    batch_size: int,
    distribute: Distribute = on_one_device,
) -> Evidence:
    """Scores of all proposals, leaves [P, N]; nan, at no cost, for inactive ones."""
    if proposals.active.shape[0] == 1:  # one arm is nearly always active: no loop and no branch
        first = jax.tree.map(lambda leaf: leaf[0], proposals.variables)
        scores = score(apply, first, split, objectives, batch_size=batch_size)
        return jax.tree.map(lambda x: jnp.where(proposals.active[0], x, _blank(x))[None], scores)

    def work(own: jax.Array, inputs: tuple[Proposals, Batch]) -> tuple[Evidence, ...]:
        all_proposals, examples = inputs

        def one(row: tuple[Variables, jax.Array]) -> Evidence:
            variables, active = row
            compute = functools.partial(score, apply, variables, examples, objectives, batch_size=batch_size)
            blank = jax.tree.map(_blank, jax.eval_shape(compute))
            return jax.lax.cond(active, compute, lambda: blank)

        scores = jax.lax.map(one, (all_proposals.variables, all_proposals.active & own))
        return tuple(jax.tree.map(operator.itemgetter(i), scores) for i in range(len(own)))

    inputs = proposals._replace(arm_states=()), split
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *distribute(work, proposals.active, inputs))


def _blank(like: Any) -> jax.Array:
    """NaN scores for an inactive proposal; 0 for integers."""
    return jnp.full(like.shape, jnp.nan if jnp.issubdtype(like.dtype, jnp.floating) else 0, like.dtype)
