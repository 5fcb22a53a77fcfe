"""Work on many devices and in many processes: meshes, sums whose order is fixed, and the start of several processes.

What is spread here is a population. Each device has its own part of it, a scalar per member is gathered, and one vector of the
parameters' size is added up; nothing else is sent. Addition of floats is not associative, so a sum that is to come out bit by
bit the same on 1, 2, 4 or 8 devices is one of `lanes` partial sums, whose number does not depend on that of the devices, along
a binary tree: a device adds up its own lanes, and the rest of the tree is climbed for one part of the vector on each device
(an all-to-all and an all-gather, which send what a ring's all-reduce sends).

That is the sum alone: a member's own fitness must come out the same, too, and XLA rounds by what it fuses. It did for
networks of products, and of convolutions, whose noise is on all layers; where it is on one (`arms/layerwise.py`) and several
members are evaluated at once, parameters of a Conv4 on 1, 2 and 8 devices differed after 5 generations by 1e-7 of the largest.
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
LANES = 8  # of a sum in fixed order: for up to 8 devices
SILENCE_S = 20  # after which a process that says nothing is taken for dead
CONNECT_S = 60  # for all processes to meet
THREADS = (
    4  # of XLA at least: with one, as on one core, two processes may each wait in a sum that the other has yet to reach
)


class Spread(NamedTuple):
    """How a population is spread over devices. As it is, over none: one device has it all."""

    devices: int = 1  # D
    axis: str | None = None  # of the mesh, within `shard_map`
    lanes: int | None = None  # L of a sum in fixed order, a power of two that D divides; None adds in any order

    @property
    def parts(self) -> int:
        """Parts that one device has."""
        return 1 if self.lanes is None else self.lanes // self.devices

    def place(self) -> jax.Array:
        """Of this device, int32."""
        return jnp.int32(0) if self.axis is None else jax.lax.axis_index(self.axis)

    def gather(self, own: jax.Array) -> jax.Array:
        """Each device's [n, ...], one after the other: [D n, ...] on all of them."""
        return own if self.axis is None else jax.lax.all_gather(own, self.axis, tiled=True)

    def total(self, partial: PyTree) -> PyTree:
        """The sum over all parts of all devices, on all of them: leaves [parts, ...] become [...]."""
        own = jax.tree.map(_tree_sum, partial)
        if self.axis is None:
            return own
        vector, back = ravel_pytree(own)
        if self.lanes is None:
            return back(jax.lax.psum(vector, self.axis))
        pieces = jnp.pad(vector, (0, -vector.size % self.devices)).reshape(self.devices, -1)
        pieces = jax.lax.all_to_all(pieces, self.axis, 0, 0, tiled=True)  # row d: device d's sum of my piece
        return back(jax.lax.all_gather(_tree_sum(pieces), self.axis, tiled=True)[: vector.size])


def _tree_sum(rows: jax.Array) -> jax.Array:
    """[R, ...] to [...], neighbours first; R is a power of two."""
    while rows.shape[0] > 1:
        rows = rows[::2] + rows[1::2]
    return rows[0]


def spread_over(mesh: Mesh, *, fixed_order: bool = False) -> Spread:
    """A population's spread over a mesh.

    Args:
      mesh: of one axis.
      fixed_order: whether sums come out bit by bit the same whatever the number of devices; that must then divide LANES.

    Raises:
      InputError: it does not.
    """
    if fixed_order and LANES % mesh.size:
        raise InputError(
            f"a sum in fixed order is spread over a number of devices that divides {LANES}; got {mesh.size}: take fewer, "
            "or let the order be free"
        )
    (axis,) = mesh.axis_names
    return Spread(mesh.size, axis, LANES if fixed_order else None)


def mesh_of(devices: int | None = None) -> Mesh:
    """A mesh of the first devices of all processes, or of all devices.

    Raises:
      InputError: there are not so many.
    """
    there = jax.devices()
    if devices is not None and not 1 <= devices <= len(there):
        raise InputError(f"there are {len(there)} devices; got {devices}: ask for 1 to {len(there)}")
    return Mesh(np.array(there[:devices]), (AXIS,))


def everywhere(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A function of replicated arguments and results, run by all devices of a mesh, each of which may do a part of it.

    Args:
      function: it must return the same on all of them.
      mesh: of one axis.
    """
    whole = PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same arrays on all devices of a mesh; every process must bring the same."""
    whole = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, whole, lambda index: host[index])

    return jax.tree.map(put, tree)


def start(
    processes: int | str | None = None, coordinator: str | None = None, process_id: int | None = None
) -> tuple[int, int]:
    """Joins the processes of one run, before anything else is asked of JAX.

    A process that dies takes the others with it: they stop with an error that names it, within SILENCE_S and a few seconds.

    Args:
      processes: how many there are, as a number or its digits; None or 1 starts nothing, "auto" asks the cluster (SLURM,
        Kubernetes, Cloud TPU, MPI).
      coordinator: HOST:PORT where process 0 listens, that all of them reach; the cluster may know it.
      process_id: which of them this is, from 0; the cluster may know it.

    Returns:
      (this process's number, how many there are).

    Raises:
      InputError: what was given does not make a group of processes, or they did not meet within CONNECT_S.
    """
    if isinstance(processes, str) and processes.isdigit():
        processes = int(processes)
    if processes is None or processes == 1:
        if coordinator is not None or process_id is not None:
            raise InputError(
                f"a coordinator and a process's number are for several processes; got {coordinator or process_id} and "
                f"{processes or 'no number'} of them: say how many by --processes"
            )
        return 0, 1
    count = _checked(processes, coordinator, process_id)
    if cores() < THREADS:
        os.environ.setdefault("NPROC", str(THREADS))  # read when XLA's client for CPUs is made
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            process_id,
            cluster_detection_method=None if count is None else "deactivate",
            initialization_timeout=CONNECT_S,
            heartbeat_timeout_seconds=SILENCE_S,
        )
    except (ValueError, RuntimeError) as error:  # JAX's own errors are RuntimeErrors
        raise InputError(
            f"{processes} processes could not be joined: {summary(error)}: give each --processes, --coordinator HOST:PORT and "
            "--process-id, all from one start"
        ) from None
    return jax.process_index(), jax.process_count()


def first() -> bool:
    """Whether this is the process that writes: one of a run does."""
    return bool(jax.process_index() == 0)


def as_first(content: bytes) -> bytes:
    """What process 0 brings, in all processes: their disks need not be shared."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    own = np.frombuffer(content if first() else bytes(size), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8).tobytes()


def from_first(read: Callable[[], bytes]) -> bytes:
    """What process 0 reads, in all processes; or its error, in all of them."""
    if jax.process_count() == 1:
        return read()
    told = b""
    if first():
        try:
            told = b"+" + read()
        except InputError as error:
            told = b"-" + str(error).encode()
    told = as_first(told)
    if told.startswith(b"-"):
        raise InputError(told[1:].decode())
    return told[1:]


def agreed(number: float) -> float:
    """A number of process 0, such as its clock, in all processes: what they decide by, they must decide alike."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float64(number)))


@contextlib.contextmanager
def own_directory(directory: Path) -> Iterator[Path]:
    """Where this process works on a run: in its directory, or, for all but process 0, in a copy for the time being.

    So all processes do the very same, and one of them leaves anything behind. The others say nothing, too. Where the run has
    begun, they must be able to read its directory.
    """
    if first():
        if jax.process_count() > 1:
            agreed(0)  # the others have their copies
        yield directory
        return
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nowhere:
        own = Path(place) / "run"
        if directory.is_dir():
            shutil.copytree(directory, own)
        agreed(0)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield own


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it, what processes compute together; the loss of one is told as such.

    Raises:
      InputError: another process has died or cannot be reached. The death of process 0 may end this one first, with JAX's own
        message that another task died.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise InputError(
            f"processes of one run work together to its end; one has died or is out of reach ({summary(error)}): "
            "start all anew, the run goes on from its checkpoint, with fewer of them if need be"
        ) from None


def _checked(processes: int | str, coordinator: str | None, process_id: int | None) -> int | None:
    """The number of processes, None for "auto"."""
    if processes == "auto":
        return None
    if not isinstance(processes, int) or processes < 1:
        raise InputError(f"processes are a number of at least 1, or auto; got '{processes}': give one of these")
    host, _, port = (coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(
            f"{processes} processes need a coordinator HOST:PORT, where process 0 listens; got '{coordinator or ''}': "
            "for example 10.0.0.1:12345"
        )
    if process_id is None or not 0 <= process_id < processes:
        raise InputError(
            f"each of {processes} processes needs its own number, 0 to {processes - 1}; got {process_id}: give --process-id"
        )
    return processes
