"""Narrowing, the inverse of growth: a smaller network starts from a part of a larger one.

    network, variables = narrow(jax.random.key(0), spec, variables, {**spec, "hidden": [4]})

A random subset of the features of every space is retained, with the weights that write and read them. Everything else is
dropped, including whole layers if the smaller network has fewer. The result computes what the larger network would compute if
nothing read the dropped features. That is another function, but training from it is faster than from fresh parameters, and ends
at a higher accuracy for small networks. The choice of features matters much: draw several subsets and compare.

A network narrows to any network that grows into it; see `students/growth/grow.py`. Where a LayerNorm averages over features,
its mean and variance become those of the retained features.

References:
  Frankle and Carbin, The lottery ticket hypothesis, ICLR 2019; arXiv:1803.03635: the initial weights matter.
  Liu et al., Rethinking the value of network pruning, ICLR 2019; arXiv:1810.05270: whether inherited weights help; for large
    networks they find little benefit.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.students.axes import GrowthSpec
from ev3_distill.students.growth.grow import Factory, check_growth
from ev3_distill.students.growth.net2net import SpaceMap, growing_axes, key_path, match_spaces
from ev3_distill.students.network import describe_spec
from ev3_distill.students.registry import build, growth_spec
from ev3_distill.types import Network, Variables


def narrow(
    key: jax.Array,
    spec: Mapping[str, Any],
    variables: Variables,
    target: Mapping[str, Any],
    *,
    factory: Factory | None = None,
) -> tuple[Network, Variables]:
    """A smaller network that starts from a part of a larger one.

    Args:
      key: decides which features are retained.
      spec: of the larger network.
      variables: of the larger network.
      target: spec of the smaller network.
      factory: the user's factory, for a network that was created by one.

    Raises:
      InputError: the smaller network does not grow into the larger one, or the variables do not belong to the spec.
    """
    network, larger = build(target, factory=factory), build(spec, factory=factory)
    if _shapes(variables) != _shapes(jax.eval_shape(larger.init, key)):
        raise InputError(
            f"narrowing needs the arrays of its spec; got others, narrowing into {describe_spec(network.spec)}: pass the "
            "variables that belong to the spec"
        )
    large, small = growth_spec(larger.spec, factory=factory), growth_spec(network.spec, factory=factory)
    spaces = match_spaces(small, large)
    try:
        check_growth(network.spec, larger.spec, small, large, spaces)
    except InputError as error:
        raise InputError(f"a network narrows only to one that grows into it; {error}") from error
    retained = retained_features(np.random.default_rng(np.asarray(jax.random.key_data(key))), large, small, spaces)
    names = {layer.path: name for name, layer in small.layers.items()}
    arrays = {
        (keys[0], key_path(keys[1:])): np.asarray(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }

    def part(keys: tuple[Any, ...], _: Any) -> jax.Array:
        path = key_path(keys[1:])
        owner = next(names[path[:i]] for i in range(len(path) + 1) if path[:i] in names)
        source = (*large.layers[owner].path, *path[len(small.layers[owner].path) :])
        array = arrays[keys[0], source]
        for dimension, axis in growing_axes(large.layers[owner], source, array.shape, large).items():
            size = large.spaces[axis.space].size
            indices = (size * np.arange(axis.times)[:, None] + retained[axis.space]).ravel()
            array = array.take(indices, dimension)
        return jnp.asarray(array)

    start: Variables = jax.tree_util.tree_map_with_path(part, jax.eval_shape(network.init, key))
    return network, start


def _shapes(variables: Variables) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(keys): leaf.shape for keys, leaf in leaves}


def retained_features(
    rng: np.random.Generator, large: GrowthSpec, small: GrowthSpec, spaces: SpaceMap
) -> dict[str, np.ndarray]:
    """Which features of each space of the larger network are retained, in order, int [small size].

    Spaces of equal size that map to the same smaller space, such as those before and after an inserted layer, retain the same
    features.

    Args:
      rng: draws the features.
      large: growth spec of the larger network.
      small: growth spec of the smaller network.
      spaces: larger network's space -> smaller network's, see `net2net.match_spaces`.
    """
    retained: dict[str, np.ndarray] = {}
    drawn: dict[tuple[str, int], np.ndarray] = {}
    for name, space in large.spaces.items():
        if name not in spaces:
            continue
        after = small.spaces[spaces[name]]
        if (spaces[name], space.size) in drawn:
            retained[name] = drawn[spaces[name], space.size]
        elif space.holds is None or after.holds is None:
            retained[name] = np.sort(rng.permutation(space.size)[: after.size])
        else:
            (held, start), (_, small_start) = space.holds, after.holds
            inside = retained[held] + start
            outside = np.setdiff1d(np.arange(space.size), np.arange(large.spaces[held].size) + start)
            outside = np.sort(rng.permutation(outside)[: after.size - inside.size])
            retained[name] = np.concatenate([outside[:small_start], inside, outside[small_start:]])
        drawn[spaces[name], space.size] = retained[name]
    return retained
