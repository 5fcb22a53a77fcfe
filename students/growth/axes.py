"""What growth must know of a network: which axis of which array runs over which features, and what it may become next.

A *space* is a set of features that grow together: the units of a hidden layer, the channels of a residual stage, the heads of
an attention. An axis of an array *writes* a space where it makes these features, and *reads* it where the network sums over
them. Copying features copies what writes them and divides what reads them (Chen et al., Net2Net, ICLR 2016; arXiv:1511.05641).
Features that are drawn are written as a new network writes them, and read with zeros at first.
"""

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Start = Literal["drawn", "zero", "identity"] | None
Path = tuple[str | int, ...]  # of an array or of a layer, in the dictionaries of parameters and of statistics


class Space(NamedTuple):
    """Features that grow together."""

    size: int
    even: bool = False  # whether all are copied equally often: a LayerNorm takes mean and variance over them
    holds: tuple[str, int] | None = None  # a space that is added to these from an index on: a padded shortcut
    drawn: bool = False  # whether what is added is drawn and not copied: copies of units that a ReLU has shut stay shut


class Axis(NamedTuple):
    """What an axis of an array runs over."""

    space: str
    reads: bool
    times: int = 1  # the axis is the space this many times, one after the other: pixels that were flattened
    power: float = 0.0  # the network divides what it reads by size ** power: attention, by the root of a head's


class Layer(NamedTuple):
    """The arrays under a path."""

    path: Path
    axes: tuple[Axis | None, ...]  # of the last dimensions, None where nothing grows: a kernel [h, w, C, O] of axes
    # (reads, writes) has a bias [O] that writes
    start: Start = None  # as what it is inserted: parameters drawn, or zero, or a dense identity [C, C] of axes
    # (reads, writes); None: never. What is inserted together must keep the function
    like: str | None = None  # the layer before whose second moments stand for its own where it is inserted


class Layout(NamedTuple):
    """A network's spaces and layers by names that they keep when it grows, and what it may become."""

    spaces: Mapping[str, Space]  # one that another holds comes first
    layers: Mapping[str, Layer]  # of all arrays, parameters and statistics
    moves: Mapping[str, Mapping[str, Any]]  # by name, the options that change; None for one that is left out
    fixed: tuple[str, ...] = ()  # options that never change


def writes(space: str) -> Axis:
    """An axis along which features are made."""
    return Axis(space, reads=False)


def reads(space: str, *, times: int = 1, power: float = 0.0) -> Axis:
    """An axis over which the network sums."""
    return Axis(space, reads=True, times=times, power=power)


def next_size(size: int) -> int:
    """The first of 2, 3, 4, 6, 8, 12, 16, 24, ... that is a third larger at least: about twice the parameters."""
    rungs = (base << doublings for doublings in itertools.count() for base in (2, 3))
    return next(rung for rung in rungs if 3 * rung >= 4 * size)
