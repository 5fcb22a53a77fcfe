"""Pools: the explore split as training visits it, batch by batch, each a pure function of the global step.

A pool is `Resident`, whole on the device, or a `Window`, the next steps of a split that is too large for that; both give
the same batches. Each epoch sees the next view of every example: view v is its augmentation with counter-based keys, and
the teacher's logits on those very pixels; after V views the first comes again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.config import Fractions
from ev3_distill.data.augment import Augmentation, partner_of, view_of
from ev3_distill.data.shuffle import Order, epoch_of, order, rows
from ev3_distill.data.splits import DEFAULT_FRACTIONS, SPLITS, split_rows
from ev3_distill.errors import InputError
from ev3_distill.types import Apply, Batch, Pools, PyTree, Sample, Variables


class Resident(NamedTuple):
    """The explore split on the device."""

    examples: Batch  # leaves [N, ...], but teacher_logits [V, N, K] and teacher_features [V, N, ...]
    order: Order
    teacher: Variables | tuple[()] = ()  # of a JAX teacher that runs inside the step


class Window(NamedTuple):
    """The batches of the next W steps, in their order, as students see them."""

    examples: Batch  # leaves [W * B, ...]
    first: jax.Array  # int32, their first global step


def sampler(
    *, batch_size: int, views: int = 1, augmentation: Augmentation | None = None, teacher: Apply | None = None
) -> Sample:
    """Makes the batches of a pool.

    Args:
      batch_size: B.
      views: V, or more than any run will see where nothing is cached.
      augmentation: of the views; None leaves examples as they are.
      teacher: the forward pass of a JAX teacher that runs inside the step, its variables in the pool.
    """

    def sample(pool: PyTree, step: jax.Array) -> Batch:
        if isinstance(pool, Window):
            at = (step - pool.first) * batch_size
            batch = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, batch_size), pool.examples)
        else:
            chosen = rows(pool.order, step, batch_size=batch_size)
            view = epoch_of(pool.order, step, batch_size=batch_size) % np.uint32(views)
            batch = seen(pool.examples, chosen, view.astype(jnp.int32), augmentation)
        if teacher is None:
            return batch
        logits, _ = teacher(pool.teacher, batch.inputs, train=False)
        return batch._replace(teacher_logits=logits)

    return sample


def seen(examples: Batch, chosen: jax.Array, view: jax.Array, augmentation: Augmentation | None) -> Batch:
    """The chosen rows [B] of a resident split in one of its views.

    Examples that are mixed with others have no label (-1): their label is what the teacher says.
    """
    taught = view % examples.teacher_logits.shape[0]
    batch = Batch(
        inputs=examples.inputs[chosen],
        labels=examples.labels[chosen],
        teacher_logits=examples.teacher_logits[taught, chosen],
        index=examples.index[chosen],
        weight=examples.weight[chosen],
        teacher_features={name: leaf[taught, chosen] for name, leaf in examples.teacher_features.items()},
    )
    if augmentation is None:
        return batch
    partners = None
    if augmentation.mix:
        partners = examples.inputs[partner_of(augmentation, chosen, view, len(examples.index))]
    inputs, mixed = view_of(augmentation, batch.inputs, partners, batch.index, view)
    return batch._replace(inputs=inputs, labels=jnp.where(mixed, -1, batch.labels))


def resident(
    inputs: np.ndarray, labels: np.ndarray, index: np.ndarray, teacher: Mapping[str, np.ndarray], *, seed: int
) -> Resident:
    """A split on the default device.

    Args:
      inputs: [N, ...] uint8 or float32.
      labels: [N].
      index: [N] positions in the data set.
      teacher: "logits" [V, N, K] and features [V, N, ...].
      seed: of the order.
    """
    return Resident(_batch(inputs, labels, index, teacher), order(len(index), seed))


def held_out(
    inputs: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    logits: np.ndarray,
    groups: np.ndarray | None = None,
) -> Batch:
    """A held-out split, or a part of one, on the default device: inputs [N, ...], the rest [N], logits [N, K]."""
    batch = _batch(inputs, labels, index, {"logits": logits})
    return batch if groups is None else batch._replace(group=jnp.asarray(groups, jnp.int32))


def _batch(inputs: np.ndarray, labels: np.ndarray, index: np.ndarray, teacher: Mapping[str, np.ndarray]) -> Batch:
    return Batch(
        inputs=jnp.asarray(inputs),
        labels=jnp.asarray(labels, jnp.int32),
        teacher_logits=jnp.asarray(teacher["logits"], jnp.float32),
        index=jnp.asarray(index, jnp.int32),
        weight=jnp.ones(len(index), jnp.float32),
        teacher_features={name: jnp.asarray(leaf) for name, leaf in teacher.items() if name != "logits"},
    )


def split(
    dataset: Any, teacher_logits: np.ndarray, *, seed: int, fractions: Fractions = DEFAULT_FRACTIONS
) -> tuple[Pools, Batch]:
    """Divides a data set into the four splits, whole on the default device.

    Args:
      dataset: N examples of K classes, see `load_data`.
      teacher_logits: [N, K], in the data set's order.
      seed: of the division and of the order.
      fractions: of the splits; without `test` where the source has test examples.

    Returns:
      The three splits that a run may see, and the sealed test split.
    """
    shape = (len(dataset.labels), dataset.num_classes)
    if teacher_logits.shape != shape:
        raise InputError(
            f"teacher logits must be [examples, classes], {list(shape)}; got {list(teacher_logits.shape)}: "
            "run the teacher on this very data set"
        )
    finite = np.isfinite(teacher_logits).all(axis=1)
    if not finite.all():
        raise InputError(
            f"teacher logits must be finite; got nan or infinity in row {int(finite.argmin())}: check the teacher and "
            "its input scale"
        )
    chosen = split_rows(dataset.labels, dataset.test_rows, seed=seed, fractions=fractions)
    explore, *held = ((dataset.inputs[chosen[x]], dataset.labels[chosen[x]], chosen[x]) for x in SPLITS)
    pool = resident(*explore, {"logits": teacher_logits[chosen["explore"]][None]}, seed=seed)
    groups = [None if dataset.groups is None else dataset.groups[rows] for *_, rows in held]
    assess, decide, test = (
        held_out(*parts, teacher_logits[parts[2]], group) for parts, group in zip(held, groups, strict=True)
    )
    return Pools(pool, assess, decide), test
