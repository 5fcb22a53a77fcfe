"""Flax: parameters as safetensors, plus a StableHLO function that applies them.

`model.safetensors` stores each array under its path in the module, such as `stages.0.1.conv1.kernel`; its header holds the
metadata. `apply.stablehlo` maps a dictionary of these arrays and inputs [B, ...] to outputs [B, K], and is differentiable in
both. Neither file contains Python code: reading them unpickles and imports nothing.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ev3_distill.export.formats import stablehlo

FILE, PROGRAM = "model.safetensors", "apply.stablehlo"

NamedArrays = dict[str, jax.Array]


def named_arrays(tree: Any) -> NamedArrays:
    """The arrays of nested dictionaries, by their paths joined with dots."""
    return {
        ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def serialize_variables(variables: Any, metadata: Mapping[str, str]) -> bytes:
    """Writes a network's variables as a safetensors file.

    Args:
      variables: with fields `params` and `stats`, nested dictionaries of arrays.
      metadata: entries of the file's header, by name. The names of the statistics are added.
    """
    from safetensors import numpy as safetensors

    arrays = {name: np.asarray(leaf) for name, leaf in named_arrays(variables).items()}
    statistics = json.dumps(list(named_arrays(variables.stats)))
    content: bytes = safetensors.save(arrays, {**metadata, "statistics": statistics})
    return content


def serialize_apply(
    apply: Callable[[Any, jax.Array], jax.Array], variables: Any, example: jax.ShapeDtypeStruct, *, name: str
) -> bytes:
    """Writes a program of named variables and inputs, to be read by `jax.export.deserialize`.

    Args:
      apply: pure function of variables and inputs [B, ...] to outputs [B, K].
      variables: of the shapes that the program shall take.
      example: shape and dtype of one example, without the batch axis.
      name: of the network, for error messages.

    Raises:
      InputError: the network cannot be exported with a free batch axis.
    """
    treedef, names = jax.tree.structure(variables), list(named_arrays(variables))

    def forward(arrays: NamedArrays, inputs: jax.Array) -> jax.Array:
        return apply(jax.tree.unflatten(treedef, [arrays[name] for name in names]), inputs)

    return stablehlo.serialize(forward, example, name=name, arguments=(named_arrays(variables),), derivatives=1)
