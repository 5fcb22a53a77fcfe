"""Which old feature each new one copies, and by what every weight is then multiplied: the arithmetic of `students.grow`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.students.growth.axes import Axis, Layer, Layout, Path
from ev3_distill.types import PyTree

_LEAST, _MOST = 0.6, 1.4  # of a copy's share before they are made to sum to 1: of two, each has 0.3 to 0.7
_NOISE = 0.2  # of what is added to one copy's weights and taken from the others', in parts of 1 / sqrt(inputs)

Standing = Mapping[str, str]  # by space, the old one whose features it has; none for those inside of new branches


class Copies(NamedTuple):
    """Which old feature each new one of a space copies."""

    size: int  # of the old space
    indices: np.ndarray  # int [new size]
    drawn: bool = False  # whether the second and later of one old feature are drawn instead; moments still copy its own

    @property
    def added(self) -> np.ndarray:
        """Which features are drawn, bool [new size]."""
        later = np.ones(len(self.indices), bool)
        later[np.unique(self.indices, return_index=True)[1]] = False
        return later & self.drawn


class Leaf(NamedTuple):
    """How one array of a grown network comes about."""

    source: Path  # of the old array that it grows from or, if it is new, that it is like
    shape: tuple[int, ...]  # of the old array, where it grows from one
    copies: tuple[tuple[int, np.ndarray], ...] = ()  # dimensions that grow, with the old index of each new one
    value: np.ndarray | None = None  # what a value is multiplied by, of the grown shape; None for 1
    offset: np.ndarray | None = None  # what is added to it then: it cancels where copies are summed
    gradient: np.ndarray | None = None  # what a gradient is multiplied by, of a shape that broadcasts
    new: np.ndarray | None = None  # the start of an array that grows from none

    def of_parameter(self, old: np.ndarray) -> np.ndarray:
        """The grown array; where it is new, `old` says its type alone."""
        if self.new is not None:
            return self.new.astype(old.dtype)
        grown = self._grown(old, self.value)
        return grown if self.offset is None else (grown + self.offset).astype(old.dtype)

    def of_gradient(self, old: np.ndarray) -> np.ndarray:
        """The same of a gradient's mean."""
        return self._grown(old, self.gradient) if self.new is None else np.zeros(self.new.shape, old.dtype)

    def of_second_moment(self, old: np.ndarray) -> np.ndarray:
        """The same of a squared gradient's mean."""
        if self.new is not None:
            return np.full(self.new.shape, old.mean(), old.dtype)
        if self.value is None or self.gradient is None:
            return self._grown(old, None)
        ones = np.ones(np.broadcast_shapes(self.gradient.shape, self.value.shape), np.float32)
        return self._grown(old, np.divide(self.gradient, self.value, out=ones, where=self.value != 0) ** 2)

    def _grown(self, old: np.ndarray, factor: np.ndarray | None) -> np.ndarray:
        for dimension, source in self.copies:
            old = old.take(source, dimension)
        return old if factor is None else (old * factor).astype(old.dtype)


def standing_of(old: Layout, new: Layout) -> dict[str, str]:
    """A space is what it was or, behind an inserted identity, what is before that. Layers come front to back."""
    found = {name: name for name in new.spaces if name in old.spaces}
    for layer in new.layers.values():
        if layer.start == "identity":
            before, after = (axis.space for axis in layer.axes if axis is not None)
            found |= {after: found[before]} if before in found and after not in found else {}
    return found


def copies_of(rng: np.random.Generator, old: Layout, new: Layout, standing: Standing) -> dict[str, Copies]:
    """By space. Old features stay where they are and copies come last, but in spaces that hold others."""
    found: dict[str, Copies] = {}
    for name, space in new.spaces.items():
        if name not in standing:
            continue
        before = old.spaces[standing[name]]
        if space.holds is None or before.holds is None:
            found[name] = Copies(before.size, _copied(rng, before.size, space.size), space.drawn)
            continue
        (held, at), (_, old_at) = space.holds, before.holds
        within = found[held].indices + old_at
        around = np.setdiff1d(np.arange(before.size), within)
        around = around[_copied(rng, around.size, space.size - within.size)]
        found[name] = Copies(before.size, np.concatenate([around[:at], within, around[at:]]))
    return found


def _copied(rng: np.random.Generator, old: int, new: int) -> np.ndarray:
    """Old indices [new]: each once, and once more, as often as it takes, in random order."""
    rounds = [rng.permutation(old) for _ in range(-(-new // old) - 1)]
    return np.concatenate([np.arange(old), *rounds])[:new]


def leaves_of(
    rng: np.random.Generator, old: Layout, new: Layout, copies: Mapping[str, Copies], fresh: PyTree, *, trained: bool
) -> dict[Path, Leaf]:
    """How each array comes about, by path.

    Args:
      rng: of the shares.
      old: of the network that grows.
      new: of what it becomes.
      copies: by space, see `copies_of`.
      fresh: the larger network's parameters or statistics as it draws them; shapes will do where a layer is not new.
      trained: whether these are parameters.

    Raises:
      InputError: the layout is not this network's.
    """
    names, leaves = {layer.path: name for name, layer in new.layers.items()}, {}
    for keys, array in jax.tree_util.tree_leaves_with_path(fresh):
        path = path_of(keys)
        owner = next((names[path[:i]] for i in range(len(path) + 1) if path[:i] in names), None)
        if owner is None:
            raise InputError(
                f"a layout has a layer for every array; got none for {list(path)}: mend the network's `grow`"
            )
        layer, like = new.layers[owner], owner
        while like not in old.layers:
            like = new.layers[like].like or ""
        source = (*old.layers[like].path, *path[len(layer.path) :])
        if owner in old.layers:
            leaves[path] = _spread(rng, source, array, axes_of(layer, path, array.shape, new), copies)
        elif trained and layer.start == "zero":
            leaves[path] = _begun(source, np.zeros(array.shape, array.dtype))
        elif trained and layer.start == "identity":
            spread = _spread(rng, source, array, axes_of(layer, path, array.shape, new), copies)
            first = np.eye(*spread.shape) if len(spread.shape) == 2 else np.zeros(spread.shape)
            leaves[path] = _begun(source, spread.of_parameter(first.astype(array.dtype)))
        else:
            leaves[path] = _begun(source, np.asarray(array))
    return leaves


def path_of(keys: Sequence[Any]) -> Path:
    """Of JAX's keys of dictionaries."""
    return tuple(key.key for key in keys)


def _begun(source: Path, new: np.ndarray) -> Leaf:
    return Leaf(source, (), new=new)


def axes_of(layer: Layer, path: Path, shape: Sequence[int], new: Layout) -> dict[int, Axis]:
    """By dimension; checked against the array's shape."""
    count = min(len(shape), len(layer.axes))
    axes = {len(shape) - count + i: axis for i, axis in enumerate(layer.axes[len(layer.axes) - count :])}
    found = {dimension: axis for dimension, axis in axes.items() if axis is not None}
    for dimension, axis in found.items():
        if shape[dimension] != axis.times * new.spaces[axis.space].size:
            raise InputError(
                f"a layout's spaces are as large as the axes that run over them; got {new.spaces[axis.space].size} for "
                f"{axis.space}, axis {dimension} of {list(path)} {list(shape)}: mend the network's `grow`"
            )
    return found


def _spread(
    rng: np.random.Generator,
    source: Path,
    fresh: Any,
    axes: Mapping[int, Axis],
    copies: Mapping[str, Copies],
) -> Leaf:
    """An array as copies of an old one, axis after axis, with the factors that come of it.

    Where a feature is drawn what writes it is as in `fresh`, which may be a shape alone where none is, and what reads it zero.
    """
    shape: tuple[int, ...] = fresh.shape
    before, indices = list(shape), {}
    written, read = np.zeros(shape, bool), np.zeros(shape, bool)
    for dimension, axis in axes.items():
        size, index, _ = copies[axis.space]
        before[dimension] = axis.times * size
        if not np.array_equal(index, np.arange(size)):
            indices[dimension] = (size * np.arange(axis.times)[:, None] + index).ravel()
            added = np.expand_dims(np.tile(copies[axis.space].added, axis.times), _others(shape, dimension))
            written, read = (written, read | added) if axis.reads else (written | added, read)
    if not indices:
        return Leaf(source, tuple(before))
    value, offset, gradient = np.ones(before), np.zeros(before), np.ones([1] * len(shape))
    noise = _NOISE / np.sqrt(math.prod(before[:-1]))
    for dimension, index in sorted(indices.items(), key=lambda item: axes[item[0]].reads):
        value, offset = value.take(index, dimension), offset.take(index, dimension)
        if copies[axes[dimension].space].drawn:
            continue
        if axes[dimension].reads:
            gain = (shape[dimension] / before[dimension]) ** axes[dimension].power
            shares, cancelling = _split(rng, value.shape, dimension, index)
            value, offset, gradient = (
                value * shares * gain,
                (offset * shares + noise * cancelling) * gain,
                gradient / gain,
            )
        else:
            part = 1 / np.bincount(index)[index]
            gradient = gradient * np.expand_dims(part, _others(shape, dimension))
    if (new := written | read).any():
        value, offset, gradient = np.where(new, 0, value), np.where(new, 0, offset), np.where(new, 0, gradient)
        if written.any():
            drawn = np.asarray(fresh)
            if any(axis.reads for axis in axes.values()):  # what ReLUs made: not one that is shut for all of it
                drawn = drawn * np.where(drawn.sum(tuple(range(drawn.ndim - 1))) < 0, -1, 1)
            offset = np.where(written, drawn, offset)
    factors = (factor.astype(np.float32) for factor in (value, offset, gradient))
    return Leaf(source, tuple(before), tuple(indices.items()), *factors)


def _split(
    rng: np.random.Generator, shape: Sequence[int], dimension: int, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Random shares that sum to 1 along a dimension over all copies of an old index, and random numbers that sum to 0.

    They are 1 and 0 where there is one copy. The numbers are of variance 1 where there are many.
    """
    shares, numbers = rng.uniform(_LEAST, _MOST, tuple(shape)), rng.normal(size=tuple(shape))
    counts, order = np.bincount(index), np.argsort(index, kind="stable")
    firsts = np.cumsum(counts) - counts

    def mean(drawn: np.ndarray) -> np.ndarray:
        total = np.add.reduceat(drawn.take(order, dimension), firsts, dimension)
        return (total / np.expand_dims(counts, _others(shape, dimension))).take(index, dimension)

    return shares / mean(shares) / np.expand_dims(counts[index], _others(shape, dimension)), numbers - mean(numbers)


def _others(shape: Sequence[int], dimension: int) -> list[int]:
    """All dimensions but one."""
    return [d for d in range(len(shape)) if d != dimension]
