"""Packing: a pytree as one vector per dtype. A jitted call pays some 3 us of dispatch per array, in and out; a state has 50."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ev3_distill.types import PyTree

Packed = tuple[jax.Array, ...]  # one vector per dtype, in order of first appearance


class Packing:
    """Packs and unpacks pytrees of one structure."""

    def __init__(self, template: PyTree):
        """Takes the structure, shapes and dtypes of arrays or of `jax.ShapeDtypeStruct`s."""
        leaves, self._treedef = jax.tree.flatten(template)
        self._shapes = [leaf.shape for leaf in leaves]
        dtypes = [leaf.dtype for leaf in leaves]
        self._kinds = list(dict.fromkeys(dtypes))
        self._kind_of = [self._kinds.index(dtype) for dtype in dtypes]

    def pack(self, tree: PyTree) -> Packed:
        """The tree's leaves, flattened and joined; may be called under jit."""
        leaves = jax.tree.leaves(tree)
        return tuple(
            jnp.concatenate([leaf.reshape(-1) for leaf, of in zip(leaves, self._kind_of, strict=True) if of == kind])
            for kind in range(len(self._kinds))
        )

    def unpack(self, packed: tuple[Any, ...]) -> Any:
        """Undoes `pack`; on NumPy vectors the leaves are views."""
        at, leaves = [0] * len(self._kinds), []
        for shape, kind in zip(self._shapes, self._kind_of, strict=True):
            size = math.prod(shape)
            leaves.append(packed[kind][at[kind] : at[kind] + size].reshape(shape))
            at[kind] += size
        return jax.tree.unflatten(self._treedef, leaves)

    def unpack_on_host(self, packed: Packed) -> Any:
        """NumPy leaves; waits for the device."""
        return self.unpack(jax.device_get(packed))
