"""Latency of a network on this machine. Milliseconds."""

import numpy as np

from ev3_distill.runtime.compile import jit
from ev3_distill.runtime.timing import PASSES, times_ms
from ev3_distill.types import Network, Variables


def passes_ms(network: Network, variables: Variables, example: np.ndarray, *, passes: int = PASSES) -> np.ndarray:
    """Times forward passes on one example, each from an array on the host to logits on the host.

    The program is compiled and warmed up before the first timed pass.

    Args:
      network: in evaluation mode.
      variables: the network's.
      example: one example, without the batch axis.
      passes: number of timed passes.

    Returns:
      Milliseconds [passes].
    """
    forward = jit(lambda variables, inputs: network.apply(variables, inputs, train=False)[0])
    inputs = np.asarray(example)[None]
    return times_ms(lambda: np.asarray(forward(variables, inputs)), passes=passes)
