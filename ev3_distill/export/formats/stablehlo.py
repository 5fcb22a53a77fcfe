"""StableHLO: a traced program as jax.export writes it, for CPU, CUDA and TPU, with a free batch axis."""

from collections.abc import Callable
from typing import Any

import jax
from jax import export

from ev3_distill.errors import InputError, summary
from ev3_distill.export.formats.onnx_graph import BATCH

PLATFORMS = ("cpu", "cuda", "tpu")


def program_of(
    forward: Callable[..., jax.Array],
    example: jax.ShapeDtypeStruct,
    *,
    name: str,
    given: tuple[Any, ...] = (),
    derivatives: int = 0,
) -> bytes:
    """What `jax.export.deserialize` reads.

    A network that asks for the size of its batch, as by `len(x)`, is traced for one example and mapped over the batch.

    Args:
      forward: of `given`, if there are any, and inputs [B, ...], to outputs [B, K], pure.
      example: one example, without the batch axis.
      name: of the network, for errors.
      given: arguments before the inputs, of the shapes that they will have.
      derivatives: how often the program can be differentiated.

    Raises:
      InputError: the network asks for what such a file cannot hold.
    """
    (batch,) = export.symbolic_shape(BATCH)
    inputs = jax.ShapeDtypeStruct((batch, *example.shape), example.dtype)
    arguments = [*jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given), inputs]

    def written(program: Callable[..., jax.Array]) -> bytes:
        made = export.export(jax.jit(program), platforms=PLATFORMS)(*arguments)
        return bytes(made.serialize(vjp_order=derivatives))

    try:
        return written(forward)
    except Exception as error:  # of the network's own code too, where it asks for the batch's size
        first = error
    try:
        return written(jax.vmap(lambda *of: forward(*of[:-1], of[-1][None])[0], (*[None] * len(given), 0)))
    except Exception:
        raise InputError(
            f"an exported program has a free batch axis; the network {name} cannot ({summary(first)}): let it "
            "treat each example by itself, by operations of JAX alone"
        ) from None
