"""Stateless shuffling: every epoch visits each row at most once, in an order that depends on seed and step alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.data import shuffle as order_module
from ev3_distill.data.shuffle import batch_rows, epoch_of, make_order, steps_per_epoch
from ev3_distill.errors import InputError

SEEDS = st.integers(0, 2**40)


def epochs_of(n, batch_size, seed, *, first=0, count=1):
    """Rows of epochs, [count, batches, batch_size]."""
    m = max(n // batch_size, 1)
    steps = jnp.arange(first * m, (first + count) * m)
    many = jax.vmap(functools.partial(batch_rows, batch_size=batch_size), in_axes=(None, 0))
    return np.asarray(jax.jit(many)(make_order(n, seed), steps)).reshape(count, m, batch_size)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 400), st.integers(1, 130), SEEDS, st.integers(0, 5000))
def test_an_epoch_visits_a_row_at_most_once(n, batch_size, seed, first):
    epochs = epochs_of(n, batch_size, seed, first=first, count=3)
    assert epochs.dtype == np.int32
    assert epochs.min() >= 0
    assert epochs.max() < n
    for epoch in epochs:
        visits = np.bincount(epoch.ravel(), minlength=n)
        if batch_size <= n:
            assert visits.max() == 1
            assert visits.sum() == n // batch_size * batch_size
        else:  # one batch that repeats rows
            assert visits.max() - visits.min() <= 1


@pytest.mark.parametrize("n", [65_537, 1_200_000, 10_000_000])
def test_large_splits_do_not_overflow(n):
    # A product that wraps at 2**32 would send two positions to one row.
    epochs = epochs_of(n, 1000, 1, first=70, count=2)
    for epoch in epochs:
        visits = np.bincount(epoch.ravel(), minlength=n)
        assert visits.max() == 1
        assert visits.sum() == n // 1000 * 1000
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize("n", [*range(1, 200), 65_536, 1_200_000, 2**30, 2**31 - 1])
def test_multipliers_are_coprime_and_cannot_overflow(n):
    multipliers = order_module._multipliers(n, np.random.default_rng(0)).tolist()
    assert 1 <= len(multipliers) <= 64
    assert len(set(multipliers)) == len(multipliers)
    for a in multipliers:
        assert np.gcd(a, n) == 1
        assert a >= 1
        assert a * (n - 1) + (n - 1) < 2**32


def test_epochs_regroup_like_true_reshuffling():
    n, batch_size, count = 900, 64, 64
    together = {}
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(n)[: n // 64 * 64].reshape(-1, 64) for _ in range(count)])
    ordered = epochs_of(n, batch_size, 0, count=count)
    for name, epochs in {"order": ordered, "shuffle": shuffled}.items():
        member = np.zeros((n, epochs.shape[0] * epochs.shape[1]), np.float32)
        for i, batch in enumerate(epochs.reshape(-1, batch_size)):
            member[batch, i] = 1
        together[name] = (member @ member.T)[np.triu_indices(n, 1)]  # number of batches that a pair shares
    assert together["order"].mean() == together["shuffle"].mean()
    assert 0.8 < together["order"].std() / together["shuffle"].std() < 1.1


def test_every_epoch_leaves_out_other_rows():
    n, batch_size = 100, 48
    epochs = epochs_of(n, batch_size, 0, count=200)
    visits = np.bincount(epochs.ravel(), minlength=n)
    assert visits.min() > 180  # 192 expected; 0 for a row that is always left out


def test_order_depends_on_seed_and_step_alone():
    first, again, other = (epochs_of(500, 32, seed, count=4) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(np.sort(first[0]), np.sort(first[1]))


def test_rows_are_the_same_under_jit_in_a_loop_and_eagerly():
    fifty = make_order(50, 5)
    of_step = functools.partial(batch_rows, batch_size=8)

    @jax.jit
    def loop(order_, first):
        def body(i, seen):
            return seen.at[i].set(of_step(order_, first + i))

        return jax.lax.fori_loop(0, 20, body, jnp.zeros((20, 8), jnp.int32))

    eager = np.stack([of_step(fifty, jnp.int32(step)) for step in range(13, 33)])
    np.testing.assert_array_equal(loop(fifty, jnp.int32(13)), eager)
    np.testing.assert_array_equal(np.stack([of_step(fifty, step) for step in range(13, 16)]), eager[:3])
    epochs = [int(epoch_of(fifty, jnp.int32(step), batch_size=8)) for step in range(13)]
    assert epochs == [0] * 6 + [1] * 6 + [2]
    assert steps_per_epoch(50, 8) == 6
    assert steps_per_epoch(5, 8) == 1


def test_orders_of_one_size_share_a_program():
    compiled = jax.jit(functools.partial(batch_rows, batch_size=8)).lower(make_order(50, 0), np.int32(0)).compile()
    assert not np.array_equal(compiled(make_order(50, 1), np.int32(3)), compiled(make_order(50, 2), np.int32(3)))


@pytest.mark.parametrize("n", [0, 2**31])
def test_a_number_of_rows_out_of_range_is_refused(n):
    with pytest.raises(InputError, match=f"a shuffled split needs 1 to .* rows; got {n}"):
        make_order(n, 0)
