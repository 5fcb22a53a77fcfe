"""A network for those who live in Flax: its variables as safetensors, and beside them the program that applies them.

`model.safetensors` has each array under its path in the module, such as `stages.0.1.conv1.kernel`, and tells of itself in its
header. `apply.stablehlo` maps such a dictionary and inputs [B, ...] to outputs [B, K], and has a gradient in both. Neither
holds code of Python: nothing is ever unpickled or imported.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ev3_distill.export.formats import stablehlo

FILE, PROGRAM = "model.safetensors", "apply.stablehlo"

Named = dict[str, jax.Array]


def named(tree: Any) -> Named:
    """The arrays of a module's nested dictionaries, each by its path, joined by dots."""
    return {
        ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def file_of(variables: Any, about: Mapping[str, str]) -> bytes:
    """The safetensors file of a network's variables.

    Args:
      variables: with the fields `params` and `stats`, nested dictionaries of arrays.
      about: what the file says of itself, by name; which arrays are statistics is told there too.
    """
    from safetensors import numpy as safetensors

    arrays = {name: np.asarray(leaf) for name, leaf in named(variables).items()}
    content: bytes = safetensors.save(arrays, {**about, "statistics": json.dumps(list(named(variables.stats)))})
    return content


def program_of(
    apply: Callable[[Any, jax.Array], jax.Array], variables: Any, example: jax.ShapeDtypeStruct, *, name: str
) -> bytes:
    """What `jax.export.deserialize` reads: a program of variables by name and inputs.

    Args:
      apply: of variables and inputs [B, ...] to outputs [B, K], pure.
      variables: of these shapes.
      example: one example, without the batch axis.
      name: of the network, for errors.

    Raises:
      InputError: the network asks for what such a file cannot hold.
    """
    treedef, names = jax.tree.structure(variables), list(named(variables))

    def forward(arrays: Named, inputs: jax.Array) -> jax.Array:
        return apply(jax.tree.unflatten(treedef, [arrays[name] for name in names]), inputs)

    return stablehlo.program_of(forward, example, name=name, given=(named(variables),), derivatives=1)
