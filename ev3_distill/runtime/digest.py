"""SHA-256 of a pytree: the one definition that checkpoints, the sealed split and cached teacher outputs share."""

import hashlib
from collections.abc import Iterator

import jax
import numpy as np

from ev3_distill.types import PyTree


def leaf_bytes(tree: PyTree) -> Iterator[tuple[str, bytes]]:
    """Yields for each leaf a header of its path, type and shape, and its bytes in C order."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        yield f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}", array.tobytes()


def tree_digest(tree: PyTree) -> str:
    """The SHA-256 over paths, types, shapes and bytes of all leaves, in hexadecimal."""
    sha = hashlib.sha256()
    for header, content in leaf_bytes(tree):
        sha.update(header.encode())
        sha.update(content)
    return sha.hexdigest()
