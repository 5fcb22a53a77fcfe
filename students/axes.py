"""How a network can grow: which axis of which array runs over which features, and which moves make it larger.

A *space* is a set of features that grow together: the units of a hidden layer, the channels of a residual stage, the heads of
an attention layer. An axis of an array *writes* a space if the array produces these features, and *reads* it if the network
sums over them. Copying features copies the arrays that write them and divides the arrays that read them (Chen et al., Net2Net,
ICLR 2016; arXiv:1511.05641). Features that are drawn instead are initialized as in a new network, and read with zeros at first.
"""

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Start = Literal["drawn", "zero", "identity"] | None
Path = tuple[str | int, ...]  # of an array or a layer, in the dictionaries of parameters and statistics


class Space(NamedTuple):
    """Features that grow together."""

    size: int
    even: bool = False  # whether all features must be copied equally often, because a LayerNorm averages over them
    holds: tuple[str, int] | None = (
        None  # (space, index): a space whose features are added to these from that index on, by
    )
    # a padded shortcut
    drawn: bool = False  # whether new features are drawn rather than copied: a copy of a dead ReLU unit is dead too


class Axis(NamedTuple):
    """The features along one axis of an array."""

    space: str
    reads: bool
    times: int = 1  # the axis is this many repetitions of the space, one after another: flattened pixels
    power: float = 0.0  # the network divides what it reads by size ** power: attention, by the root of the head size


class Layer(NamedTuple):
    """The arrays under a path."""

    path: Path
    axes: tuple[Axis | None, ...]  # of the last dimensions; None where nothing grows. A kernel [h, w, C, O] with axes
    # (reads, writes) has a bias [O] that writes
    start: Start = (
        None  # how the layer starts when it is inserted: drawn parameters, zeros, or a dense identity [C, C] with
    )
    # axes (reads, writes). None: the layer is never inserted. Layers inserted together must keep the function


class GrowthSpec(NamedTuple):
    """How a network can grow. Spaces and layers keep their names when it does."""

    spaces: Mapping[str, Space]  # a space comes after the one it holds
    layers: Mapping[str, Layer]  # of all arrays, parameters and statistics
    moves: Mapping[str, Mapping[str, Any]]  # by name, the options that change; None for an option to remove
    fixed: tuple[str, ...] = ()  # options that never change


def writes(space: str) -> Axis:
    """An axis along which features are produced."""
    return Axis(space, reads=False)


def reads(space: str, *, times: int = 1, power: float = 0.0) -> Axis:
    """An axis over which the network sums."""
    return Axis(space, reads=True, times=times, power=power)


def next_size(size: int) -> int:
    """The first of 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least a third larger: about twice the parameters."""
    sizes = (base << doublings for doublings in itertools.count() for base in (2, 3))
    return next(candidate for candidate in sizes if 3 * candidate >= 4 * size)
