"""A flax network as a teacher: a run's student, or one that `ev3-distill teach` trained."""

from collections.abc import Callable

import jax
import numpy as np

from ev3_distill.types import Network, Variables


def flax_teacher(
    network: Network, variables: Variables, *, batch_size: int = 1024
) -> Callable[[np.ndarray], np.ndarray]:
    """The network's logits as a function of NumPy inputs [N, ...] -> [N, K] float32, in chunks of `batch_size`."""
    forward = jax.jit(lambda inputs: network.apply(variables, inputs, train=False)[0])

    def logits(inputs: np.ndarray) -> np.ndarray:
        starts = range(0, len(inputs), batch_size)
        return np.concatenate([np.asarray(forward(inputs[i : i + batch_size])) for i in starts])

    return logits
