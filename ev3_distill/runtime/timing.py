"""Timing of repeated calls. Milliseconds.

Imports NumPy alone: a process that runs an exported file reads this module from its path, without the package.
"""

import math
import time
from collections.abc import Callable

import numpy as np

PASSES, WARM_UP = 301, 30
MIN_PASSES = 3  # however slow a call is


def times_ms(
    call: Callable[[], object], *, passes: int = PASSES, warm_up: int = WARM_UP, seconds: float = math.inf
) -> np.ndarray:
    """Times repeated calls.

    Args:
      call: the function to time.
      passes: number of timed calls.
      warm_up: calls before the first timed one.
      seconds: time limit. When it has passed, warm-up ends and timing stops after at least `MIN_PASSES` calls.

    Returns:
      Milliseconds [passes], or fewer entries where the time limit was reached.
    """
    times, ends = list[float](), time.perf_counter() + seconds
    for i in range(-warm_up, passes):
        start = time.perf_counter()
        if start > ends:
            if i < 0:
                continue
            if len(times) >= MIN_PASSES:
                break
        call()
        if i >= 0:
            times.append(time.perf_counter() - start)
    return 1000 * np.array(times)


def quantiles(times: np.ndarray) -> dict[str, float]:
    """Median and 99th percentile of times [n] in milliseconds, and their number."""
    median, rare = np.quantile(times, (0.5, 0.99))
    return {"p50": float(median), "p99": float(rare), "passes": len(times)}
