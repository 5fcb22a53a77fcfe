"""Growth that keeps the function: a network and all that is shaped like its parameters become those of a larger one.

    network, variables = grow(jax.random.key(0), spec, variables, "wider")

`moves(spec)` says what a network may become next, as specs; any other spec of the family that is nowhere smaller will do, too.
`growth` gives the map itself, a `Growth`, for averages, iterates and the memory of optimizers.

Wider: features are copied, and what reads them is divided among the copies, every weight in its own uneven shares and with a
little more for one copy that the others have less. So their gradients differ in direction: gradients that differ in length
alone would be the same to Adam, which normalises, and the copies would stay alike.

Units of a ReLU that nothing normalises are not copied but drawn, and read with zeros at first: a unit that the ReLU has shut
for all inputs would be copied as one that learns nothing either, and a part of the larger network with it. Behind another ReLU
their weights have the sign with which they sum to no less than 0, for there one in ten would be shut from the start. So are the
channels inside a ResNet's blocks: an optimizer that makes updates orthogonal keeps copies alike.

Deeper: a new layer is the identity of what a ReLU made, or a new residual branch ends in zeros; zeros get a gradient at once,
and what is before them as soon as they move.

Where a LayerNorm takes mean and variance over features, these grow by whole factors alone.

A student of one's own, `MODULE:FACTORY`, grows where the factory has a function `grow` as attribute: it takes the factory's
arguments without `rngs`, and returns a `students.layout.Layout`, as the pages of the zoo do. Options beyond shape and classes
come from the spec that a move proposes. For a factory `make(input_shape, num_classes, rngs, width=8)` of two dense layers:

    def grow(input_shape, num_classes, width=8):
        layers = {
            "first": Layer(("first",), (None, writes("units"))),
            "last": Layer(("last",), (reads("units"), None)),
        }
        return Layout({"units": Space(width)}, layers, {"wider": {"width": next_size(width)}})

    make.grow = grow

References:
  Chen et al., Net2Net: accelerating learning via knowledge transfer, ICLR 2016; arXiv:1511.05641: wider and deeper.
  Goyal et al., Accurate, large minibatch SGD, 2017; arXiv:1706.02677, section 5.1: a residual branch whose BatchNorm starts
    at zero.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.students import build, layout_of
from ev3_distill.students.growth.axes import Axis, Layer, Layout, Path
from ev3_distill.students.growth.net2net import Leaf, copies_of, leaves_of, path_of, standing_of
from ev3_distill.types import Network, PyTree, Variables

Factory = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Growth:
    """The map from one network's arrays to a larger one's; on the host, in NumPy: it compiles nothing.

    Trees have the structure of parameters; any empty node in the place of an array (optax masks with them) is kept, and put in
    the place of new arrays that are like it.
    """

    network: Network  # the larger
    params: Mapping[Path, Leaf]
    stats: Mapping[Path, Leaf]

    def variables(self, variables: Variables) -> Variables:
        """What computes the same: of iterates, averages of them, and what else is a value of the network's arrays.

        Raises:
          InputError: the variables are not of the network that grows.
        """
        stats = self._mapped(self.stats, variables.stats, Leaf.of_parameter)
        return Variables(self.like_params(variables.params), stats)

    def like_params(self, tree: PyTree) -> PyTree:
        """As parameters grow: copied where features are made, divided where they are read, begun where a layer is new."""
        return self._mapped(self.params, tree, Leaf.of_parameter)

    def like_gradient(self, tree: PyTree) -> PyTree:
        """As their gradients do, for first moments and momenta: divided where features are made, copied where they are read.

        <like_gradient(g), like_params(p + d) - like_params(p)> = <g, d>: a direction promises what it did. Of the gradients of
        copies it is the mean. New arrays have had no gradient: zero.
        """
        return self._mapped(self.params, tree, Leaf.of_gradient)

    def like_second_moment(self, tree: PyTree) -> PyTree:
        """For means of squared gradients: a step m / sqrt(v) of moments that grew is the step of before, grown as parameters.

        So nothing jumps; as the moments forget, new gradients decide. A new array takes the mean of the layer before that it is
        like, for a moment of zero would make its first steps several times too long.
        """
        return self._mapped(self.params, tree, Leaf.of_second_moment)

    def _mapped(
        self, leaves: Mapping[Path, Leaf], tree: PyTree, how: Callable[[Leaf, np.ndarray], np.ndarray]
    ) -> PyTree:
        tree = jax.device_get(tree)
        grown: dict[str | int, Any] = {}
        for path, leaf in leaves.items():
            old, within = self._at(tree, leaf.source), grown
            for name in path[:-1]:
                within = within.setdefault(name, {})
            if isinstance(old, np.ndarray):
                self._check(leaf, old)
                old = jnp.asarray(how(leaf, old))
            within[path[-1]] = old
        return grown

    def _at(self, tree: PyTree, path: Path) -> Any:
        for i, name in enumerate(path):
            if not isinstance(tree, Mapping) or name not in tree:
                raise InputError(
                    f"what grows has the arrays of the network that grows; got none at {_dotted(path[: i + 1])}, growing into "
                    f"{_told(self.network.spec)}: give the variables that belong to the spec"
                )
            tree = tree[name]
        return tree

    def _check(self, leaf: Leaf, old: np.ndarray) -> None:
        if leaf.new is None and old.shape != leaf.shape:
            raise InputError(
                f"what grows has the arrays of the network that grows; got {_dotted(leaf.source)} of shape {list(old.shape)} "
                f"for {list(leaf.shape)}, growing into {_told(self.network.spec)}: give the variables that belong to the spec"
            )


def grow(
    key: jax.Array,
    spec: Mapping[str, Any],
    variables: Variables,
    move: str | Mapping[str, Any],
    *,
    factory: Factory | None = None,
) -> tuple[Network, Variables]:
    """A larger network that computes the same, in evaluation and in training.

    Args:
      key: decides which features are copied where not all are, the shares, and what new layers draw.
      spec: the network's.
      variables: the network's.
      move: a name of `moves(spec)`, or the spec of what it shall become.
      factory: of a network of the user's own.

    Raises:
      InputError: no such move, or one that cannot keep the function.
    """
    grown = growth(key, spec, move, factory=factory)
    return grown.network, grown.variables(variables)


def moves(spec: Mapping[str, Any], *, factory: Factory | None = None) -> dict[str, dict[str, Any]]:
    """What a network of this spec may become next: specs by the name of the move, plain data.

    Raises:
      InputError: unknown family or option, or a factory without `grow`.
    """
    proposed = layout_of(spec, factory=factory).moves
    return {name: _changed(spec, options) for name, options in proposed.items()}


def growth(
    key: jax.Array, spec: Mapping[str, Any], move: str | Mapping[str, Any], *, factory: Factory | None = None
) -> Growth:
    """The map that `grow` applies to variables; arguments and errors are its own. A key is a key: the same map again."""
    network = build(_target(spec, move, factory), factory=factory)
    old, new = layout_of(spec, factory=factory), layout_of(network.spec, factory=factory)
    standing = standing_of(old, new)
    check(spec, network.spec, old, new, standing)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    copies = copies_of(rng, old, new, standing)
    drawn = [layer.path for name, layer in new.layers.items() if name not in old.layers or _writes_drawn(layer, new)]
    fresh = _fresh(key, network, drawn)
    params = leaves_of(rng, old, new, copies, fresh.params, trained=True)
    return Growth(network, params, leaves_of(rng, old, new, copies, fresh.stats, trained=False))


def _writes_drawn(layer: Layer, new: Layout) -> bool:
    return any(axis and not axis.reads and new.spaces[axis.space].drawn for axis in layer.axes)


def _fresh(key: jax.Array, network: Network, paths: Sequence[Path]) -> Variables:
    """What `network.init` draws for layers of these paths; shapes for the rest, on which no time is spent."""
    shapes = jax.eval_shape(network.init, key)
    keys, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    ours = [i for i, (names, _) in enumerate(keys) if any(path_of(names[1:])[: len(path)] == path for path in paths)]

    def draw(key: jax.Array) -> list[jax.Array]:
        leaves = jax.tree.leaves(network.init(key))
        return [leaves[i] for i in ours]

    # a program that runs once: optimised, it takes 10 times as long to compile (6 kernels of a ResNet: 6.0 s, not 0.6)
    drawn = jax.jit(draw, compiler_options={"xla_backend_optimization_level": 0})(key) if ours else []
    leaves = {i: np.asarray(leaf) for i, leaf in zip(ours, drawn, strict=True)}
    merged: Variables = jax.tree.unflatten(treedef, [leaves.get(i, shape) for i, (_, shape) in enumerate(keys)])
    return merged


def _target(spec: Mapping[str, Any], move: str | Mapping[str, Any], factory: Factory | None) -> Mapping[str, Any]:
    if not isinstance(move, str):
        return move
    known = moves(spec, factory=factory)
    if move not in known:
        raise InputError(
            f"the moves of {_told(spec)} are {', '.join(known) or 'none'}; got '{move}': "
            "name one of these, or give the spec of what it shall become"
        )
    return known[move]


def _changed(spec: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**spec, **options}.items() if value is not None}


def check(
    spec: Mapping[str, Any], target: Mapping[str, Any], old: Layout, new: Layout, standing: Mapping[str, str]
) -> None:
    """Raises InputError where the growth from one spec to another, which have these layouts, cannot keep the function."""

    def refuse(rule: str, got: str, way_out: str) -> InputError:
        return InputError(f"{rule}; got {got}, from {_told(spec)} to {_told(target)}: {way_out}")

    for name in ("family", "factory", "input_shape", "num_classes", *new.fixed):
        one, other = (_plain(given.get(name)) for given in (spec, target))
        if one != other:
            raise refuse(f"growth keeps {name}", f"{other} for {one}", "train such a network anew")
    if lost := [name for name in old.layers if name not in new.layers]:
        raise refuse("growth drops no layer", f"none of {', '.join(lost)}", "name as many layers at least")
    for name, layer in new.layers.items():
        if name not in old.layers and None in (layer.start, layer.like):
            raise refuse(
                "growth inserts layers that start as the identity", f"{name}, which cannot", "take another move"
            )
        if name in old.layers and _wiring(layer.axes, standing) != _wiring(old.layers[name].axes, standing):
            raise refuse(
                "growth keeps what every layer reads and writes",
                f"another wiring of {name}",
                "take another size, at which shortcuts are where they are",
            )
    for name, space in new.spaces.items():
        if name not in standing:
            continue
        before = old.spaces[standing[name]].size
        if space.size < before:
            raise refuse("growth narrows nothing", f"{space.size} for {before} of {name}", f"take {before} or more")
        if space.even and space.size % before:
            raise refuse(
                "LayerNorm takes a mean over all of its features, so they grow by a whole factor",
                f"{space.size} for {before} of {name}",
                f"take {before * -(-space.size // before)}",
            )


def _wiring(axes: Sequence[Axis | None], standing: Mapping[str, str]) -> list[tuple[str, bool, int, float] | None]:
    return [axis and (standing.get(axis.space, axis.space), *axis[1:]) for axis in axes]


def _told(spec: Mapping[str, Any]) -> str:
    """A network in a word: its name and its options."""
    hidden = ("family", "factory", "input_shape", "num_classes")
    options = ", ".join(f"{name}={_plain(value)}" for name, value in spec.items() if name not in hidden)
    name = spec.get("factory") or spec.get("family")
    return f"{name} ({options})" if options else f"{name}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
