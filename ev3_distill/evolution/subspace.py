"""Selections of a network's parameters to perturb while the others stay fixed.

Fewer dimensions make the gradient estimate less noisy.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from ev3_distill.errors import InputError
from ev3_distill.types import PyTree


class Subspace(NamedTuple):
    """Selected parameters, and how to put them back."""

    selected: PyTree
    join: Callable[[PyTree], PyTree]  # selected -> all parameters, with the fixed ones unchanged


def all_parameters(params: PyTree) -> Subspace:
    """Select every parameter."""
    return Subspace(params, lambda selected: selected)


def parameters_named(*names: str) -> Callable[[PyTree], Subspace]:
    """Select the parameters that match any of these names.

    Args:
      names: "norms" for scales and biases of normalization layers; "biases" for those of any layer; "head" for the last layer;
        or a regular expression on a parameter's path, such as \\['convs'\\]\\[0\\].

    Returns:
      A function from parameters to their `Subspace`, whose selected parameters are a dictionary by path.

    Raises:
      InputError: by the returned function, if no parameter matches.
    """

    def select(params: PyTree) -> Subspace:
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [jax.tree_util.keystr(path) for path, _ in flat]
        last = paths[-1].rpartition("[")[0]  # the last layer, in case no layer is named "head"
        head = [path for path in paths if "head" in path] or [path for path in paths if path.startswith(last)]
        matches = [any(path in head if name == "head" else _matches(name, path) for name in names) for path in paths]
        if not any(matches):
            raise InputError(
                f"{', '.join(names)} must match at least one parameter; the network has {', '.join(paths)}: "
                "use other names"
            )

        def join(selected: PyTree) -> PyTree:
            leaves = [selected.get(path, leaf) for path, (_, leaf) in zip(paths, flat, strict=True)]
            return jax.tree.unflatten(treedef, leaves)

        return Subspace(
            {path: leaf for path, (_, leaf), match in zip(paths, flat, matches, strict=True) if match}, join
        )

    return select


def _matches(name: str, path: str) -> bool:
    return re.search({"norms": r"norm", "biases": r"\['bias'\]"}.get(name, name), path) is not None
