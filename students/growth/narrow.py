"""Narrowing, the way back of growth: a smaller network begins with a part of a larger one.

    network, variables = narrow(jax.random.key(0), spec, variables, {**spec, "hidden": [4]})

Of every space of features some are kept, drawn at random, with the weights by which they are made and read; all else is
dropped, whole layers where the smaller network has fewer. So it computes what the larger one would, were the features that are
gone read by nobody: not the same, but from there it learns faster than from fresh parameters, and further where there are few.
Which features are kept makes much of the difference: draw several, and compare.

A network narrows to any that grows into it, see `students.grow`. Where a LayerNorm takes mean and variance over features they
become those of the features kept.

References:
  Frankle and Carbin, The lottery ticket hypothesis, ICLR 2019; arXiv:1803.03635: which weights begin makes the difference.
  Liu et al., Rethinking the value of network pruning, ICLR 2019; arXiv:1810.05270: whether weights that are kept are of use;
    for large networks they find little.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.students import build, layout_of, text_of
from ev3_distill.students.growth.axes import Layout
from ev3_distill.students.growth.grow import Factory, check
from ev3_distill.students.growth.net2net import Standing, axes_of, path_of, standing_of
from ev3_distill.types import Network, Variables


def narrow(
    key: jax.Array,
    spec: Mapping[str, Any],
    variables: Variables,
    target: Mapping[str, Any],
    *,
    factory: Factory | None = None,
) -> tuple[Network, Variables]:
    """A smaller network that begins with a part of a larger one.

    Args:
      key: decides which features are kept; the same key keeps the same.
      spec: the larger network's.
      variables: the larger network's.
      target: the smaller network's spec.
      factory: of a network of the user's own.

    Raises:
      InputError: the smaller network does not grow into the larger, or the variables are not of the spec.
    """
    network, whole = build(target, factory=factory), build(spec, factory=factory)
    if _shapes(variables) != _shapes(jax.eval_shape(whole.init, key)):
        raise InputError(
            f"what narrows has the arrays of its spec; got others, narrowing into {text_of(network.spec)}: give the "
            "variables that belong to the spec"
        )
    large, small = layout_of(whole.spec, factory=factory), layout_of(network.spec, factory=factory)
    standing = standing_of(small, large)
    try:
        check(network.spec, whole.spec, small, large, standing)
    except InputError as error:
        raise InputError(f"a network narrows to one that grows into it; {error}") from error
    kept = kept_of(np.random.default_rng(np.asarray(jax.random.key_data(key))), large, small, standing)
    names = {layer.path: name for name, layer in small.layers.items()}
    arrays = {
        (keys[0], path_of(keys[1:])): np.asarray(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }

    def part(keys: tuple[Any, ...], _: Any) -> jax.Array:
        path = path_of(keys[1:])
        owner = next(names[path[:i]] for i in range(len(path) + 1) if path[:i] in names)
        source = (*large.layers[owner].path, *path[len(small.layers[owner].path) :])
        array = arrays[keys[0], source]
        for dimension, axis in axes_of(large.layers[owner], source, array.shape, large).items():
            size = large.spaces[axis.space].size
            rows = (size * np.arange(axis.times)[:, None] + kept[axis.space]).ravel()
            array = array.take(rows, dimension)
        return jnp.asarray(array)

    begun: Variables = jax.tree_util.tree_map_with_path(part, jax.eval_shape(network.init, key))
    return network, begun


def _shapes(variables: Variables) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(keys): leaf.shape for keys, leaf in leaves}


def kept_of(rng: np.random.Generator, large: Layout, small: Layout, standing: Standing) -> dict[str, np.ndarray]:
    """Which features of the larger network's spaces are kept, in order, int [small size].

    Spaces that stand for the same features, an inserted layer's and those before it, keep the same where they are as large.

    Args:
      rng: draws them.
      large: the larger network's layout.
      small: the smaller's.
      standing: by space of the larger, the one of the smaller that it stands for, see `spreading.standing_of`.
    """
    found: dict[str, np.ndarray] = {}
    drawn: dict[tuple[str, int], np.ndarray] = {}
    for name, space in large.spaces.items():
        if name not in standing:
            continue
        after = small.spaces[standing[name]]
        if (standing[name], space.size) in drawn:
            found[name] = drawn[standing[name], space.size]
        elif space.holds is None or after.holds is None:
            found[name] = np.sort(rng.permutation(space.size)[: after.size])
        else:
            (held, at), (_, small_at) = space.holds, after.holds
            within = found[held] + at
            around = np.setdiff1d(np.arange(space.size), np.arange(large.spaces[held].size) + at)
            around = np.sort(rng.permutation(around)[: after.size - within.size])
            found[name] = np.concatenate([around[:small_at], within, around[small_at:]])
        drawn[standing[name], space.size] = found[name]
    return found
