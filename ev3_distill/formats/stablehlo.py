"""StableHLO: a traced program as jax.export writes it, for CPU, CUDA and TPU, with a free batch axis."""

from collections.abc import Callable

import jax
from jax import export

from ev3_distill.errors import InputError
from ev3_distill.formats.graph import BATCH

PLATFORMS = ("cpu", "cuda", "tpu")


def program_of(forward: Callable[[jax.Array], jax.Array], example: jax.ShapeDtypeStruct, *, name: str) -> bytes:
    """What `jax.export.deserialize` reads.

    Args:
      forward: of inputs [B, ...] to outputs [B, K], pure.
      example: one example, without the batch axis.
      name: of the network, for errors.

    Raises:
      InputError: the network asks for what such a file cannot hold.
    """
    (batch,) = export.symbolic_shape(BATCH)
    try:
        made = export.export(jax.jit(forward), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct((batch, *example.shape), example.dtype)
        )
        return bytes(made.serialize())
    except Exception as error:  # of the network's own code too, where it asks for the batch's size
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"a StableHLO file has a free batch axis; the network {name} cannot ({type(error).__name__}: {reason}): ask for "
            "x.shape[0] where it asks for len(x), or export it by --format flax, which can"
        ) from None
