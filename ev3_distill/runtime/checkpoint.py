"""Checkpoints: thin over orbax. Atomic, the last few kept, each verified by a digest of its content when read."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.distributed import first, from_first
from ev3_distill.types import PyTree

KEPT = 3
SMALL = 2**20  # bytes; leaves up to this size share one array, because orbax pays by the array and not by the byte
_PACK = "small"


def alone() -> ocp.options.MultiprocessingOptions:
    """How orbax works where several processes share a run: in process 0, which waits for no other."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


class Checkpoints:
    """The checkpoints of a run, named by iteration. Where several processes share it, process 0 has them."""

    def __init__(self, directory: Path):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs each phase, and each error that it raises
        if not first():
            return
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=alone(),
        )
        directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, iteration: int, state: PyTree) -> None:
        """Writes a checkpoint; it exists wholly or not at all. Raises OSError or ValueError where the disk is full."""
        if not first() or iteration in self._manager.all_steps():
            return
        state = jax.device_get(state)
        self._manager.save(
            iteration,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_pack(state)), digest=ocp.args.JsonSave({"sha256": tree_digest(state)})
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, template: PyTree) -> tuple[int, PyTree, list[str]] | None:
        """The newest readable checkpoint.

        Args:
          template: a pytree of the same structure, shapes and types.

        Returns:
          (iteration, state, warnings), a warning for each newer one that could not be read and was removed; None where
          there is no checkpoint at all.

        Raises:
          InputError: checkpoints are there, but none is readable.
        """
        told = from_first(lambda: _sent(self._newest(template)))
        return _received(told, template)

    def _newest(self, template: PyTree) -> tuple[int, PyTree, list[str]] | None:
        """The same, for the process that has them."""
        warnings: list[str] = []
        for iteration in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._read(iteration, template)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                warnings.append(f"checkpoint {iteration} is damaged, falling back to the one before ({summary(error)})")
                continue
            for damaged in [i for i in self._manager.all_steps() if i > iteration]:
                self._manager.delete(damaged)
            return iteration, state, warnings
        if warnings:
            raise InputError(
                f"a resume needs one readable checkpoint; got {len(warnings)} in {self._manager.directory}, all damaged "
                "or of another version: start the run again elsewhere"
            )
        return None

    def _read(self, iteration: int, template: PyTree) -> PyTree:
        """On the host."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template)
        packed = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _layout(shapes).items()}
        restored: Any = self._manager.restore(
            iteration, args=ocp.args.Composite(state=ocp.args.StandardRestore(packed), digest=ocp.args.JsonRestore())
        )
        state = _unpack(restored["state"], shapes)
        if tree_digest(state) != restored["digest"]["sha256"]:
            raise ValueError("its content does not match its digest")
        return state

    def close(self) -> None:
        """Releases orbax's resources."""
        if first():
            self._manager.close()


def _sent(found: tuple[int, PyTree, list[str]] | None) -> bytes:
    """What was found, for other processes."""
    if found is None:
        return b""
    iteration, state, warnings = found
    head = json.dumps({"iteration": iteration, "warnings": warnings}).encode()
    return head + b"\n" + b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))


def _received(told: bytes, template: PyTree) -> tuple[int, PyTree, list[str]] | None:
    """What was sent, on the device, as a fresh start's state is, so that the same program takes both."""
    if not told:
        return None
    head, _, content = told.partition(b"\n")
    at, leaves = 0, []
    for leaf in jax.tree.leaves(template):
        leaves.append(np.frombuffer(content, leaf.dtype, math.prod(leaf.shape), at).reshape(leaf.shape))
        at += _bytes(leaf)
    state = jax.tree.map(jax.numpy.asarray, jax.tree.unflatten(jax.tree.structure(template), leaves))
    found = json.loads(head)
    return found["iteration"], state, found["warnings"]


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _layout(tree: PyTree) -> dict[str, Any]:
    """What `_pack` makes of a tree: large leaves by number, and the bytes of all small ones."""
    leaves = jax.tree.leaves(tree)
    large = {f"{i:05d}": leaf for i, leaf in enumerate(leaves) if _bytes(leaf) > SMALL}
    small = sum(_bytes(leaf) for leaf in leaves if _bytes(leaf) <= SMALL)
    return large | {_PACK: jax.ShapeDtypeStruct((small,), np.uint8)}


def _pack(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves in order, as few arrays: any pytree, whatever its node types and keys, becomes plain data."""
    leaves = jax.tree.leaves(tree)
    large = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(leaves) if _bytes(leaf) > SMALL}
    small = b"".join(np.asarray(leaf).tobytes() for leaf in leaves if _bytes(leaf) <= SMALL)
    return large | {_PACK: np.frombuffer(small, np.uint8)}


def _unpack(packed: dict[str, Any], shapes: PyTree) -> PyTree:
    """Undoes `_pack` for a tree of those shapes."""
    small, at, leaves = np.asarray(packed[_PACK]).tobytes(), 0, []
    for i, leaf in enumerate(jax.tree.leaves(shapes)):
        if _bytes(leaf) > SMALL:
            leaves.append(np.asarray(packed[f"{i:05d}"]))
            continue
        leaves.append(np.frombuffer(small, leaf.dtype, math.prod(leaf.shape), at).reshape(leaf.shape))
        at += _bytes(leaf)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
