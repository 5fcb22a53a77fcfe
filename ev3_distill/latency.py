"""How long a student takes for one example, on this machine as it is now. Milliseconds."""

import time

import numpy as np

from ev3_distill.compiling import jit
from ev3_distill.types import Network, Variables

PASSES, WARM_UP = 301, 30


def passes_ms(network: Network, variables: Variables, example: np.ndarray, *, passes: int = PASSES) -> np.ndarray:
    """Times [passes] of forward passes on one example [...], each from an array on the host to logits on the host.

    The program is compiled, and has run WARM_UP times, before the first of them.
    """
    forward = jit(lambda variables, inputs: network.apply(variables, inputs, train=False)[0])
    inputs = np.asarray(example)[None]
    times = np.empty(passes)
    for i in range(-WARM_UP, passes):
        began = time.perf_counter()
        np.asarray(forward(variables, inputs))
        times[max(i, 0)] = time.perf_counter() - began
    return 1000 * times
