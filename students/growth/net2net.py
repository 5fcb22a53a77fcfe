"""The arithmetic of growth: which old feature each new feature copies, and the factor and offset of every weight.

See `students/growth/grow.py` for the reasons.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.students.axes import Axis, GrowthSpec, Layer, Path
from ev3_distill.types import PyTree

MIN_SHARE, MAX_SHARE = 0.6, 1.4  # of a copy, before shares are scaled to sum to 1: of two copies, each gets 0.3 to 0.7
NOISE = 0.2  # amount added to one copy's weights and taken from the others', in units of 1 / sqrt(inputs)

SpaceMap = Mapping[str, str]  # new space -> old space with the same features; none for spaces inside new branches


class Copies(NamedTuple):
    """Which old feature each new feature of a space copies."""

    size: int  # of the old space
    indices: np.ndarray  # int [new size]
    drawn: bool = False  # whether repeated features are drawn rather than copied

    @property
    def added(self) -> np.ndarray:
        """Which features are drawn, bool [new size]."""
        repeated = np.ones(len(self.indices), bool)
        repeated[np.unique(self.indices, return_index=True)[1]] = False
        return repeated & self.drawn


class ArrayGrowth(NamedTuple):
    """How one array of the larger network is computed."""

    source: Path  # of the old array it grows from; () if it is new
    shape: tuple[int, ...]  # of the old array
    copies: tuple[tuple[int, np.ndarray], ...] = ()  # dimensions that grow, with the old index of each new one
    value: np.ndarray | None = None  # factor of a value, of the grown shape; None: 1
    offset: np.ndarray | None = None  # added to the value afterwards; cancels in sums over copies
    new: np.ndarray | None = None  # initial value, for an array that grows from none

    def grown(self, old: np.ndarray) -> np.ndarray:
        """The grown array."""
        for dimension, source in self.copies:
            old = old.take(source, dimension)
        grown = old if self.value is None else (old * self.value).astype(old.dtype)
        return grown if self.offset is None else (grown + self.offset).astype(old.dtype)


def match_spaces(old: GrowthSpec, new: GrowthSpec) -> dict[str, str]:
    """Maps new spaces to old ones: by name or, after an inserted identity, to the space before it.

    Layers must come in the order of the forward pass.
    """
    spaces = {name: name for name in new.spaces if name in old.spaces}
    for layer in new.layers.values():
        if layer.start == "identity":
            before, after = (axis.space for axis in layer.axes if axis is not None)
            spaces |= {after: spaces[before]} if before in spaces and after not in spaces else {}
    return spaces


def copy_spaces(rng: np.random.Generator, old: GrowthSpec, new: GrowthSpec, spaces: SpaceMap) -> dict[str, Copies]:
    """Decides which features are copied, by space.

    Old features keep their positions and copies come last, except in spaces that hold others.
    """
    copies: dict[str, Copies] = {}
    for name, space in new.spaces.items():
        if name not in spaces:
            continue
        before = old.spaces[spaces[name]]
        if space.holds is None or before.holds is None:
            copies[name] = Copies(before.size, _repeated(rng, before.size, space.size), space.drawn)
            continue
        (held, start), (_, old_start) = space.holds, before.holds
        inside = copies[held].indices + old_start
        outside = np.setdiff1d(np.arange(before.size), inside)
        outside = outside[_repeated(rng, outside.size, space.size - inside.size)]
        copies[name] = Copies(before.size, np.concatenate([outside[:start], inside, outside[start:]]))
    return copies


def _repeated(rng: np.random.Generator, old: int, new: int) -> np.ndarray:
    """Old indices [new]: each once, then all again in random order, as often as needed."""
    rounds = [rng.permutation(old) for _ in range(-(-new // old) - 1)]
    return np.concatenate([np.arange(old), *rounds])[:new]


def array_growths(
    rng: np.random.Generator,
    old: GrowthSpec,
    new: GrowthSpec,
    copies: Mapping[str, Copies],
    initial: PyTree,
    *,
    trained: bool,
) -> dict[Path, ArrayGrowth]:
    """How each array of the larger network is computed, by path.

    Args:
      rng: draws the shares.
      old: how the smaller network can grow.
      new: how the larger network can grow.
      copies: by space, see `copy_spaces`.
      initial: initial parameters or statistics of the larger network; shapes suffice for layers that are not new.
      trained: whether these are parameters.

    Raises:
      InputError: the growth spec does not match the network.
    """
    names, arrays = {layer.path: name for name, layer in new.layers.items()}, {}
    for keys, array in jax.tree_util.tree_leaves_with_path(initial):
        path = key_path(keys)
        owner = next((names[path[:i]] for i in range(len(path) + 1) if path[:i] in names), None)
        if owner is None:
            raise InputError(
                f"a GrowthSpec has a layer for every array; got none for {list(path)}: fix the network's `grow`"
            )
        layer = new.layers[owner]
        if owner in old.layers:
            source = (*old.layers[owner].path, *path[len(layer.path) :])
            arrays[path] = _grown_array(rng, source, array, growing_axes(layer, path, array.shape, new), copies)
        elif trained and layer.start == "zero":
            arrays[path] = _new_array(np.zeros(array.shape, array.dtype))
        elif trained and layer.start == "identity":
            growth = _grown_array(rng, (), array, growing_axes(layer, path, array.shape, new), copies)
            identity = np.eye(*growth.shape) if len(growth.shape) == 2 else np.zeros(growth.shape)
            arrays[path] = _new_array(growth.grown(identity.astype(array.dtype)))
        else:
            arrays[path] = _new_array(np.asarray(array))
    return arrays


def key_path(keys: Sequence[Any]) -> Path:
    """Converts JAX's dictionary keys to a path."""
    return tuple(key.key for key in keys)


def _new_array(new: np.ndarray) -> ArrayGrowth:
    return ArrayGrowth((), (), new=new)


def growing_axes(layer: Layer, path: Path, shape: Sequence[int], spec: GrowthSpec) -> dict[int, Axis]:
    """The axes of an array that grow, by dimension.

    Raises:
      InputError: the size of a space differs from the array's shape.
    """
    count = min(len(shape), len(layer.axes))
    axes = {len(shape) - count + i: axis for i, axis in enumerate(layer.axes[len(layer.axes) - count :])}
    growing = {dimension: axis for dimension, axis in axes.items() if axis is not None}
    for dimension, axis in growing.items():
        if shape[dimension] != axis.times * spec.spaces[axis.space].size:
            raise InputError(
                f"the spaces of a GrowthSpec have the sizes of the arrays' axes; got {spec.spaces[axis.space].size} for "
                f"{axis.space}, axis {dimension} of {list(path)} {list(shape)}: fix the network's `grow`"
            )
    return growing


def _grown_array(
    rng: np.random.Generator,
    source: Path,
    initial: Any,
    axes: Mapping[int, Axis],
    copies: Mapping[str, Copies],
) -> ArrayGrowth:
    """Copies an old array along its axes, one after another, and computes the factors.

    Where a feature is drawn, the weights that write it come from `initial` and the weights that read it are zero. `initial` may
    be a shape if no feature is drawn.
    """
    shape: tuple[int, ...] = initial.shape
    before, indices = list(shape), {}
    written, read = np.zeros(shape, bool), np.zeros(shape, bool)  # entries that write or read drawn features
    for dimension, axis in axes.items():
        size, index, _ = copies[axis.space]
        before[dimension] = axis.times * size
        if not np.array_equal(index, np.arange(size)):
            indices[dimension] = (size * np.arange(axis.times)[:, None] + index).ravel()
            added = np.expand_dims(np.tile(copies[axis.space].added, axis.times), _other_axes(shape, dimension))
            written, read = (written, read | added) if axis.reads else (written | added, read)
    if not indices:
        return ArrayGrowth(source, tuple(before))
    value, offset = np.ones(before), np.zeros(before)
    noise = NOISE / np.sqrt(math.prod(before[:-1]))
    for dimension, index in sorted(indices.items(), key=lambda item: axes[item[0]].reads):
        value, offset = value.take(index, dimension), offset.take(index, dimension)
        if axes[dimension].reads and not copies[axes[dimension].space].drawn:
            gain = (shape[dimension] / before[dimension]) ** axes[dimension].power
            shares, cancelling = _random_shares(rng, value.shape, dimension, index)
            value, offset = value * shares * gain, (offset * shares + noise * cancelling) * gain
    if (new := written | read).any():
        value, offset = np.where(new, 0, value), np.where(new, 0, offset)
        if written.any():
            drawn = np.asarray(initial)
            if any(
                axis.reads for axis in axes.values()
            ):  # inputs come from a ReLU: avoid units that are dead for all of them
                drawn = drawn * np.where(drawn.sum(tuple(range(drawn.ndim - 1))) < 0, -1, 1)
            offset = np.where(written, drawn, offset)
    factors = (factor.astype(np.float32) for factor in (value, offset))
    return ArrayGrowth(source, tuple(before), tuple(indices.items()), *factors)


def _random_shares(
    rng: np.random.Generator, shape: Sequence[int], dimension: int, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Random shares that sum to 1 over all copies of an old index, and random numbers that sum to 0 over them.

    They are 1 and 0 if there is one copy. With many copies, the numbers have variance 1.
    """
    shares, numbers = rng.uniform(MIN_SHARE, MAX_SHARE, tuple(shape)), rng.normal(size=tuple(shape))
    counts, order = np.bincount(index), np.argsort(index, kind="stable")
    firsts = np.cumsum(counts) - counts

    def mean(array: np.ndarray) -> np.ndarray:
        total = np.add.reduceat(array.take(order, dimension), firsts, dimension)
        return (total / np.expand_dims(counts, _other_axes(shape, dimension))).take(index, dimension)

    return shares / mean(shares) / np.expand_dims(counts[index], _other_axes(shape, dimension)), numbers - mean(numbers)


def _other_axes(shape: Sequence[int], dimension: int) -> list[int]:
    """All dimensions except one."""
    return [d for d in range(len(shape)) if d != dimension]
