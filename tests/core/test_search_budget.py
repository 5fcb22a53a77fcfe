"""The error budget of a search: one purse for all stages and trials, divided among the answers that the search follows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_walks import CONFIG, OBJECTIVES, RUN_KEY, WALKERS, apply_threshold, ladder, sample, threshold

from ev3_distill.core import Algorithm, adapt, initial_state, make_step, paired_tests
from ev3_distill.types import Pools

DELTA = 0.05
NO = jnp.bool_(False)


# The tree of all answers.


def levels_below(left, kinds, better):
    """The sum of the levels at which the first false promotion could happen, over the tree of answers below a node.

    Args:
      left: the error budget at the node.
      kinds: what happens next along every path: "test", "met" (decide is asked whether all goals are met), or the number
        of answers among which the search follows one.
      better: iterator of bool over the tests in depth-first order: whether the candidate is truly better.
    """
    if not kinds:
        return 0.0
    kind, rest = kinds[0], kinds[1:]
    if kind == "met":
        return sum(levels_below(adapt.pay_for_answer(left, True, met), rest, better) for met in (False, True))
    if kind != "test":
        return sum(levels_below(adapt.divide(left, kind), rest, better) for _ in range(kind))
    truly_better, level = next(better), float(adapt.level(left, NO))
    kept, promoted = (adapt.spend(left, NO, jnp.int32(1), jnp.int32(outcome)) for outcome in (0, 1))
    below = levels_below(kept, rest, better)
    return below + levels_below(promoted, rest, better) if truly_better else below + level


@pytest.mark.parametrize("goodness", [0.0, 0.3, 0.7, 1.0])
def test_levels_of_a_search_sum_to_at_most_delta(goodness):
    rng = np.random.default_rng(0)
    for _ in range(4):
        kinds = [("test", "test", "test", "met", 2, 3)[i] for i in rng.integers(0, 6, 7)]
        bound = levels_below(adapt.initial_budget(DELTA), kinds, iter(rng.random(10**5) < goodness))
        assert bound <= DELTA * (1 + 1e-5)


# One run of a search.

POOLS = Pools(ladder(), ladder(), ladder())


@functools.cache
def step_and_state(*, continues):
    algorithm = Algorithm(apply_threshold, WALKERS[:1], sample, OBJECTIVES, CONFIG, continues=continues)
    state = initial_state(jax.random.key_data(RUN_KEY), threshold(8, (8,)), POOLS, algorithm)
    return make_step(algorithm), state


@pytest.mark.parametrize("continues", [False, True])
def test_a_stage_that_reaches_its_limit_leaves_a_budget_for_the_next(continues):
    """Two steps of an arm that gains 8 examples a step, of 64; then the limit."""
    step, state = step_and_state(continues=continues)
    state, decision = step(POOLS, state, np.int32(2))
    assert decision.promotion.promoted  # from 8 to 24 right: 2^-16
    state, decision = step(POOLS, state, np.int32(2))
    assert state.closed
    assert float(state.budget.left) == pytest.approx(DELTA * adapt.SHARE if continues else 0)
    later = state._replace(closed=NO, met=NO)
    later, decision = step(POOLS, later, np.int32(4))
    assert bool(decision.promotion.tested and decision.promotion.promoted) is continues
    assert (float(decision.promotion.alpha) > 0) is continues


def test_nothing_is_promoted_at_level_zero():
    """Even if the p-value is too small for a float32."""
    many = Pools(ladder(400), ladder(400), ladder(400))
    algorithm = Algorithm(apply_threshold, WALKERS[:1], sample, OBJECTIVES, CONFIG)
    state = initial_state(jax.random.key_data(RUN_KEY), threshold(0, (200,)), many, algorithm)
    state = state._replace(budget=state.budget._replace(left=jnp.float32(0)))
    _, decision = make_step(algorithm)(many, state, np.int32(2))
    assert decision.promotion.tested and decision.promotion.p_value == 0 and not decision.promotion.promoted


# A simulated search that learns about decide whatever it can.

RUNS, EXAMPLES, STAGES, TESTS = 2000, 128, 5, 3
LEVEL = 0.2


@jax.jit
def simulated_searches(key):
    """Searches over coin flips, in which no student is better than another; returns false promotions and final budgets.

    Every candidate is the champion with some examples redrawn. At the end of a stage the search compares its champion with
    the best student so far on decide, the next stage starts from a part of the better one, and the search pays for that answer.
    """

    def redrawn(key, student, share):
        which, new = jax.random.bernoulli(key, jnp.array([[share], [0.5]]), (2, EXAMPLES))
        return jnp.where(which, new, student)

    def search(key):
        def test(carry, key):
            champion, budget, false = carry
            candidate = redrawn(key, champion, 0.3)
            p_value = paired_tests.mcnemar(candidate.astype(jnp.float32), champion.astype(jnp.float32))[2]
            promoted = p_value <= adapt.level(budget, NO)
            budget = adapt.spend(budget, NO, jnp.int32(1), promoted)
            return (jnp.where(promoted, candidate, champion), budget, false | promoted), adapt.level(budget, NO)

        def stage(carry, key):
            best, budget, false = carry
            start_key, *keys = jax.random.split(key, 1 + TESTS)
            start = redrawn(start_key, best, 0.5)
            (champion, budget, false), levels = jax.lax.scan(test, (start, budget, false), jnp.stack(keys))
            best = jnp.where(champion.sum() > best.sum(), champion, best)
            return (best, adapt.divide(budget, 2), false), levels.min()

        first = jax.random.bernoulli(jax.random.fold_in(key, 7), 0.5, (EXAMPLES,))
        carry = first, adapt.initial_budget(LEVEL), NO
        (_, budget, false), levels = jax.lax.scan(stage, carry, jax.random.split(key, STAGES))
        return false, budget.left, levels

    return jax.vmap(search)(jax.random.split(key, RUNS))


def test_searches_promote_falsely_in_at_most_delta_of_all_cases():
    false, left, levels = simulated_searches(jax.random.key(0))
    assert float(false.mean()) <= LEVEL + 3 * (LEVEL * (1 - LEVEL) / RUNS) ** 0.5
    assert float(false.mean()) > 0.02
    assert float(left.min()) > 0 and float(levels.min()) > 0  # later stages test at a positive level
