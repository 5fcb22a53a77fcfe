"""How long a network takes for a batch, on this machine as it is now. Milliseconds."""

import math
import time
from collections.abc import Callable

import numpy as np

from ev3_distill.runtime.compile import jit
from ev3_distill.types import Network, Variables

PASSES, WARM_UP = 301, 30
LEAST = 3  # passes, however slow


def times_ms(
    call: Callable[[], object], *, passes: int = PASSES, warm_up: int = WARM_UP, seconds: float = math.inf
) -> np.ndarray:
    """Times of a call, once it has been made some times: `passes` of them, or as many as `seconds` have room for."""
    times, ends = list[float](), time.perf_counter() + seconds
    for i in range(-warm_up, passes):
        began = time.perf_counter()
        if began > ends:
            if i < 0:
                continue
            if len(times) >= LEAST:
                break
        call()
        if i >= 0:
            times.append(time.perf_counter() - began)
    return 1000 * np.array(times)


def passes_ms(network: Network, variables: Variables, example: np.ndarray, *, passes: int = PASSES) -> np.ndarray:
    """Times [passes] of forward passes on one example [...], each from an array on the host to logits on the host.

    The program is compiled, and has run WARM_UP times, before the first of them.
    """
    forward = jit(lambda variables, inputs: network.apply(variables, inputs, train=False)[0])
    inputs = np.asarray(example)[None]
    return times_ms(lambda: np.asarray(forward(variables, inputs)), passes=passes)


def summary(times: np.ndarray) -> dict[str, float]:
    """Quantiles of some times, and how many there are."""
    median, rare = np.quantile(times, (0.5, 0.99))
    return {"p50": float(median), "p99": float(rare), "passes": len(times)}
