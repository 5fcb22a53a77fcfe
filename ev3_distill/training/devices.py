"""A run on many devices: every batch in parts, or the arms of an iteration side by side.

All devices hold the whole state and the whole data. Where batches are spread, a network's forward pass takes a part of the
examples on each device, and XLA adds up what gradients and statistics need of the others (data parallelism); an arm that
evolves a population has a part of that on each device, see `sharding.py`. A run computes what it would on one device, but adds
floats up in another order. Where arms are spread, each device rolls out and scores
proposals of its own and tells the others what came of them: nothing is sent within a trajectory, so it is that of one device;
but a device idles where there are fewer arms than devices, as where the leader trains alone.

Both at once are none: XLA lets devices of different groups wait for each other where a batch is spread within a branch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ev3_distill.core.explore import alone
from ev3_distill.errors import InputError
from ev3_distill.runtime.compile import jit
from ev3_distill.types import Network, PyTree, Variables

ARMS, BATCH = "arms", "batch"  # axes of the mesh
WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True, eq=False)
class Devices:
    """The devices of a run; `devices_of` makes them. As it is, the default device alone, for which all of this is nothing."""

    mesh: Mesh | None = None  # of one axis, ARMS or BATCH

    def __str__(self) -> str:
        """How many, in how many processes, and what is spread over them."""
        if self.mesh is None:
            return "1"
        processes = len({device.process_index for device in self.mesh.devices.flat})
        (spread,) = self.mesh.axis_names
        return f"{self.mesh.size}, {spread} spread" + (f", {processes} processes" if processes > 1 else "")

    @property
    def of_steps(self) -> Mesh | None:
        """The mesh over which each step is spread, the examples of a batch or the members of a population; None over none."""
        return self.mesh if self.mesh is not None and self.mesh.axis_names == (BATCH,) else None

    def network(self, network: Network) -> Network:
        """The same network, whose examples are spread over the devices if batches are."""
        if (mesh := self.of_steps) is None:
            return network
        parts = NamedSharding(mesh, PartitionSpec(BATCH))

        def parallel(forward: Callable[..., Any]) -> Callable[..., Any]:
            def of_all(
                variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
            ) -> tuple[Any, Variables]:
                if BATCH not in jax.sharding.get_abstract_mesh().manual_axes:  # else each device has work of its own
                    inputs = jax.lax.with_sharding_constraint(inputs, parts)
                made: tuple[Any, Variables] = forward(variables, inputs, train=train, key=key)
                return made

            return of_all

        made = {name: getattr(network, name) for name in ("apply", "features", "straight")}
        forms: dict[str, Any] = {name: parallel(form) for name, form in made.items() if form is not None}
        return dataclasses.replace(network, **forms)

    def share(
        self, work: Callable[[jax.Array, PyTree], tuple[PyTree, ...]], active: jax.Array, given: PyTree
    ) -> tuple[PyTree, ...]:
        """What `work` makes, each row by one device, see `types.Share`: active rows in turn, and the first has the rest."""
        if self.mesh is None or self.mesh.axis_names != (ARMS,):
            return alone(work, active, given)
        owner = jnp.where(active, (jnp.cumsum(active) - 1) % self.mesh.size, 0)

        def of_one(owner: jax.Array, given: PyTree) -> tuple[PyTree, ...]:
            mine = owner == jax.lax.axis_index(ARMS)
            return tuple(_from_owner(row, mine[i]) for i, row in enumerate(work(mine, given)))

        spread = jax.shard_map(of_one, mesh=self.mesh, in_specs=WHOLE, out_specs=WHOLE, check_vma=False)
        made: tuple[PyTree, ...] = spread(owner, given)
        return made

    def place(self, tree: PyTree) -> PyTree:
        """The same arrays on all devices; every process must bring the same. What is there already stays."""
        if self.mesh is None:
            return tree
        whole = NamedSharding(self.mesh, WHOLE)

        def put(leaf: Any) -> Any:
            if isinstance(leaf, jax.Array) and leaf.sharding == whole:
                return leaf
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, whole, lambda index: host[index])

        return jax.tree.map(put, tree)

    def taken(self, tree: PyTree) -> PyTree:
        """Arrays for programs that run on one device."""
        return tree if self.mesh is None else jax.tree.map(jnp.asarray, jax.device_get(tree))

    def jit(self, function: Callable[..., Any]) -> Any:
        """`compiling.jit` of a function of placed arrays, with results on all devices."""
        if self.mesh is None:
            return jit(function)
        return jit(function, out_shardings=NamedSharding(self.mesh, WHOLE))


ONE = Devices()


def devices_of(count: int | None = None, *, spread: str = BATCH) -> Devices:
    """The first devices of all processes, or all of them.

    Args:
      count: of them; None: all.
      spread: over which the run is, BATCH or ARMS.

    Raises:
      InputError: there are not so many, or nothing of that name is spread.
    """
    there = jax.devices()
    count = len(there) if count is None else count
    if not 1 <= count <= len(there):
        raise InputError(
            f"a run has 1 device or more of the {len(there)} that are there; got {count}: name fewer, or more"
        )
    if count < len(there) and jax.process_count() > 1:
        raise InputError(
            f"several processes share all of their {len(there)} devices; got {count}: leave --devices out, or start fewer"
        )
    if spread not in (ARMS, BATCH):
        raise InputError(f"what is spread over devices is {BATCH} or {ARMS}; got '{spread}': name one of these")
    return Devices(Mesh(np.array(there[:count]), (spread,)))


def _from_owner(row: PyTree, mine: jax.Array) -> PyTree:
    """One device's arrays, on all of them."""

    def sent(leaf: jax.Array) -> jax.Array:
        number = leaf.astype(jnp.int32) if leaf.dtype == jnp.bool_ else leaf
        return jax.lax.psum(jnp.where(mine, number, jnp.zeros_like(number)), ARMS).astype(leaf.dtype)

    return jax.tree.map(sent, row)
