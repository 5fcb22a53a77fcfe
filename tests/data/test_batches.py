"""Pools: a data set divided into batches on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill.data.batches import split
from ev3_distill.data.sources import load_data
from ev3_distill.data.splits import SPLITS, split_rows
from ev3_distill.errors import InputError


def test_split_carries_examples_by_index():
    digits = load_data("digits")
    logits = np.random.default_rng(0).normal(size=(1797, 10)).astype(np.float32)
    pools, test = split(digits, logits, seed=0)
    rows = split_rows(digits.labels, None, seed=0)
    examples = pools.explore.examples
    assert examples.teacher["logits"].shape == (1, len(rows["explore"]), 10)
    examples = examples._replace(teacher={"logits": examples.teacher["logits"][0]})
    for name, batch in zip(SPLITS, (examples, pools.assess, pools.decide, test), strict=True):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
        assert (batch.targets.dtype, batch.index.dtype, batch.weight.dtype) == (jnp.int32, jnp.int32, jnp.float32)
        np.testing.assert_array_equal(batch.index, rows[name])
        np.testing.assert_array_equal(batch.inputs, digits.inputs[rows[name]])
        np.testing.assert_array_equal(batch.targets, digits.labels[rows[name]])
        np.testing.assert_array_equal(batch.teacher["logits"], logits[rows[name]])
        np.testing.assert_array_equal(batch.weight, np.ones(len(rows[name])))
    assert sorted(pools.explore.order.base.tolist()) == list(range(len(rows["explore"])))


def test_split_refuses_foreign_or_broken_logits():
    digits = load_data("digits")
    with pytest.raises(InputError, match=r"\[1797, 10\]; got \[1797, 9\]"):
        split(digits, np.zeros((1797, 9), np.float32), seed=0)
    logits = np.zeros((1797, 10), np.float32)
    logits[41, 3] = np.nan
    with pytest.raises(InputError, match="must be finite; got nan or infinity in row 41"):
        split(digits, logits, seed=0)
