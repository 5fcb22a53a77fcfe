"""Batches of the explore split, each a pure function of the global step.

A pool holds the examples. `Resident` is the whole split on the device; `Window` is the next few steps of a split that is too
large for the device. Both give the same batches. Each epoch trains on the next view of every example: view v is the example
augmented with counter-based keys, together with the teacher's outputs on those pixels. After V views the first one returns.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.config import Fractions
from ev3_distill.data.augment import Augmentation, partner_of, view_of
from ev3_distill.data.shuffle import Order, batch_rows, epoch_of, make_order
from ev3_distill.data.splits import DEFAULT_FRACTIONS, SPLITS, split_rows
from ev3_distill.errors import InputError
from ev3_distill.types import Apply, Batch, Pools, PyTree, Sample, Variables


class Resident(NamedTuple):
    """The explore split on the device."""

    examples: Batch  # leaves [N, ...]; those of `teacher` [V, N, ...]
    order: Order
    teacher: Variables | tuple[()] = ()  # variables of a JAX teacher that runs inside the training step


class Window(NamedTuple):
    """The batches of W consecutive steps, in order, ready for training."""

    examples: Batch  # leaves [W * B, ...]
    first: jax.Array  # int32, global step of the first batch


def sampler(
    *, batch_size: int, views: int = 1, augmentation: Augmentation | None = None, teacher: Apply | None = None
) -> Sample:
    """Builds the function that returns the batch of a global step.

    Args:
      batch_size: B.
      views: V, the number of views; where no teacher outputs are cached, any number that no run reaches.
      augmentation: applied to each view; None leaves examples unchanged.
      teacher: forward pass of a JAX teacher that runs inside the training step, with its variables in the pool.
    """

    def sample(pool: PyTree, step: jax.Array) -> Batch:
        if isinstance(pool, Window):
            at = (step - pool.first) * batch_size
            batch = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, batch_size), pool.examples)
        else:
            positions = batch_rows(pool.order, step, batch_size=batch_size)
            view = epoch_of(pool.order, step, batch_size=batch_size) % np.uint32(views)
            batch = view_batch(pool.examples, positions, view.astype(jnp.int32), augmentation)
        if teacher is None:
            return batch
        logits, _ = teacher(pool.teacher, batch.inputs, train=False)
        return batch._replace(teacher={**batch.teacher, "logits": logits})

    return sample


def view_batch(examples: Batch, positions: jax.Array, view: jax.Array, augmentation: Augmentation | None) -> Batch:
    """Selects rows [B] of a resident split in one view.

    Examples that are mixed with others have no target of their own; there the teacher's outputs are the only target.
    """
    cached = {name: leaf[view % leaf.shape[0], positions] for name, leaf in examples.teacher.items()}
    batch = Batch(
        inputs=examples.inputs[positions],
        targets=jax.tree.map(lambda leaf: leaf[positions], examples.targets),
        teacher=cached,
        index=examples.index[positions],
        weight=examples.weight[positions],
    )
    if augmentation is None:
        return batch
    partners = None
    if augmentation.mix:
        partners = examples.inputs[partner_of(augmentation, positions, view, len(examples.index))]
    inputs, mixed = view_of(augmentation, batch.inputs, partners, batch.index, view)
    return batch._replace(inputs=inputs, targets=without_targets(batch.targets, mixed))


def without_targets(targets: PyTree, missing: Any) -> PyTree:
    """Marks the targets of some examples [B] bool as missing: -1 in integer leaves, nan in floating leaves."""

    def mark(leaf: jax.Array) -> jax.Array:
        absent = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else -1
        return jnp.where(jnp.reshape(missing, (-1, *[1] * (leaf.ndim - 1))), jnp.asarray(absent, leaf.dtype), leaf)

    return jax.tree.map(mark, targets)


def resident(
    inputs: np.ndarray, targets: PyTree, index: np.ndarray, teacher: Mapping[str, np.ndarray], *, seed: int
) -> Resident:
    """Places a split on the default device.

    Args:
      inputs: [N, ...] uint8 or float32.
      targets: leaves [N, ...].
      index: [N] positions in the data set.
      teacher: the teacher's outputs and features by name, [V, N, ...].
      seed: of the order in which examples are visited.
    """
    return Resident(make_batch(inputs, targets, index, teacher), make_order(len(index), seed))


def held_out(
    inputs: np.ndarray,
    targets: PyTree,
    index: np.ndarray,
    teacher: Mapping[str, np.ndarray],
    groups: np.ndarray | None = None,
    *,
    units: np.ndarray | None = None,
) -> Batch:
    """Places a held-out split, or a part of one, on the default device; every array is [N, ...]."""
    first = None if units is None else np.unique(units, return_index=True)[1]
    group, unit, lone = (() if rows is None else jnp.asarray(rows, jnp.int32) for rows in (groups, units, first))
    return make_batch(inputs, targets, index, teacher)._replace(group=group, unit=unit, lone=lone)


def make_batch(inputs: Any, targets: PyTree, index: np.ndarray, teacher: Mapping[str, np.ndarray]) -> Batch:
    """Host arrays as a batch on the default device, each example with weight 1."""
    return Batch(
        inputs=jnp.asarray(inputs),
        targets=jax.tree.map(_as_target, targets),
        teacher={name: jnp.asarray(leaf, jnp.float32) for name, leaf in teacher.items()},
        index=jnp.asarray(index, jnp.int32),
        weight=jnp.ones(len(index), jnp.float32),
    )


def _as_target(leaf: Any) -> jax.Array:
    floating = jnp.issubdtype(np.asarray(leaf).dtype, jnp.floating)
    return jnp.asarray(leaf, jnp.float32 if floating else jnp.int32)


def split(
    dataset: Any, teacher_logits: np.ndarray, *, seed: int, fractions: Fractions = DEFAULT_FRACTIONS
) -> tuple[Pools, Batch]:
    """Divides a labeled data set into the four splits and places them on the default device.

    Args:
      dataset: N examples of K classes, see `load_data`.
      teacher_logits: [N, K], in the data set's order.
      seed: of the division and of the order in which examples are visited.
      fractions: of the splits; without `test` where the source has test examples.

    Returns:
      The three splits that a run may see, and the sealed test split.

    Raises:
      InputError: the logits have another shape, or are not finite.
    """
    shape = (len(dataset.labels), dataset.num_classes)
    if teacher_logits.shape != shape:
        raise InputError(
            f"teacher logits must have shape [examples, classes], {list(shape)}; got {list(teacher_logits.shape)}: "
            "run the teacher on this data set"
        )
    finite = np.isfinite(teacher_logits).all(axis=1)
    if not finite.all():
        raise InputError(
            f"teacher logits must be finite; got nan or infinity in row {int(finite.argmin())}: check the teacher and "
            "its input scale"
        )
    positions = split_rows(dataset.labels, dataset.test_rows, seed=seed, fractions=fractions)
    explore = positions["explore"]
    logits = {"logits": teacher_logits[explore][None]}
    pool = resident(dataset.inputs[explore], dataset.labels[explore], explore, logits, seed=seed)

    def held(name: str) -> Batch:
        at = positions[name]
        groups = None if dataset.groups is None else dataset.groups[at]
        return held_out(dataset.inputs[at], dataset.labels[at], at, {"logits": teacher_logits[at]}, groups)

    assess, decide, test = map(held, SPLITS[1:])
    return Pools(pool, assess, decide), test
