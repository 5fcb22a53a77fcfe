"""Tests that pin the constants of evolution strategies by their effect."""

import jax
import jax.numpy as jnp
import pytest

from ev3_distill.evolution.noise import full_rank
from ev3_distill.evolution.population import _default_chunk

CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the limit differs by backend")


@CPU
@pytest.mark.parametrize(("size", "pairs"), [(2**10, 85), (2**16, 1)])
def test_default_chunk_fits_in_one_mebibyte(size, pairs):
    """A pair stores its noise and two members: 12 bytes per parameter."""
    mean = {"x": jnp.zeros(size)}
    assert _default_chunk(mean, full_rank(mean)) == pairs


@CPU
def test_convolution_kernels_are_evaluated_one_pair_at_a_time_on_cpu():
    mean = {"kernel": jnp.zeros((3, 3, 1, 1))}
    assert _default_chunk(mean, full_rank(mean)) == 1
