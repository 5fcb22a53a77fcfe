"""When a student is stuck at its size, by hand; and that what goes on from there has what it had."""

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


def right(count):
    """Scores of a student who has that many of N right, always the first."""
    return jnp.where(jnp.arange(N) < count, 1.0, 0.0)


def before(assess=200, seen=200, position=100, until=plateau.NO_END, stuck=False):
    scores = right(assess)
    begun = plateau.start_plateau(Evidence(scores, scores), right(seen), jnp.int32(position))
    return begun._replace(until=jnp.int32(until), stuck=jnp.bool_(stuck))


def after(progress, *, assess, seen=200, position, cost=400, promoted=False, patience=50):
    scores = right(assess)
    return plateau.update_plateau(
        progress,
        Evidence(scores, scores),
        lambda: right(seen),
        ruling=jnp.int32(-1),
        position=jnp.int32(position),
        cost=jnp.int32(cost),
        promoted=jnp.bool_(promoted),
        patience=jnp.float32(patience),
    )


@pytest.mark.parametrize(
    ("case", "stuck", "since"),
    [
        ({"assess": 201, "position": 140}, False, 100),  # nothing shown yet, within patience
        ({"assess": 201, "position": 151}, True, 100),  # and past it
        ({"assess": 205, "position": 151}, False, 151),  # five more, none fewer: 2.2 standard errors
        ({"assess": 203, "position": 151}, True, 100),  # three more: 1.7
        ({"assess": 190, "position": 151, "promoted": True}, False, 151),  # a winner: never stuck in its iteration
        ({"assess": 201, "seen": 230, "position": 151}, False, 151),  # training still gets somewhere: as long again
        ({"assess": 201, "seen": 170, "position": 151}, True, 100),
    ],
)
def test_stuck_by_hand(case, stuck, since):
    made = after(before(), **case)
    assert (bool(made.stuck), int(made.position)) == (stuck, since)


def test_progress_adds_up():
    """Small steps, none of which shows by itself, are progress from where the last one was."""
    progress = before()
    for i, count in enumerate((202, 204, 206, 208, 210, 212)):
        progress = after(progress, assess=count, position=140 + 40 * i)
        assert not bool(progress.stuck)
    assert int(progress.assess.promise.sum()) == 212


def test_what_training_shows_does_not_move_the_mark_on_assess():
    made = after(before(), assess=203, seen=230, position=151)
    assert int(made.assess.promise.sum()) == 200
    assert int(made.seen.sum()) == 230


def test_a_share_of_the_budget_ends():
    """Whatever assess shows; but not in an iteration with a promotion."""
    progress = before(until=401)
    assert not bool(after(progress, assess=300, position=110).stuck)
    assert bool(after(progress, assess=300, position=110, cost=401).stuck)
    made = after(progress, assess=300, position=110, cost=401, promoted=True)
    assert not bool(made.stuck)
    assert bool(after(made, assess=300, position=120, cost=410).stuck)


def test_stuck_stays():
    assert bool(after(before(stuck=True), assess=300, position=110).stuck)


@functools.cache
def world():
    dataset = load_data("digits")
    logits = (5 * np.eye(10)[dataset.labels]).astype(np.float32)
    pools, _ = batches.split(dataset, logits, seed=0)
    rows = np.arange(270)
    seen = held_out(np.asarray(dataset.inputs)[rows], dataset.labels[rows], rows, {"logits": logits[rows]})
    pools = pools._replace(seen=seen)
    made = {}
    for hidden in (3, 6):
        network = students.from_name(f"mlp:hidden={hidden}", (8, 8, 1), 10)
        config = EV3(patience=6.0, length=10)
        made[hidden] = network, Distillation(network, arms_named(network.apply, ("ce", "kd2")), config=config)
    return pools, made


def test_a_stuck_run_closes_before_its_budget_and_keeps_some_error_budget():
    pools, made = world()
    state = made[3][1].complete(pools, 0, budget=100_000)
    assert bool(state.closed)
    assert bool(state.plateau.stuck)
    assert int(state.clock.cost) < 50_000
    assert float(state.budget.left) > 0


def test_a_grown_run_goes_on():
    """The same scores, what was proven and what is left; and the larger student then gets further."""
    pools, made = world()
    (small, before_), (large, distillation) = made[3], made[6]
    state = before_.complete(pools, 0, budget=100_000)
    map_ = growth_map(jax.random.key(0), small.spec, large.spec)
    grown = distillation.grow(pools, state, map_)
    template = distillation.shapes(pools)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), grown) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), template
    )
    for student in ("current", "champion"):
        scores = distillation.evaluator.evaluate(getattr(grown, student).variables, pools.decide).promise
        same = before_.evaluator.evaluate(getattr(state, student).variables, pools.decide).promise
        assert float(jnp.abs(scores - same).sum()) <= 1  # a near tie may fall the other way

    def retained(of):
        return of.clock.cost, of.clock.position, of.budget, of.champion.decide, of.arms.cost, of.arms.leader

    jax.tree.map(np.testing.assert_array_equal, retained(grown), retained(state))
    assert not bool(grown.closed)
    assert not bool(grown.plateau.stuck)
    *_, (packed, _) = distillation.loop(pools, grown, budget=int(grown.clock.cost) + 4000)
    further = distillation.loop.unflatten(packed)
    assert float(further.champion.decide.mean()) > float(state.champion.decide.mean()) + 0.05


def test_a_pause_changes_nothing():
    pools, made = world()
    _, distillation = made[6]
    *_, (whole, _) = distillation.loop(pools, distillation.begin(pools, 1), budget=800)
    state = distillation.begin(pools, 1)
    for pause in (100, 101, 350, 2**30):
        for packed, decisions in distillation.loop(pools, state, budget=800, pause=pause):
            state = distillation.loop.unflatten(packed)
            assert all(int(one.position) < pause for one in decisions[:-1])
        assert int(state.clock.position) >= pause or bool(state.closed)
    jax.tree.map(np.testing.assert_array_equal, state, distillation.loop.unflatten(whole))


def test_patience_needs_examples_that_were_seen():
    pools, made = world()
    with pytest.raises(TypeError, match=r"needs a part of explore in pools.seen; got None"):
        made[3][1].begin(pools._replace(seen=None), 0)
