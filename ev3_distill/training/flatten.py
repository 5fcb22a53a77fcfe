"""Flattening: a pytree as one vector per dtype.

Decisions have many small arrays, and a program needs a kernel to store each of them in a row of its own. States are not
flattened: rebuilding each of their arrays takes a kernel, too, which costs more time to compile than is lost when arrays
are passed one by one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ev3_distill.types import PyTree

Flat = tuple[jax.Array, ...]  # one vector per dtype, in order of first appearance


class Flattening:
    """Flattens and rebuilds pytrees of one structure."""

    def __init__(self, template: PyTree):
        """Takes the structure, shapes and dtypes from a tree of arrays or of `jax.ShapeDtypeStruct`s."""
        leaves, self._treedef = jax.tree.flatten(template)
        self._shapes = [leaf.shape for leaf in leaves]
        dtypes = [leaf.dtype for leaf in leaves]
        self._dtypes = list(dict.fromkeys(dtypes))
        self._vector_of = [self._dtypes.index(dtype) for dtype in dtypes]

    def flatten(self, tree: PyTree) -> Flat:
        """Joins the tree's leaves by dtype; may be called under jit."""
        leaves = jax.tree.leaves(tree)
        return tuple(
            jnp.concatenate([leaf.reshape(-1) for leaf, i in zip(leaves, self._vector_of, strict=True) if i == vector])
            for vector in range(len(self._dtypes))
        )

    def unflatten(self, flat: tuple[Any, ...]) -> Any:
        """Undoes `flatten`; on NumPy vectors the leaves are views."""
        at, leaves = [0] * len(self._dtypes), []
        for shape, vector in zip(self._shapes, self._vector_of, strict=True):
            size = math.prod(shape)
            leaves.append(flat[vector][at[vector] : at[vector] + size].reshape(shape))
            at[vector] += size
        return jax.tree.unflatten(self._treedef, leaves)
