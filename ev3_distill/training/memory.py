"""Memory limits: how much of a data set is held in memory, and how many examples one forward pass takes."""

import contextlib
import ctypes
import math
import os
import sys

import numpy as np

from ev3_distill.config import parse_bytes
from ev3_distill.data.sources import Dataset

DATA_PART = 4  # a data set in memory takes at most limit // DATA_PART
WINDOW_PART = 128  # a window takes limit // WINDOW_PART; three exist at once: in training, in preparation, read ahead
WINDOW_STEPS = 256  # largest number of steps of a window
PASS_PART = 512  # inputs of a forward pass take limit // PASS_PART; activations are many times larger
M_MMAP_THRESHOLD, RETURNED_BYTES = -3, 4 * 2**20  # of malloc.h; blocks from this size on go back to the system


def memory_limit(memory: str) -> int:
    """The memory limit in bytes: as configured, or half of this machine's memory."""
    configured = parse_bytes(memory)
    return configured or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def return_freed_memory(memory: str) -> None:
    """If a limit is configured, makes freed memory return to the system at once; glibc keeps blocks under 32 MB."""
    if memory and sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another libc
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)


def dataset_limit(memory: int) -> int:
    """Bytes that a data set's inputs may take to be kept in memory."""
    return memory // DATA_PART


def example_bytes(dataset: Dataset) -> int:
    """Size of one input."""
    return math.prod(dataset.inputs.shape[1:]) * dataset.inputs.dtype.itemsize


def input_bytes(dataset: Dataset) -> int:
    """Size of all inputs."""
    return len(dataset.inputs) * example_bytes(dataset)


def fits(dataset: Dataset, memory: int, teacher_bytes: int = 0) -> bool:
    """Whether a data set may be whole on the host and on the device, which leaves half of the limit to everything else.

    Args:
      dataset: in memory or on disk.
      memory: the limit, bytes.
      teacher_bytes: size of the teacher's features on it.
    """
    return isinstance(dataset.inputs, np.ndarray) and input_bytes(dataset) + teacher_bytes <= dataset_limit(memory)


def window_steps(dataset: Dataset, memory: int, batch_size: int) -> int:
    """Steps of one window of a data set that does not fit, at least 1."""
    return min(max(memory // WINDOW_PART // (batch_size * example_bytes(dataset)), 1), WINDOW_STEPS)


def eval_batch_size(dataset: Dataset, memory: int, most: int) -> int:
    """Examples of one forward pass in evaluation: `most`, or as many as the memory limit allows, at least 8."""
    return min(most, max(8, memory // PASS_PART // (4 * math.prod(dataset.inputs.shape[1:]))))
