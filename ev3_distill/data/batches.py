"""Batches of the explore split, each a pure function of the global step.

A pool holds the examples. `Resident` is the whole split on the device; `Window` is the next few steps of a split that is too
large for the device. Both give the same batches. Each epoch trains on the next view of every example: view v is the example
augmented with counter-based keys, together with the teacher's outputs on those pixels. After V views the first one returns.

The final phase of a run trains on all rows of explore, assess and decide. Before it, no batch has an example of assess or
decide, nor a part of one: examples are mixed with rows of the phase alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.config import Compress, Fractions
from ev3_distill.data.augment import Augmentation, partner_of, view_of
from ev3_distill.data.deal import splits_of
from ev3_distill.data.shuffle import Order, batch_rows, epoch_of, make_order
from ev3_distill.data.splits import DEFAULT_FRACTIONS, SPLITS
from ev3_distill.errors import InputError
from ev3_distill.types import Apply, Batch, Pools, PyTree, Sample, Variables


class Resident(NamedTuple):
    """The explore split on the device, and for a final phase the rows of assess and decide after it."""

    examples: Batch  # leaves [N, ...]; those of `teacher` [V, N, ...]; the rows of explore are the first
    order: Order  # of the rows of explore
    teacher: Variables | tuple[()] = ()  # variables of a JAX teacher that runs inside the training step
    final_order: Order | tuple[()] = ()  # of all rows; () in a run without a final phase
    final: jax.Array | tuple[()] = ()  # bool, whether the run is in its final phase; () means that it is not


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
            positions, epoch, rows = _visit(pool, step, batch_size)
            view = (epoch % np.uint32(views)).astype(jnp.int32)
            batch = view_batch(pool.examples, positions, view, augmentation, rows=rows)
        if teacher is None:
            return batch
        logits, _ = teacher(pool.teacher, batch.inputs, train=False)
        return batch._replace(teacher={**batch.teacher, "logits": logits})

    return sample


def _visit(pool: Resident, step: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """The rows of a step's batch [B], their epoch, and the number of rows that batches may have in this phase of the run."""

    def visit(order: Order) -> tuple[jax.Array, jax.Array, jax.Array | int]:
        rows = batch_rows(order, step, batch_size=batch_size)
        return rows, epoch_of(order, step, batch_size=batch_size), order.base.shape[0]

    if isinstance(pool.final, tuple) or not isinstance(pool.final_order, Order):
        return visit(pool.order)
    before, last = visit(pool.order), visit(pool.final_order)
    rows, epoch, number = (jnp.where(pool.final, b, a) for a, b in zip(before, last, strict=True))
    return rows, epoch, number


def view_batch(
    examples: Batch,
    positions: jax.Array,
    view: jax.Array,
    augmentation: Augmentation | None,
    *,
    rows: jax.Array | int,
) -> Batch:
    """Selects rows [B] of a resident split in one view.

    Examples that are mixed with others have no target of their own; there the teacher's outputs are the only target.

    Args:
      examples: of the pool.
      positions: rows to select.
      view: number of the view.
      augmentation: None for unchanged examples.
      rows: number of rows, the first ones, that examples may be mixed with.
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
        partners = examples.inputs[partner_of(augmentation, positions, view, rows)]
    inputs, mixed = view_of(augmentation, batch.inputs, partners, batch.index, view)
    return batch._replace(inputs=inputs, targets=without_targets(batch.targets, mixed))


def without_targets(targets: PyTree, missing: Any) -> PyTree:
    """Marks the targets of some examples [B] bool as missing: -1 in integer leaves, nan in floating leaves."""

    def mark(leaf: jax.Array) -> jax.Array:
        absent = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else -1
        return jnp.where(jnp.reshape(missing, (-1, *[1] * (leaf.ndim - 1))), jnp.asarray(absent, leaf.dtype), leaf)

    return jax.tree.map(mark, targets)


def resident(
    inputs: np.ndarray,
    targets: PyTree,
    index: np.ndarray,
    teacher: Mapping[str, np.ndarray],
    *,
    seed: int,
    explored: int | None = None,
) -> Resident:
    """Places a split on the default device; for a run with a final phase, all three splits.

    Args:
      inputs: [N, ...] uint8 or float32.
      targets: leaves [N, ...].
      index: [N] positions in the data set.
      teacher: the teacher's outputs and features by name, [V, N, ...].
      seed: of the order in which examples are visited.
      explored: number of rows of explore, which are the first, if those of assess and decide follow for a final phase.
    """
    examples, final_order = make_batch(inputs, targets, index, teacher), make_order(len(index), seed)
    if explored is None:
        return Resident(examples, final_order)
    return Resident(examples, make_order(explored, seed), final_order=final_order)


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
    group, unit, lone = (() if rows is None else _placed(rows, np.int32) for rows in (groups, units, first))
    return make_batch(inputs, targets, index, teacher)._replace(group=group, unit=unit, lone=lone)


def make_batch(inputs: Any, targets: PyTree, index: np.ndarray, teacher: Mapping[str, np.ndarray]) -> Batch:
    """Host arrays as a batch on the default device, each example with weight 1."""
    return Batch(
        inputs=jax.device_put(inputs),
        targets=jax.tree.map(_as_target, targets),
        teacher={name: _placed(leaf, np.float32) for name, leaf in teacher.items()},
        index=_placed(index, np.int32),
        weight=_placed(np.ones(len(index)), np.float32),
    )


def _as_target(leaf: Any) -> jax.Array:
    floating = jnp.issubdtype(np.asarray(leaf).dtype, jnp.floating)
    return _placed(leaf, np.float32 if floating else np.int32)


def _placed(leaf: Any, dtype: Any) -> jax.Array:
    """An array on the default device, converted on the host: there it needs no program."""
    return jax.device_put(np.asarray(leaf, dtype))


def rows_of_final(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """The rows that a final phase trains on, those of explore first, from the rows of each split."""
    return np.concatenate([rows[name] for name in ("explore", "assess", "decide")])


def split(
    dataset: Any,
    teacher_logits: np.ndarray,
    *,
    seed: int,
    fractions: Fractions = DEFAULT_FRACTIONS,
    final: bool = True,
) -> tuple[Pools, Batch]:
    """Divides a data set into the four splits and places them on the default device; see `splits_of`.

    Args:
      dataset: N examples of K classes, see `load_data`.
      teacher_logits: [N, K], in the data set's order.
      seed: of the division and of the order in which examples are visited.
      fractions: of the splits; without `test` where the source has test examples.
      final: whether the pool of explore also holds the rows of assess and decide, for a final phase that trains on all three.

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
    positions = splits_of(Compress(seed=seed, splits=fractions), dataset)
    explored = len(positions["explore"]) if final else None
    rows = rows_of_final(positions) if final else positions["explore"]
    logits = {"logits": teacher_logits[rows][None]}
    pool = resident(dataset.inputs[rows], dataset.labels[rows], rows, logits, seed=seed, explored=explored)

    def held(name: str) -> Batch:
        at = positions[name]
        groups = None if dataset.groups is None else dataset.groups[at]
        return held_out(dataset.inputs[at], dataset.labels[at], at, {"logits": teacher_logits[at]}, groups)

    assess, decide, test = map(held, SPLITS[1:])
    return Pools(pool, assess, decide), test
