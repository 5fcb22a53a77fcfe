"""Runs on several devices: every batch is sharded, or the arms of an iteration train side by side.

Every device holds the complete state and data. If batches are sharded, each device computes the forward pass of a part
of the examples, and XLA adds up what gradients and statistics need from the others (data parallelism). `Devices.whole`
says that all else stays complete; a step then needs one sum of the gradients and those of the loss and of statistics. An
evolution arm shards its population the same way. The results are those of one device up to the order of floating-point
additions. If arms are distributed, each device rolls out and scores proposals of its own and sends the results to the
others. Nothing is sent within a trajectory, so each trajectory equals that of one device; but devices idle when there are
fewer active arms than devices, as when the leader trains alone.

The two cannot be combined: XLA deadlocks if a batch is sharded within a branch that only some devices take.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ev3_distill.core.explore import on_one_device
from ev3_distill.core.step import Step
from ev3_distill.errors import InputError
from ev3_distill.runtime.compile import jit
from ev3_distill.students.layers.compiled import without_kernels
from ev3_distill.types import Network, PyTree, Variables

ARMS, BATCH = "arms", "batch"  # names of mesh axes
REPLICATED = PartitionSpec()


@dataclasses.dataclass(frozen=True, eq=False)
class Devices:
    """The devices of a run, from `devices_of`. Without a mesh: the default device alone, and every method does nothing."""

    mesh: Mesh | None = None  # with one axis, ARMS or BATCH

    def __str__(self) -> str:
        """The number of devices and processes, and what is spread over them."""
        if self.mesh is None:
            return "1"
        processes = len({device.process_index for device in self.mesh.devices.flat})
        (spread,) = self.mesh.axis_names
        return f"{self.mesh.size}, {spread} spread" + (f", {processes} processes" if processes > 1 else "")

    @property
    def step_mesh(self) -> Mesh | None:
        """The mesh that shards each training step (examples of a batch, members of a population), or None."""
        return self.mesh if self.mesh is not None and self.mesh.axis_names == (BATCH,) else None

    def network(self, network: Network) -> Network:
        """The same network, with its examples sharded over the devices if batches are sharded."""
        if (mesh := self.step_mesh) is None:
            return network
        parts = NamedSharding(mesh, PartitionSpec(BATCH))

        def parallel(forward: Callable[..., Any]) -> Callable[..., Any]:
            def sharded(
                variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
            ) -> tuple[Any, Variables]:
                if BATCH in jax.sharding.get_abstract_mesh().manual_axes:  # each device has its own work
                    result: tuple[Any, Variables] = forward(variables, inputs, train=train, key=key)
                    return result
                variables = self.whole(variables)  # and with them their gradients
                inputs = jax.lax.with_sharding_constraint(inputs, parts)
                with without_kernels():
                    result = forward(variables, inputs, train=train, key=key)
                return result

            return sharded

        passes = {name: getattr(network, name) for name in ("apply", "features", "straight")}
        parallel_passes: dict[str, Any] = {name: parallel(one) for name, one in passes.items() if one is not None}
        return dataclasses.replace(network, **parallel_passes)

    def whole(self, tree: PyTree) -> PyTree:
        """Within a jitted function: the same arrays, which every device holds completely.

        Without this XLA spreads even small arrays of a run's state over the devices and collects them again in every step.
        """
        if self.step_mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.step_mesh, REPLICATED))

    def whole_step(self, step: Step) -> Step:
        """The same step of the core, with states that every device holds completely."""
        return lambda pools, state, limit: self.whole(step(pools, self.whole(state), limit))

    def distribute(
        self, work: Callable[[jax.Array, PyTree], tuple[PyTree, ...]], active: jax.Array, inputs: PyTree
    ) -> tuple[PyTree, ...]:
        """Computes each row on one device, see `types.Distribute`: active rows in turn, the others on the first device."""
        if self.mesh is None or self.mesh.axis_names != (ARMS,):
            return self.whole(on_one_device(work, active, self.whole(inputs)))
        owner = jnp.where(active, (jnp.cumsum(active) - 1) % self.mesh.size, 0)

        def on_each(owner: jax.Array, inputs: PyTree) -> tuple[PyTree, ...]:
            own = owner == jax.lax.axis_index(ARMS)
            return tuple(_from_owner(row, own[i]) for i, row in enumerate(work(own, inputs)))

        sharded = jax.shard_map(on_each, mesh=self.mesh, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False)
        rows: tuple[PyTree, ...] = sharded(owner, inputs)
        return rows

    def place(self, tree: PyTree) -> PyTree:
        """Copies arrays to all devices, unless they are there already; every process must pass the same values."""
        if self.mesh is None:
            return tree
        replicated = NamedSharding(self.mesh, REPLICATED)

        def put(leaf: Any) -> Any:
            if isinstance(leaf, jax.Array) and leaf.sharding == replicated:
                return leaf
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, replicated, lambda index: host[index])

        return jax.tree.map(put, tree)

    def gather(self, tree: PyTree) -> PyTree:
        """Arrays on the default device, for programs that run on one device."""
        return tree if self.mesh is None else jax.tree.map(jnp.asarray, jax.device_get(tree))

    def jit(self, function: Callable[..., Any]) -> Any:
        """`runtime.compile.jit` of a function of placed arrays, with results on all devices."""
        if self.mesh is None:
            return jit(function)
        return jit(function, out_shardings=NamedSharding(self.mesh, REPLICATED))


ONE = Devices()


def devices_of(count: int | None = None, *, spread: str = BATCH) -> Devices:
    """The first devices of all processes, or all devices.

    Args:
      count: number of devices; None for all.
      spread: BATCH or ARMS.

    Raises:
      InputError: there are fewer devices, or `spread` is neither.
    """
    available = jax.devices()
    count = len(available) if count is None else count
    if not 1 <= count <= len(available):
        raise InputError(
            f"a run needs between 1 and {len(available)} devices, the number available; got {count}: change --devices"
        )
    if count < len(available) and jax.process_count() > 1:
        raise InputError(
            f"a multi-process run uses all of its {len(available)} devices; got {count}: omit --devices, or start "
            "fewer processes"
        )
    if spread not in (ARMS, BATCH):
        raise InputError(f"spread must be {BATCH} or {ARMS}; got '{spread}': use one of these")
    return Devices(Mesh(np.array(available[:count]), (spread,)))


def _from_owner(row: PyTree, mine: jax.Array) -> PyTree:
    """Sends the owner's arrays to all devices."""

    def sent(leaf: jax.Array) -> jax.Array:
        number = leaf.astype(jnp.int32) if leaf.dtype == jnp.bool_ else leaf
        return jax.lax.psum(jnp.where(mine, number, jnp.zeros_like(number)), ARMS).astype(leaf.dtype)

    return jax.tree.map(sent, row)
