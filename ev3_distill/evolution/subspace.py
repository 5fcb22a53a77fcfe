"""Parts of a network's parameters to move, while the others stay: fewer dimensions make a better estimate of a gradient."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from ev3_distill.errors import InputError
from ev3_distill.types import PyTree


class Subspace(NamedTuple):
    """Parameters, parted."""

    moving: PyTree
    join: Callable[[PyTree], PyTree]  # what moves, put back among the rest


def whole(params: PyTree) -> Subspace:
    """All of them."""
    return Subspace(params, lambda moving: moving)


def named(*names: str) -> Callable[[PyTree], Subspace]:
    """Those of which any of these names is true.

    Args:
      names: "norms", scales and biases of normalisations; "biases", of any layer; "head", the last layer; or a regular
        expression on a parameter's path, such as \\['convs'\\]\\[0\\].

    Returns:
      Parameters -> the parted ones; what moves is a dictionary by path.

    Raises:
      InputError: by what is returned, where no parameter has such a name.
    """

    def part(params: PyTree) -> Subspace:
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [jax.tree_util.keystr(path) for path, _ in flat]
        last = paths[-1].rpartition("[")[0]  # the layer of a network none of whose layers is called a head
        head = [path for path in paths if "head" in path] or [path for path in paths if path.startswith(last)]
        moves = [any(path in head if name == "head" else _is(name, path) for name in names) for path in paths]
        if not any(moves):
            raise InputError(
                f"no parameter is one of {', '.join(names)}; the network has {', '.join(paths)}: name others"
            )

        def join(moving: PyTree) -> PyTree:
            leaves = [moving.get(path, leaf) for path, (_, leaf) in zip(paths, flat, strict=True)]
            return jax.tree.unflatten(treedef, leaves)

        return Subspace({path: leaf for path, (_, leaf), moved in zip(paths, flat, moves, strict=True) if moved}, join)

    return part


def _is(name: str, path: str) -> bool:
    return re.search({"norms": r"norm", "biases": r"\['bias'\]"}.get(name, name), path) is not None
