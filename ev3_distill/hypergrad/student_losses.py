"""A student's losses as functions of its parameters, as `hypergradient` takes them.

Both losses hold the student's statistics fixed and drop the statistics that a training pass would update. Perturbed copies of
the parameters share the key's random numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ev3_distill.hypergrad.problem import TrainLoss, ValLoss
from ev3_distill.types import Apply, Batch, Loss, PyTree, Variables


def student_train_loss(
    apply: Apply,
    stats: PyTree,
    batch: Batch,
    loss: Callable[[PyTree, jax.Array, Batch], jax.Array],
    *,
    key: jax.Array | None = None,
    inputs_of: Callable[[PyTree, Batch], jax.Array] | None = None,
) -> TrainLoss:
    """The training loss on one batch, the same at every inner step.

    Args:
      apply: the student's forward pass.
      stats: the student's statistics.
      batch: of training examples.
      loss: (hyper, outputs, batch) -> scalar.
      key: of dropout.
      inputs_of: (hyper, batch) -> inputs [B, ...] of the forward pass; None for the batch's own. The loss gets the batch
        unchanged.
    """

    def train_loss(params: PyTree, hyper: PyTree, step: Any) -> jax.Array:
        inputs = batch.inputs if inputs_of is None else inputs_of(hyper, batch)
        outputs = apply(Variables(params, stats), inputs, train=True, key=key)[0]
        return loss(hyper, outputs, batch)

    return train_loss


def student_val_loss(
    apply: Apply,
    stats: PyTree,
    batch: Batch,
    loss: Loss,
    *,
    key: jax.Array | None = None,
    batch_statistics: bool = True,
    parts: int = 1,
) -> ValLoss:
    """The loss on one held-out batch.

    Args:
      apply: the student's forward pass.
      stats: the student's statistics.
      batch: of held-out examples.
      loss: (outputs, batch) -> scalar.
      key: of dropout, if `batch_statistics`.
      batch_statistics: whether BatchNorm uses the batch's own statistics. The running ones are poor early in training.
      parts: split the batch into this many equal parts; the loss is the mean of theirs. Gradients are computed one part after
        the other, so memory is that of one part. For BatchNorm, each part is a batch of its own.
    """

    def part_loss(params: PyTree, part: Batch) -> jax.Array:
        outputs = apply(Variables(params, stats), part.inputs, train=batch_statistics, key=key)[0]
        return loss(outputs, part)

    return _mean_of_parts(part_loss, batch, parts)


def _mean_of_parts(loss: Callable[[PyTree, Batch], jax.Array], batch: Batch, parts: int) -> ValLoss:
    """The mean loss of a batch's parts. Its gradient is accumulated with its value, so no forward pass is stored."""
    if parts == 1:
        return lambda params: loss(params, batch)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(parts, len(leaf) // parts, *leaf.shape[1:]), batch)

    @jax.custom_jvp
    def mean(params: PyTree) -> jax.Array:
        return jax.lax.map(lambda part: loss(params, part), stacked).mean()

    @mean.defjvp
    def _(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[jax.Array, jax.Array]:
        (params,), (tangent,) = primals, tangents

        def add(total: PyTree, part: Batch) -> tuple[PyTree, jax.Array]:
            value, gradient = jax.value_and_grad(loss)(params, part)
            return jax.tree.map(lambda t, g: t + g / parts, total, gradient), value

        gradient, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), stacked)
        along = jax.tree.map(jnp.vdot, gradient, tangent)
        return values.mean(), jnp.stack(jax.tree.leaves(along)).sum()

    return mean
