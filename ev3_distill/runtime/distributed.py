"""Work on many devices and in many processes: meshes, sums in a fixed order, and the start of several processes.

What is spread over devices here is a population. Each device evaluates a part of it. Devices then gather one scalar per member
and sum one vector of the size of the parameters; nothing else is sent.

Floating-point addition is not associative. A sum that must be bit-identical on 1, 2, 4 or 8 devices is one of `lanes` partial
sums, whose number does not depend on the number of devices, along a binary tree. A device sums its own lanes. The rest of the
tree is computed for one slice of the vector per device (an all-to-all and an all-gather, which send as much as a ring
all-reduce).

This fixes the sum alone. A member's fitness must also be identical, and XLA's rounding depends on what it fuses. Fitness was
identical for networks of products, and for convolutions with noise on all layers. With noise on one layer
(`evolution/layerwise.py`) and several members evaluated at once, parameters of a Conv4 on 1, 2 and 8 devices differed after 5
generations by 1e-7 of the largest.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.cpu import cores
from ev3_distill.types import PyTree

AXIS = "pairs"  # of a mesh
LANES = 8  # of a sum in fixed order; allows up to 8 devices
PEER_TIMEOUT_S = 20  # without a heartbeat, after which a process counts as dead
CONNECT_TIMEOUT_S = 60  # for all processes to connect
MIN_XLA_THREADS = 4  # with one thread, two processes may each wait in a sum that the other has not reached


class Spread(NamedTuple):
    """How a population is spread over devices. The default: one device has all of it."""

    devices: int = 1  # D
    axis: str | None = None  # of the mesh, within `shard_map`
    lanes: int | None = None  # L of a sum in fixed order, a power of two that D divides; None sums in any order

    @property
    def parts(self) -> int:
        """Partial sums per device."""
        return 1 if self.lanes is None else self.lanes // self.devices

    def device_index(self) -> jax.Array:
        """Index of this device, int32."""
        return jnp.int32(0) if self.axis is None else jax.lax.axis_index(self.axis)

    def gather(self, own: jax.Array) -> jax.Array:
        """Concatenate each device's [n, ...]: [D n, ...] on all of them."""
        return own if self.axis is None else jax.lax.all_gather(own, self.axis, tiled=True)

    def total(self, partial: PyTree) -> PyTree:
        """The sum over all parts of all devices, on all of them: leaves [parts, ...] become [...]."""
        own = jax.tree.map(_tree_sum, partial)
        if self.axis is None:
            return own
        vector, unravel = ravel_pytree(own)
        if self.lanes is None:
            return unravel(jax.lax.psum(vector, self.axis))
        slices = jnp.pad(vector, (0, -vector.size % self.devices)).reshape(self.devices, -1)
        slices = jax.lax.all_to_all(slices, self.axis, 0, 0, tiled=True)  # row d: device d's sum of this device's slice
        return unravel(jax.lax.all_gather(_tree_sum(slices), self.axis, tiled=True)[: vector.size])


def _tree_sum(rows: jax.Array) -> jax.Array:
    """Sum [R, ...] to [...], neighbors first; R is a power of two."""
    while rows.shape[0] > 1:
        rows = rows[::2] + rows[1::2]
    return rows[0]


def spread_over(mesh: Mesh, *, fixed_order: bool = False) -> Spread:
    """Spread a population over a mesh.

    Args:
      mesh: with one axis.
      fixed_order: whether sums are bit-identical for any number of devices, which must then divide LANES.

    Raises:
      InputError: the number of devices does not divide LANES.
    """
    if fixed_order and LANES % mesh.size:
        raise InputError(
            f"a sum in fixed order needs a number of devices that divides {LANES}; got {mesh.size}: use fewer devices, "
            "or fixed_order=False"
        )
    (axis,) = mesh.axis_names
    return Spread(mesh.size, axis, LANES if fixed_order else None)


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` devices of all processes; None for all devices.

    Raises:
      InputError: there are fewer devices.
    """
    available = jax.devices()
    if devices is not None and not 1 <= devices <= len(available):
        raise InputError(
            f"the number of devices must be between 1 and {len(available)}, the number available; got {devices}: "
            "use fewer devices"
        )
    return Mesh(np.array(available[:devices]), (AXIS,))


def on_all_devices(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Run a function of replicated arguments and results on all devices of a mesh, each of which may do a part of the work.

    Args:
      function: it must return the same on all devices.
      mesh: with one axis.
    """
    replicated = PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy the same arrays to all devices of a mesh; every process must pass the same."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def join_processes(
    processes: int | str | None = None, coordinator: str | None = None, process_id: int | None = None
) -> tuple[int, int]:
    """Connect the processes of one run. Call it before any other use of JAX.

    A process that dies ends the others: they stop with an error that names it, after PEER_TIMEOUT_S and a few seconds.

    Args:
      processes: their number, as an integer or its digits. None or 1: do nothing. "auto": ask the cluster (SLURM, Kubernetes,
        Cloud TPU, MPI).
      coordinator: HOST:PORT where process 0 listens, reachable from all processes; optional if the cluster provides it.
      process_id: number of this process, from 0; optional if the cluster provides it.

    Returns:
      (number of this process, number of processes).

    Raises:
      InputError: the arguments do not describe a group of processes, or not all connected within CONNECT_TIMEOUT_S.
    """
    if isinstance(processes, str) and processes.isdigit():
        processes = int(processes)
    if processes is None or processes == 1:
        if coordinator is not None or process_id is not None:
            raise InputError(
                f"--coordinator and --process-id are for several processes; got {coordinator or process_id} with "
                f"--processes {processes or 'unset'}: set --processes to their number"
            )
        return 0, 1
    count = _process_count(processes, coordinator, process_id)
    if cores() < MIN_XLA_THREADS:
        os.environ.setdefault("NPROC", str(MIN_XLA_THREADS))  # read when XLA creates its CPU client
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            process_id,
            cluster_detection_method=None if count is None else "deactivate",
            initialization_timeout=CONNECT_TIMEOUT_S,
            heartbeat_timeout_seconds=PEER_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:  # JAX's own errors are RuntimeErrors
        raise InputError(
            f"{processes} processes must connect to each other; got {summary(error)}: start all of them together, each "
            "with --processes, --coordinator HOST:PORT and --process-id"
        ) from None
    return jax.process_index(), jax.process_count()


def is_first_process() -> bool:
    """Whether this is process 0, the only one that writes files."""
    return bool(jax.process_index() == 0)


def broadcast_bytes(content: bytes) -> bytes:
    """Process 0's `content`, in all processes. Their disks need not be shared."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    own = np.frombuffer(content if is_first_process() else bytes(size), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8).tobytes()


def read_on_first(read: Callable[[], bytes]) -> bytes:
    """Call `read` in process 0 and return its result in all processes; an InputError is raised in all of them, too."""
    if jax.process_count() == 1:
        return read()
    message = b""
    if is_first_process():
        try:
            message = b"+" + read()
        except InputError as error:
            message = b"-" + str(error).encode()
    message = broadcast_bytes(message)
    if message.startswith(b"-"):
        raise InputError(message[1:].decode())
    return message[1:]


def broadcast_number(number: float) -> float:
    """Process 0's number, such as its clock, in all processes, so that all make the same decisions."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float64(number)))


@contextlib.contextmanager
def process_directory(directory: Path) -> Iterator[Path]:
    """The directory in which this process works on a run: the run's own for process 0, a temporary copy for the others.

    All processes then do the same, and one of them leaves files behind. The others print nothing, either. To resume a run, all
    processes must be able to read its directory.
    """
    if is_first_process():
        if jax.process_count() > 1:
            broadcast_number(0)  # wait until the others have their copies
        yield directory
        return
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nowhere:
        own = Path(place) / "run"
        if directory.is_dir():
            shutil.copytree(directory, own)
        broadcast_number(0)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield own


@contextlib.contextmanager
def watch_peers() -> Iterator[None]:
    """Turn the loss of another process into an InputError. Use it around all that processes compute together.

    Raises:
      InputError: another process has died or cannot be reached. If process 0 dies, this process may end first, with JAX's own
        message that another task died.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise InputError(
            f"all processes of a run must live until it ends; one died or cannot be reached ({summary(error)}): start all of "
            "them again, or fewer; the run resumes from its last checkpoint"
        ) from None


def _process_count(processes: int | str, coordinator: str | None, process_id: int | None) -> int | None:
    """The number of processes, None for "auto"."""
    if processes == "auto":
        return None
    if not isinstance(processes, int) or processes < 1:
        raise InputError(f"--processes must be a positive number or 'auto'; got '{processes}': use one of these")
    host, _, port = (coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(
            f"{processes} processes need a coordinator HOST:PORT, where process 0 listens; got '{coordinator or ''}': "
            "for example --coordinator 10.0.0.1:12345"
        )
    if process_id is None or not 0 <= process_id < processes:
        raise InputError(
            f"each of {processes} processes needs its own number from 0 to {processes - 1}; got {process_id}: "
            "set --process-id"
        )
    return processes
