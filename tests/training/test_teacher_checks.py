"""Checks of a teacher before training."""

import pytest

from ev3_distill.training.teacher_checks import sample_size


@pytest.mark.parametrize(
    ("memory", "bytes_each", "examples"),
    [
        (2**30, 3072, 4096),  # at most 4096, even with plenty of memory
        (32 * 1000 * 3072, 3072, 1000),  # a 32nd of the memory limit
        (2**20, 2**20, 1),  # at least one
    ],
)
def test_sample_size_of_the_diagnosis_follows_the_memory_limit(memory, bytes_each, examples):
    assert sample_size(memory, bytes_each) == examples
