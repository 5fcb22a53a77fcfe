"""Function-preserving growth: a network becomes a larger one that computes the same.

    network, variables = grow(jax.random.key(0), spec, variables, "wider")

`moves(spec)` lists what a network can become next, as specs. Any other spec of the family that is smaller nowhere works too.
`growth_map` returns the map itself, for several students of the same network.

Wider: features are copied, and the weights that read them are divided among the copies in unequal shares; in addition, one copy
gets a small amount that the others lose. So the gradients of copies differ in direction. If they differed only in length, Adam,
which normalizes them, would keep the copies identical.

Units of a ReLU without normalization are drawn instead of copied, and read with zeros at first: a copy of a unit that is zero
for all inputs would never learn, and neither would the part of the larger network behind it. After another ReLU, their weights
get the sign for which they sum to at least 0, because otherwise one unit in ten would be dead from the start. The channels
inside ResNet blocks are drawn too: an optimizer that orthogonalizes updates keeps copies identical.

Deeper: a new layer is the identity on the output of a ReLU, or a new residual branch ends in zeros. The zeros get a gradient at
once, and the layers before them as soon as the zeros move.

Where a LayerNorm averages over features, they grow by integer factors only.

A user's student, `MODULE:FACTORY`, can grow if the factory has a function as attribute `grow`. It takes the factory's arguments
without `rngs` and returns a `GrowthSpec`. Options other than the shape and the number of classes come from the spec that a move
proposes. For a factory `make(input_shape, num_classes, rngs, width=8)` of two dense layers:

    from ev3_distill.students.growth import GrowthSpec, Layer, Space, next_size, reads, writes

    def grow(input_shape, num_classes, width=8):
        layers = {
            "first": Layer(("first",), (None, writes("units"))),
            "last": Layer(("last",), (reads("units"), None)),
        }
        return GrowthSpec({"units": Space(width)}, layers, {"wider": {"width": next_size(width)}})

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
from ev3_distill.students.axes import Axis, GrowthSpec, Layer, Path
from ev3_distill.students.growth.net2net import (
    ArrayGrowth,
    SpaceMap,
    array_growths,
    copy_spaces,
    key_path,
    match_spaces,
)
from ev3_distill.students.network import describe_spec
from ev3_distill.students.registry import build, growth_spec
from ev3_distill.students.standardization import STANDARDIZE
from ev3_distill.types import Network, PyTree, Variables

Factory = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class GrowthMap:
    """The map from one network's arrays to a larger one's. It runs on the host, in NumPy, and compiles nothing."""

    network: Network  # the larger one
    params: Mapping[Path, ArrayGrowth]
    stats: Mapping[Path, ArrayGrowth]

    def variables(self, variables: Variables) -> Variables:
        """Grows variables so that the function is kept.

        Raises:
          InputError: the variables are not those of the network that grows.
        """
        return Variables(self._map(self.params, variables.params), self._map(self.stats, variables.stats))

    def _map(self, arrays: Mapping[Path, ArrayGrowth], tree: PyTree) -> PyTree:
        tree = jax.device_get(tree)
        grown: dict[str | int, Any] = {}
        for path, growth in arrays.items():
            parent = grown
            for name in path[:-1]:
                parent = parent.setdefault(name, {})
            parent[path[-1]] = jnp.asarray(self._array(growth, tree) if growth.new is None else growth.new)
        return grown

    def _array(self, growth: ArrayGrowth, tree: PyTree) -> np.ndarray:
        old = self._at(tree, growth.source)
        if old.shape != growth.shape:
            raise InputError(
                f"growth needs the arrays of the network that grows; got {_dotted(growth.source)} of shape {list(old.shape)} "
                f"for {list(growth.shape)}, growing into {describe_spec(self.network.spec)}: pass the variables that belong to "
                "the spec"
            )
        return growth.grown(old)

    def _at(self, tree: PyTree, path: Path) -> Any:
        for i, name in enumerate(path):
            if not isinstance(tree, Mapping) or name not in tree:
                raise InputError(
                    f"growth needs the arrays of the network that grows; got none at {_dotted(path[: i + 1])}, growing into "
                    f"{describe_spec(self.network.spec)}: pass the variables that belong to the spec"
                )
            tree = tree[name]
        return tree


def grow(
    key: jax.Array,
    spec: Mapping[str, Any],
    variables: Variables,
    move: str | Mapping[str, Any],
    *,
    factory: Factory | None = None,
) -> tuple[Network, Variables]:
    """Grows a network so that it computes the same, in evaluation and in training.

    Args:
      key: decides which features are copied where not all are, their shares, and the parameters of new layers.
      spec: of the network.
      variables: of the network.
      move: a name in `moves(spec)`, or the spec of the larger network.
      factory: the user's factory, for a network that was created by one.

    Raises:
      InputError: no such move, or one that cannot keep the function.
    """
    larger = growth_map(key, spec, move, factory=factory)
    return larger.network, larger.variables(variables)


def moves(spec: Mapping[str, Any], *, factory: Factory | None = None) -> dict[str, dict[str, Any]]:
    """What a network can become next: specs, by the name of the move.

    Raises:
      InputError: unknown family or option, or a factory without `grow`.
    """
    proposed = growth_spec(spec, factory=factory).moves
    return {name: _changed(spec, options) for name, options in proposed.items()}


def growth_map(
    key: jax.Array, spec: Mapping[str, Any], move: str | Mapping[str, Any], *, factory: Factory | None = None
) -> GrowthMap:
    """The map that `grow` applies to variables. Arguments and errors are those of `grow`; the same key gives the same map."""
    network = build(_target(spec, move, factory), factory=factory)
    old, new = growth_spec(spec, factory=factory), growth_spec(network.spec, factory=factory)
    spaces = match_spaces(old, new)
    check_growth(spec, network.spec, old, new, spaces)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    copies = copy_spaces(rng, old, new, spaces)
    drawn = [layer.path for name, layer in new.layers.items() if name not in old.layers or _writes_drawn(layer, new)]
    initial = _initial(key, network, drawn)
    params = array_growths(rng, old, new, copies, initial.params, trained=True)
    return GrowthMap(network, params, array_growths(rng, old, new, copies, initial.stats, trained=False))


def _writes_drawn(layer: Layer, new: GrowthSpec) -> bool:
    return any(axis and not axis.reads and new.spaces[axis.space].drawn for axis in layer.axes)


def _initial(key: jax.Array, network: Network, paths: Sequence[Path]) -> Variables:
    """The initial values of the layers at these paths; shapes for the rest, which are not computed."""
    shapes = jax.eval_shape(network.init, key)
    keys, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    needed = [i for i, (names, _) in enumerate(keys) if any(key_path(names[1:])[: len(path)] == path for path in paths)]

    def draw(key: jax.Array) -> list[jax.Array]:
        leaves = jax.tree.leaves(network.init(key))
        return [leaves[i] for i in needed]

    # A program that runs once: optimization would take 10 times as long to compile (6 kernels of a ResNet: 6.0 s, not 0.6 s).
    drawn = jax.jit(draw, compiler_options={"xla_backend_optimization_level": 0})(key) if needed else []
    leaves = {i: np.asarray(leaf) for i, leaf in zip(needed, drawn, strict=True)}
    merged: Variables = jax.tree.unflatten(treedef, [leaves.get(i, shape) for i, (_, shape) in enumerate(keys)])
    return merged


def _target(spec: Mapping[str, Any], move: str | Mapping[str, Any], factory: Factory | None) -> Mapping[str, Any]:
    if not isinstance(move, str):
        return move
    known = moves(spec, factory=factory)
    if move not in known:
        raise InputError(
            f"the moves of {describe_spec(spec)} are {', '.join(known) or 'none'}; got '{move}': "
            "name one of these, or pass the spec of the larger network"
        )
    return known[move]


def _changed(spec: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**spec, **options}.items() if value is not None}


def check_growth(
    spec: Mapping[str, Any], target: Mapping[str, Any], old: GrowthSpec, new: GrowthSpec, spaces: SpaceMap
) -> None:
    """Raises InputError if growth from one spec to another cannot keep the function.

    Args:
      spec: of the smaller network.
      target: of the larger network.
      old: how the smaller network can grow.
      new: how the larger network can grow.
      spaces: see `match_spaces`.
    """

    def refusal(rule: str, got: str, way_out: str) -> InputError:
        return InputError(f"{rule}; got {got}, from {describe_spec(spec)} to {describe_spec(target)}: {way_out}")

    for name in ("family", "factory", "input_shape", "num_classes", *new.fixed):
        one, other = (_as_list(each.get(name)) for each in (spec, target))
        if one != other:
            raise refusal(f"growth keeps {name}", f"{other} for {one}", "train such a network from scratch")
    if spec.get(STANDARDIZE) != target.get(STANDARDIZE):
        raise refusal(
            "growth keeps how inputs are standardized", "other statistics", f"copy '{STANDARDIZE}' of the spec"
        )
    if removed := [name for name in old.layers if name not in new.layers]:
        raise refusal("growth removes no layer", f"none of {', '.join(removed)}", "name at least as many layers")
    for name, layer in new.layers.items():
        if name not in old.layers and layer.start is None:
            raise refusal(
                "growth inserts layers that start as the identity", f"{name}, which cannot", "choose another move"
            )
        if name in old.layers and _wiring(layer.axes, spaces) != _wiring(old.layers[name].axes, spaces):
            raise refusal(
                "growth keeps what every layer reads and writes",
                f"another wiring of {name}",
                "choose another size, which keeps the shortcuts",
            )
    for name, space in new.spaces.items():
        if name not in spaces:
            continue
        before = old.spaces[spaces[name]].size
        if space.size < before:
            raise refusal("growth narrows nothing", f"{space.size} for {before} of {name}", f"use {before} or more")
        if space.even and space.size % before:
            raise refusal(
                "LayerNorm averages over all of its features, so they grow by an integer factor",
                f"{space.size} for {before} of {name}",
                f"use {before * -(-space.size // before)}",
            )


def _wiring(axes: Sequence[Axis | None], spaces: SpaceMap) -> list[tuple[str, bool, int, float] | None]:
    return [axis and (spaces.get(axis.space, axis.space), *axis[1:]) for axis in axes]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
