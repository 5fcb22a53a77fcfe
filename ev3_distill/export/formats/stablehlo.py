"""StableHLO: a program written by jax.export, for CPU, CUDA and TPU, with a free batch axis."""

from collections.abc import Callable
from typing import Any

import jax
from jax import export

from ev3_distill.errors import InputError, summary
from ev3_distill.export.formats.onnx_graph import BATCH

PLATFORMS = ("cpu", "cuda", "tpu")


def serialize(
    forward: Callable[..., jax.Array],
    example: jax.ShapeDtypeStruct,
    *,
    name: str,
    arguments: tuple[Any, ...] = (),
    derivatives: int = 0,
) -> bytes:
    """Writes a program, to be read by `jax.export.deserialize`.

    A network whose code needs a concrete batch size, for example for `len(x)`, is traced for one example and mapped over the
    batch.

    Args:
      forward: pure function of `arguments` and inputs [B, ...] to outputs [B, K].
      example: shape and dtype of one example, without the batch axis.
      name: of the network, for error messages.
      arguments: arguments before the inputs, of the shapes that the program shall take.
      derivatives: how often the program can be differentiated.

    Raises:
      InputError: the network cannot be exported with a free batch axis.
    """
    (batch,) = export.symbolic_shape(BATCH)
    inputs = jax.ShapeDtypeStruct((batch, *example.shape), example.dtype)
    shapes = [*jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments), inputs]

    def serialized(program: Callable[..., jax.Array]) -> bytes:
        return bytes(export.export(jax.jit(program), platforms=PLATFORMS)(*shapes).serialize(vjp_order=derivatives))

    try:
        return serialized(forward)
    except Exception as error:  # raised by the network's own code, for example where it needs the batch size
        first = error
    try:
        return serialized(jax.vmap(lambda *of: forward(*of[:-1], of[-1][None])[0], (*[None] * len(arguments), 0)))
    except Exception:
        raise InputError(
            f"an exported program has a free batch axis; the network {name} cannot ({summary(first)}): "
            "process each example independently, with JAX operations only"
        ) from None
