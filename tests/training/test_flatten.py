"""A flattened tree is restored bit for bit, under jit and on the host, for all dtypes and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ev3_distill.training.flatten import Flattening

DTYPES = (np.float32, np.int32, np.uint32, np.bool_, np.float16)
leaves = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.sampled_from([(), (0,), (3,), (2, 1, 2)]).flatmap(lambda shape: arrays(dtype, shape))
)
trees = st.recursive(leaves, lambda inner: st.lists(inner, min_size=1, max_size=3).map(tuple), max_leaves=6)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (got, want)), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@settings(deadline=None, max_examples=30)
@given(trees)
def test_unflatten_restores_every_tree_bit_for_bit(tree):
    tree = jax.tree.map(jnp.asarray, tree)
    flattening = Flattening(tree)
    flat = flattening.flatten(tree)
    kinds = [vector.dtype for vector in flat]
    assert len(kinds) == len(set(kinds)) == len({leaf.dtype for leaf in jax.tree.leaves(tree)})
    assert all(vector.ndim == 1 for vector in flat)
    assert_same_bits(flattening.unflatten(flat), tree)
    assert_same_bits(flattening.unflatten(jax.device_get(flat)), tree)


def test_flattening_from_shapes_works_under_jit():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.int32(7), jnp.array([True, False])), "c": jnp.float32(0.5)}
    flattening = Flattening(jax.eval_shape(lambda: tree))
    assert_same_bits(jax.jit(flattening.unflatten)(jax.jit(flattening.flatten)(tree)), tree)
