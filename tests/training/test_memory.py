"""Memory limits of a run."""

import numpy as np

from ev3_distill.data.sources import Dataset
from ev3_distill.training import memory


def dataset(rows, shape=(10, 10)):
    inputs = np.zeros((rows, *shape), np.uint8)
    return Dataset(inputs, np.zeros(rows, np.int32), 2, ("a", "b"), None, "zeros", "0")


def test_dataset_is_limited_to_a_quarter_of_the_memory_limit():
    data = dataset(100)  # 10,000 bytes
    assert memory.dataset_limit(40_000) == 10_000
    assert memory.fits(data, 40_000) and not memory.fits(data, 39_999)
    assert not memory.fits(data, 40_000, teacher_bytes=1)


def test_window_is_limited_to_a_128th_of_the_memory_limit_and_256_steps():
    data, batch_size = dataset(100), 10  # 1,000 bytes a step
    assert memory.window_steps(data, 128 * 7_000, batch_size) == 7
    assert memory.window_steps(data, 128 * 999, batch_size) == 1
    assert memory.window_steps(data, 2**40, batch_size) == 256
