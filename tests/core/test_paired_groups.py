"""Paired tests where examples are not independent: they bet on the mean scores of groups."""

import jax.numpy as jnp
import numpy as np

from ev3_distill.core.paired_tests import betting, means_of_units, suitable_test
from ev3_distill.data.batches import held_out


def test_copies_of_an_example_are_one_piece_of_evidence():
    rng = np.random.default_rng(0)
    candidate, champion = (jnp.asarray((rng.random(20) < p).astype(np.float32)) for p in (0.9, 0.4))
    unit = jnp.repeat(jnp.arange(20), 10)
    wins, losses, p_value = suitable_test(binary=True, unit=unit)(candidate[unit], champion[unit])
    expected = betting(candidate, champion)
    assert (int(wins), int(losses)) == (int(expected[0]), int(expected[1]))
    np.testing.assert_allclose(p_value, expected[2], rtol=1e-4)
    assert float(suitable_test(binary=True)(candidate[unit], champion[unit])[2]) < 1e-9


def test_small_units_are_tested_by_one_example_each():
    candidate, champion = jnp.array([1.0, 1, 1, 1, 1, 0]), jnp.array([0.0, 0, 0, 0, 0, 1])
    test = suitable_test(binary=True, unit=jnp.array([0, 1, 2, 3, 4, 4]), lone=jnp.array([0, 1, 2, 3, 5]))
    wins, losses, p_value = test(candidate, champion)
    assert (int(wins), int(losses)) == (4, 1)
    np.testing.assert_allclose(p_value, 6 / 32, rtol=1e-3)


def test_means_of_units_by_hand():
    means = means_of_units(jnp.array([1.0, 0.0, 1.0, 1.0, 0.0]), jnp.array([1, 1, 0, 2, 2]))
    np.testing.assert_allclose(means, [1.0, 0.5, 0.5, 0, 0])


def test_a_batch_is_reduced_to_one_example_of_each_unit():
    batch = held_out(np.zeros((5, 2), np.float32), np.arange(5), np.arange(5), {}, units=np.array([1, 1, 0, 2, 2]))
    outputs, alone = batch.one_per_unit(jnp.arange(10.0).reshape(5, 2))
    np.testing.assert_array_equal(alone.targets, [2, 0, 3])
    np.testing.assert_array_equal(outputs[:, 0], [4.0, 0.0, 6.0])
    assert alone.one_per_unit(outputs)[1] is alone
