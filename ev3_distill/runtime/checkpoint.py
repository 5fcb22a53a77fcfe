"""Checkpoints: a thin layer over orbax. Atomic, the last few are kept, and each is verified by a digest when it is read.

Orbax is imported at its first use, since a new run needs it only when it saves (see `preload.py`).
"""

import functools
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.distributed import is_first_process, read_on_first
from ev3_distill.types import PyTree

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

MAX_TO_KEEP = 3
SMALL_BYTES = 2**20  # leaves up to this size share one array, because orbax's cost is per array, not per byte
_PACK = "small"  # name of the array that small leaves share

Restored = tuple[int, PyTree, list[str]]  # iteration, state, warnings


def first_process_options() -> "ocp.options.MultiprocessingOptions":
    """Options with which orbax works in process 0 alone and waits for no other."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


class Checkpoints:
    """The checkpoints of a run, named by iteration. If several processes share the run, process 0 stores them."""

    def __init__(self, directory: Path):
        self._directory = directory
        if is_first_process():
            directory.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def _manager(self) -> "ocp.CheckpointManager":
        """Of process 0."""
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs each phase, and each error that it raises
        options = ocp.CheckpointManagerOptions(
            max_to_keep=MAX_TO_KEEP,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=first_process_options(),
        )
        return ocp.CheckpointManager(self._directory.absolute(), options=options)

    def save(self, iteration: int, state: PyTree) -> None:
        """Write a checkpoint, completely or not at all. Raises OSError or ValueError if the disk is full."""
        if not is_first_process() or iteration in self._manager.all_steps():
            return
        import orbax.checkpoint as ocp

        state = jax.device_get(state)
        self._manager.save(
            iteration,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_pack(state)), digest=ocp.args.JsonSave({"sha256": tree_digest(state)})
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, template: PyTree) -> Restored | None:
        """Read the newest checkpoint that can be read.

        Args:
          template: a pytree of the same structure, shapes and dtypes.

        Returns:
          (iteration, state, warnings), with a warning for each newer checkpoint that could not be read and was deleted. None if
          there is no checkpoint.

        Raises:
          InputError: there are checkpoints, but none can be read.
        """
        return _deserialize(read_on_first(lambda: _serialize(self._newest(template))), template)

    def _newest(self, template: PyTree) -> Restored | None:
        """`restore` for the process that stores the checkpoints."""
        if not any(self._directory.iterdir()):
            return None
        warnings: list[str] = []
        for iteration in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._read(iteration, template)
            except Exception as error:  # orbax and tensorstore raise many types for a damaged file
                warnings.append(f"checkpoint {iteration} is damaged, falling back to the one before ({summary(error)})")
                continue
            for damaged in [i for i in self._manager.all_steps() if i > iteration]:
                self._manager.delete(damaged)
            return iteration, state, warnings
        if warnings:
            raise InputError(
                f"a resume needs one readable checkpoint; got {len(warnings)} in {self._manager.directory}, all damaged or "
                "written by another version of ev3-distill: resume with that version, or start a new run in another directory"
            )
        return None

    def _read(self, iteration: int, template: PyTree) -> PyTree:
        """One checkpoint's state, on the host."""
        import orbax.checkpoint as ocp

        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template)
        packed = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _packed_shapes(shapes).items()}
        restored: Any = self._manager.restore(
            iteration, args=ocp.args.Composite(state=ocp.args.StandardRestore(packed), digest=ocp.args.JsonRestore())
        )
        state = _unpack(restored["state"], shapes)
        if tree_digest(state) != restored["digest"]["sha256"]:
            raise ValueError("its content does not match its digest")
        return state

    def close(self) -> None:
        """Release orbax's resources."""
        if "_manager" in vars(self):
            self._manager.close()


def _serialize(restored: Restored | None) -> bytes:
    """Bytes for the other processes."""
    if restored is None:
        return b""
    iteration, state, warnings = restored
    header = json.dumps({"iteration": iteration, "warnings": warnings}).encode()
    return header + b"\n" + b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))


def _deserialize(message: bytes, template: PyTree) -> Restored | None:
    """Undo `_serialize`; the state is on the device, as at a fresh start, so that one program accepts both."""
    if not message:
        return None
    first, _, content = message.partition(b"\n")
    at, leaves = 0, []
    for leaf in jax.tree.leaves(template):
        leaves.append(np.frombuffer(content, leaf.dtype, math.prod(leaf.shape), at).reshape(leaf.shape))
        at += _bytes(leaf)
    state = jax.tree.map(jax.numpy.asarray, jax.tree.unflatten(jax.tree.structure(template), leaves))
    header = json.loads(first)
    return header["iteration"], state, header["warnings"]


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _packed_shapes(tree: PyTree) -> dict[str, Any]:
    """Shapes of what `_pack` returns."""
    leaves = jax.tree.leaves(tree)
    large = {f"{i:05d}": leaf for i, leaf in enumerate(leaves) if _bytes(leaf) > SMALL_BYTES}
    small = sum(_bytes(leaf) for leaf in leaves if _bytes(leaf) <= SMALL_BYTES)
    return large | {_PACK: jax.ShapeDtypeStruct((small,), np.uint8)}


def _pack(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves in order, in few arrays: large leaves by number, and the bytes of all small ones.

    Any pytree becomes plain data, whatever its node types and keys.
    """
    leaves = jax.tree.leaves(tree)
    large = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(leaves) if _bytes(leaf) > SMALL_BYTES}
    small = b"".join(np.asarray(leaf).tobytes() for leaf in leaves if _bytes(leaf) <= SMALL_BYTES)
    return large | {_PACK: np.frombuffer(small, np.uint8)}


def _unpack(packed: dict[str, Any], shapes: PyTree) -> PyTree:
    """Undo `_pack` for a tree of these shapes."""
    small, at, leaves = np.asarray(packed[_PACK]).tobytes(), 0, []
    for i, leaf in enumerate(jax.tree.leaves(shapes)):
        if _bytes(leaf) > SMALL_BYTES:
            leaves.append(np.asarray(packed[f"{i:05d}"]))
            continue
        leaves.append(np.frombuffer(small, leaf.dtype, math.prod(leaf.shape), at).reshape(leaf.shape))
        at += _bytes(leaf)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
