"""Plateau: when a student counts as stuck, growth of a stuck student, and pauses of a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill import students
from ev3_distill.arms import arms_named
from ev3_distill.config import EV3
from ev3_distill.core import plateau
from ev3_distill.data import batches
from ev3_distill.data.batches import held_out
from ev3_distill.data.sources import load_data
from ev3_distill.students.growth import growth_map
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Evidence

N = 400


def scores_of(count):
    """Scores [N] of a student that is right on the first `count` examples."""
    return jnp.where(jnp.arange(N) < count, 1.0, 0.0)


def plateau_before(assess=200, seen=200, position=100, until=plateau.NO_END, stuck=False):
    scores = scores_of(assess)
    start = plateau.start_plateau(Evidence(scores, scores), scores_of(seen), jnp.int32(position))
    return start._replace(until=jnp.int32(until), stuck=jnp.bool_(stuck))


def plateau_after(progress, *, assess, seen=200, position, cost=400, promoted=False, patience=50):
    scores = scores_of(assess)
    return plateau.update_plateau(
        progress,
        Evidence(scores, scores),
        lambda: scores_of(seen),
        ruling=jnp.int32(-1),
        position=jnp.int32(position),
        cost=jnp.int32(cost),
        promoted=jnp.bool_(promoted),
        patience=jnp.float32(patience),
    )


@pytest.mark.parametrize(
    ("case", "stuck", "since"),
    [
        ({"assess": 201, "position": 140}, False, 100),  # no significant gain yet, within patience
        ({"assess": 201, "position": 151}, True, 100),  # patience has run out
        ({"assess": 205, "position": 151}, False, 151),  # 5 examples gained, none lost: 2.2 standard errors
        ({"assess": 203, "position": 151}, True, 100),  # 3 gained: 1.7 standard errors
        ({"assess": 190, "position": 151, "promoted": True}, False, 151),  # a promotion restarts patience
        ({"assess": 201, "seen": 230, "position": 151}, False, 151),  # progress on seen examples restarts patience
        ({"assess": 201, "seen": 170, "position": 151}, True, 100),
    ],
)
def test_stuck_and_start_of_patience_agree_with_hand_computation(case, stuck, since):
    updated = plateau_after(plateau_before(), **case)
    assert (bool(updated.stuck), int(updated.position)) == (stuck, since)


def test_small_gains_add_up_to_progress():
    """Gains that are each too small to be significant are compared with the last significant one, so they add up."""
    progress = plateau_before()
    for i, count in enumerate((202, 204, 206, 208, 210, 212)):
        progress = plateau_after(progress, assess=count, position=140 + 40 * i)
        assert not bool(progress.stuck)
    assert int(progress.assess.promise.sum()) == 212


def test_progress_on_seen_examples_leaves_the_reference_on_assess():
    updated = plateau_after(plateau_before(), assess=203, seen=230, position=151)
    assert int(updated.assess.promise.sum()) == 200
    assert int(updated.seen.sum()) == 230


def test_student_is_stuck_at_the_end_of_its_share_of_the_budget():
    """This holds whatever the gain on assess, except in an iteration with a promotion."""
    progress = plateau_before(until=401)
    assert not bool(plateau_after(progress, assess=300, position=110).stuck)
    assert bool(plateau_after(progress, assess=300, position=110, cost=401).stuck)
    promoted = plateau_after(progress, assess=300, position=110, cost=401, promoted=True)
    assert not bool(promoted.stuck)
    assert bool(plateau_after(promoted, assess=300, position=120, cost=410).stuck)


def test_stuck_student_stays_stuck():
    assert bool(plateau_after(plateau_before(stuck=True), assess=300, position=110).stuck)


@functools.cache
def digits_runs():
    dataset = load_data("digits")
    logits = (5 * np.eye(10)[dataset.labels]).astype(np.float32)
    pools, _ = batches.split(dataset, logits, seed=0)
    rows = np.arange(270)
    seen = held_out(np.asarray(dataset.inputs)[rows], dataset.labels[rows], rows, {"logits": logits[rows]})
    pools = pools._replace(seen=seen)
    runs = {}
    for hidden in (3, 6):
        network = students.from_name(f"mlp:hidden={hidden}", (8, 8, 1), 10)
        config = EV3(patience=6.0, length=10)
        runs[hidden] = network, Distillation(network, arms_named(network.apply, ("ce", "kd2")), config=config)
    return pools, runs


def test_stuck_run_closes_early_and_retains_error_budget():
    pools, runs = digits_runs()
    state = runs[3][1].complete(pools, 0, budget=100_000)
    assert bool(state.closed)
    assert bool(state.plateau.stuck)
    assert int(state.clock.cost) < 50_000
    assert float(state.budget.left) > 0


def test_growth_retains_scores_and_counters_and_the_run_continues():
    """A grown student has the same scores, error budget and costs, and then improves beyond the small one."""
    pools, runs = digits_runs()
    (small, small_run), (large, distillation) = runs[3], runs[6]
    state = small_run.complete(pools, 4, budget=100_000)
    growth = growth_map(jax.random.key(0), small.spec, large.spec)
    grown = distillation.grow(pools, state, growth)
    template = distillation.shapes(pools)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), grown) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), template
    )
    for student in ("current", "champion"):
        scores = distillation.evaluator.evaluate(getattr(grown, student).variables, pools.decide).promise
        same = small_run.evaluator.evaluate(getattr(state, student).variables, pools.decide).promise
        assert float(jnp.abs(scores - same).sum()) <= 1  # rounding may flip a near tie

    def retained(of):
        return of.clock.cost, of.clock.position, of.budget, of.champion.decide, of.arms.cost, of.arms.leader

    jax.tree.map(np.testing.assert_array_equal, retained(grown), retained(state))
    assert not bool(grown.closed)
    assert not bool(grown.plateau.stuck)
    *_, (final, _) = distillation.loop(pools, grown, budget=int(grown.clock.cost) + 4000)
    assert float(final.champion.decide.mean()) > float(state.champion.decide.mean()) + 0.05


def test_pauses_do_not_change_the_result():
    pools, runs = digits_runs()
    _, distillation = runs[6]
    *_, (whole, _) = distillation.loop(pools, distillation.begin(pools, 1), budget=800)
    state = distillation.begin(pools, 1)
    for pause in (100, 101, 350, 2**30):
        for after, decisions in distillation.loop(pools, state, budget=800, pause=pause):
            state = after
            assert all(int(one.position) < pause for one in decisions[:-1])
        assert int(state.clock.position) >= pause or bool(state.closed)
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_patience_requires_seen_examples():
    pools, runs = digits_runs()
    with pytest.raises(TypeError, match=r"needs a part of explore in pools.seen; got None"):
        runs[3][1].begin(pools._replace(seen=None), 0)
