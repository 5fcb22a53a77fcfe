"""Pools: a data set divided into batches on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill.data.augment import Augmentation
from ev3_distill.data.batches import resident, sampler, split
from ev3_distill.data.sources import load_data
from ev3_distill.data.splits import SPLITS, split_rows
from ev3_distill.errors import InputError


def test_split_carries_examples_by_index():
    digits = load_data("digits")
    logits = np.random.default_rng(0).normal(size=(1797, 10)).astype(np.float32)
    pools, test = split(digits, logits, seed=0)
    rows = split_rows(digits.labels, None, seed=0)
    n = len(rows["explore"])
    rows["three"] = np.concatenate([rows[name] for name in SPLITS[:3]])
    alone, _ = split(digits, logits, seed=0, final=False)
    explored, three = (one.explore.examples for one in (alone, pools))
    assert (explored.teacher["logits"].shape, three.teacher["logits"].shape) == (
        (1, n, 10),
        (1, len(rows["three"]), 10),
    )
    explored, three = (one._replace(teacher={"logits": one.teacher["logits"][0]}) for one in (explored, three))
    parts = (explored, pools.assess, pools.decide, test, three)
    for name, batch in zip((*SPLITS, "three"), parts, strict=True):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
        assert (batch.targets.dtype, batch.index.dtype, batch.weight.dtype) == (jnp.int32, jnp.int32, jnp.float32)
        np.testing.assert_array_equal(batch.index, rows[name])
        np.testing.assert_array_equal(batch.inputs, digits.inputs[rows[name]])
        np.testing.assert_array_equal(batch.targets, digits.labels[rows[name]])
        np.testing.assert_array_equal(batch.teacher["logits"], logits[rows[name]])
        np.testing.assert_array_equal(batch.weight, np.ones(len(rows[name])))
    assert alone.explore.final_order == ()
    for order, number in (
        (pools.explore.order, n), (alone.explore.order, n), (pools.explore.final_order, len(rows["three"]))
    ):  # fmt: skip
        assert sorted(order.base.tolist()) == list(range(number))


N, HELD_OUT, B = 30, 13, 4
PER_EPOCH, PER_FINAL_EPOCH = N // B, (N + HELD_OUT) // B


def make_pool(*, has_final, dtype=np.uint8):
    """Rows of explore are below 100 in every pixel, held-out rows are not."""
    rng, n = np.random.default_rng(0), N + HELD_OUT if has_final else N
    inputs = rng.integers(0, 100, (N + HELD_OUT, 5, 6, 1)).astype(dtype)
    inputs[N:] += 100
    index = rng.permutation(90)[: N + HELD_OUT]
    labels, logits = index % 4, rng.normal(size=(1, N + HELD_OUT, 4)).astype(np.float32)
    return resident(
        inputs[:n], labels[:n], index[:n], {"logits": logits[:, :n]}, seed=3, explored=N if has_final else None
    )


@pytest.mark.parametrize("augmentation", [None, Augmentation(translate=1), Augmentation(mix="mixup", flip=True)])
def test_batches_before_a_final_phase_are_those_of_a_run_without_one(augmentation):
    sample = jax.jit(sampler(batch_size=B, views=3, augmentation=augmentation))
    without, having = (make_pool(has_final=has_final) for has_final in (False, True))
    for step in range(4 * PER_EPOCH):
        wanted = sample(without, jnp.int32(step))
        for final in ((), jnp.bool_(False)):  # () as a library user has it, False as a run sets it
            jax.tree.map(np.testing.assert_array_equal, sample(having._replace(final=final), jnp.int32(step)), wanted)
        assert wanted.inputs.max() < 100  # no part of a held-out row


def test_every_row_is_visited_in_an_epoch_of_the_final_phase():
    sample = jax.jit(sampler(batch_size=B, views=3, augmentation=Augmentation(mix="mixup")))
    pool = make_pool(has_final=True)._replace(final=jnp.bool_(True))
    first = 2 * PER_FINAL_EPOCH
    found = [sample(pool, jnp.int32(step)) for step in range(first, first + PER_FINAL_EPOCH)]
    visited = np.concatenate([batch.index for batch in found]).tolist()
    assert len(set(visited)) == len(visited) == PER_FINAL_EPOCH * B
    missing = set(pool.examples.index.tolist()) - set(visited)
    assert len(missing) == (N + HELD_OUT) % B and set(visited) <= set(pool.examples.index.tolist())
    explored = set(pool.examples.index[:N].tolist())
    mixed_in = [batch.inputs.max((1, 2, 3))[np.isin(batch.index, list(explored))] for batch in found]
    assert np.concatenate(mixed_in).max() >= 100  # an example of explore with a held-out partner


def test_split_refuses_foreign_or_broken_logits():
    digits = load_data("digits")
    with pytest.raises(InputError, match=r"\[1797, 10\]; got \[1797, 9\]"):
        split(digits, np.zeros((1797, 9), np.float32), seed=0)
    logits = np.zeros((1797, 10), np.float32)
    logits[41, 3] = np.nan
    with pytest.raises(InputError, match="must be finite; got nan or infinity in row 41"):
        split(digits, logits, seed=0)
