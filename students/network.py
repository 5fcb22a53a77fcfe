"""Flax NNX modules as pure functions: splits a module into its static graph and its variables, EV3's "model graph" and
"parameters".
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ev3_distill.types import Network, Variables


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module], spec: Mapping[str, Any] | None = None) -> Network:
    """Wraps the factory of an NNX module as a network.

    Random streams inside the module (dropout) are not part of the variables: each training call seeds them from its key.
    The module receives uint8 inputs as float32 in [0, 1], and all others unchanged.

    Args:
      build: creates the module from `nnx.Rngs`. The module maps inputs [B, ...] to logits [B, K]. If it has a method
        `features`, that maps inputs to the same logits and a dictionary of features [B, ...].
      spec: plain data from which the caller can create `build` again; saved beside the variables.

    Returns:
      The network. Its `init` takes a key and its `apply` is pure; it has `features` if the module does.
    """
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))  # arrays are shapes only: nothing is drawn or compiled
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

    has_features = callable(getattr(type(module), "features", None))  # a layer with that name is not a method
    return Network(init, apply, dict(spec or {}), features if has_features else None)


def _split(module: nnx.Module) -> tuple[Any, Any, Any, Any]:
    """Graph, parameters, random streams, and everything else."""
    parts: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return parts


def _reseed(streams: nnx.State, key: jax.Array) -> nnx.State:
    """Restarts every random stream from its own fold of the key."""
    leaves, treedef = jax.tree.flatten(streams)
    seeded = [
        jax.random.fold_in(key, i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, seeded)


def feature_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's features for one example, by name; empty if it has none.

    Args:
      network: one whose spec has `input_shape`; without it, the result is empty.
    """
    forward = network.features
    if forward is None or "input_shape" not in network.spec:
        return {}
    key, inputs = jax.random.key(0), jnp.zeros((1, *network.spec["input_shape"]))
    (_, features), _ = jax.eval_shape(lambda: forward(network.init(key), inputs, train=False))
    return {name: leaf.shape[1:] for name, leaf in features.items()}


def count_params(variables: Variables) -> int:
    """The number of trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables.params))


def describe_spec(spec: Mapping[str, Any]) -> str:
    """A network for error messages: the family or factory, and the options, such as `mlp (hidden=[32])`."""
    hidden = ("family", "factory", "input_shape", "num_classes", "standardize")
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in spec.items()}
    options = ", ".join(f"{name}={value}" for name, value in values.items() if name not in hidden)
    name = spec.get("factory") or spec.get("family")
    return f"{name} ({options})" if options else f"{name}"
