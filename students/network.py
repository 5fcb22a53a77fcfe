"""Flax NNX modules as networks: the static graph and the variables part ways here, EV3's "model graph" and "parameters"."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.checkpoint import first_process_options
from ev3_distill.runtime.distributed import is_first_process, read_on_first
from ev3_distill.types import Network, Variables


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module], spec: Mapping[str, Any] | None = None) -> Network:
    """Wraps a factory of an NNX module as a network.

    Random streams inside the module (dropout) are no part of the variables: each training call reseeds them from its key.
    Inputs of bytes reach the module as float32 in [0, 1]; all others as they are.

    Args:
      build: makes the module from `nnx.Rngs`; the module maps inputs [B, ...] to logits [B, K]. A method `features`, if it
        has one, maps them to the same logits and a dictionary of features [B, ...].
      spec: plain data from which the caller can make `build` again; saved beside the variables.

    Returns:
      The network. Its `init` takes a key, its `apply` is pure; it has `features` where the module has.
    """
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))  # its arrays are shapes: nothing is drawn, nothing compiled
    module.eval()
    eval_graph, _, streams, _ = _split(module)
    module.train()
    train_graph = _split(module)[0]

    def init(key: jax.Array) -> Variables:
        _, params, _, stats = _split(build(nnx.Rngs(key)))
        return Variables(nnx.to_pure_dict(params), nnx.to_pure_dict(stats))

    def run(
        method: str, variables: Variables, inputs: jax.Array, train: bool, key: jax.Array | None
    ) -> tuple[Any, Variables]:
        if inputs.dtype == jnp.uint8:
            inputs = inputs.astype(jnp.float32) / 255
        graph = train_graph if train else eval_graph
        seeded = _reseed(streams, jax.random.key(0) if key is None else key)
        model = nnx.merge(graph, nnx.State(variables.params), seeded, nnx.State(variables.stats))
        outputs = getattr(model, method)(inputs)
        if not train:
            return outputs, variables
        stats = _split(model)[3]
        return outputs, Variables(variables.params, nnx.to_pure_dict(stats))

    def apply(
        variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Variables]:
        return run("__call__", variables, inputs, train, key)

    def features(
        variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Variables]:
        return run("features", variables, inputs, train, key)

    shows = callable(getattr(type(module), "features", None))  # a layer of that name is no method
    return Network(init, apply, dict(spec or {}), features if shows else None)


def _split(module: nnx.Module) -> tuple[Any, Any, Any, Any]:
    """Graph, parameters, random streams, and the rest."""
    parts: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return parts


def _reseed(streams: nnx.State, key: jax.Array) -> nnx.State:
    """Every random stream starts anew from its own fold of the key."""
    leaves, treedef = jax.tree.flatten(streams)
    fresh = [
        jax.random.fold_in(key, i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, fresh)


def features_of(network: Network) -> dict[str, tuple[int, ...]]:
    """What a network shows beside its logits: shapes by name, for one example; none where it shows nothing.

    Args:
      network: whose spec tells its `input_shape`.
    """
    show = network.features
    if show is None or "input_shape" not in network.spec:
        return {}
    key, inputs = jax.random.key(0), jnp.zeros((1, *network.spec["input_shape"]))
    (_, found), _ = jax.eval_shape(lambda: show(network.init(key), inputs, train=False))
    return {name: leaf.shape[1:] for name, leaf in found.items()}


def count_params(variables: Variables) -> int:
    """The number of trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables.params))


def save_variables(directory: Path, variables: Variables) -> None:
    """Writes variables with orbax; where several processes share a run, process 0 does."""
    if not is_first_process():
        return
    with ocp.StandardCheckpointer(multiprocessing_options=first_process_options()) as checkpointer:
        checkpointer.save(directory.absolute(), _plain(jax.device_get(variables)))


def load_variables(directory: Path, network: Network) -> Variables:
    """Reads variables of the network's structure.

    Raises:
      InputError: missing, damaged, or of another structure.
    """
    template = jax.eval_shape(network.init, jax.random.key(0))
    blank = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _plain(template).items()}

    def read() -> bytes:
        return b"".join(leaf.tobytes() for leaf in _read(directory, network, blank).values())

    content, at, leaves = read_on_first(read), 0, []
    for leaf in blank.values():
        leaves.append(jnp.asarray(np.frombuffer(content, leaf.dtype, leaf.size, at).reshape(leaf.shape)))
        at += leaf.nbytes
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _read(directory: Path, network: Network, blank: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves by path, in the order of `blank`."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs each error that it raises
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=first_process_options()) as checkpointer:
            saved = checkpointer.metadata(directory.absolute()).item_metadata.tree
            _check_alike(saved, blank)  # before orbax reads in parallel and fails in several places
            leaves = checkpointer.restore(directory.absolute(), blank)
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
        raise InputError(
            f"the variables in {directory} cannot be read for a network {network.spec}: {summary(error)}"
        ) from None
    return {name: np.asarray(leaves[name]) for name in blank}


def _check_alike(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError where names, shapes or types differ."""
    for name in sorted({*saved, *wanted}):
        one, other = (
            f"{tree[name].dtype} {tuple(tree[name].shape)}" if name in tree else "nothing" for tree in (saved, wanted)
        )
        if one != other:
            raise ValueError(f"{name} is saved as {one}, the network has {other}")


def _plain(variables: Variables) -> dict[str, jax.Array]:
    """Leaves by path, in order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
