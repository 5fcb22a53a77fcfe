"""Decisions: exact tests, an error budget that no path through the tree of tests exceeds, and ties to the incumbent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ev3_distill.core import adapt, paired_tests
from ev3_distill.types import ErrorBudget, Evidence

DEPTH = 12


def budget(tests, promotions, delta=0.05):
    """What is left after so many tests, promotions first."""
    left = adapt.initial_budget(delta)
    for i in range(tests):
        left = adapt.spend(left, jnp.bool_(False), jnp.bool_(True), jnp.bool_(i < promotions))
    return left


# The paired test.


@functools.partial(jax.jit, static_argnums=2)
def counted(wins, losses, n):
    """Of n examples the candidate alone is right on the first `wins`, the champion alone on the next `losses`."""
    row = jnp.arange(n)
    both = row % 2 == 0  # where they agree
    only_candidate, only_champion = row < wins, (row >= wins) & (row < wins + losses)
    agree = ~only_candidate & ~only_champion & both
    return paired_tests.mcnemar(
        (only_candidate | agree).astype(jnp.float32), (only_champion | agree).astype(jnp.float32)
    )


SMALL = [(w, n - w) for n in (0, 1, 2, 3, 5, 8, 13, 21, 40) for w in range(n + 1)]
LARGE = [(w, n - w) for n in (100, 1000, 4000, 10_000) for z in (-4, -1, 0, 0.5, 1, 2, 2.5, 3, 4, 6)
         for w in [round(n / 2 + z * n**0.5 / 2)]] + [(10_000, 10_000), (10_000, 9_700), (10_000, 0), (0, 10_000)]  # fmt: skip


@pytest.mark.parametrize(("grid", "n"), [(SMALL, 40), (LARGE, 20_000)], ids=["small", "large"])
def test_mcnemar_is_the_exact_binomial_test(grid, n):
    for w, losses in grid:
        got_wins, got_losses, p_value = counted(w, losses, n)
        assert (int(got_wins), int(got_losses)) == (w, losses)
        want = binomtest(w, w + losses, 0.5, alternative="greater").pvalue if w + losses else 1.0
        rounding = 1e-5 + 2e-6 * (w + losses)  # of float32; never to the candidate's advantage
        assert want * (1 - 1e-6) - 1e-30 <= float(p_value) <= min(want * (1 + 2 * rounding) + 1e-30, 1), (w, losses)


def test_mcnemar_counts_nan_as_wrong():
    right, wrong, nan = 1.0, 0.0, float("nan")
    candidate = jnp.array([nan, nan, right, right, right, nan])
    champion = jnp.array([right, wrong, nan, wrong, right, nan])
    wins, losses, p_value = paired_tests.mcnemar(candidate, champion)
    assert (int(wins), int(losses)) == (2, 1)
    assert float(p_value) == pytest.approx(0.5, rel=3e-5)  # P(Bin(3, 1/2) >= 2)


def test_mcnemar_of_a_student_that_is_nan_everywhere():
    assert float(paired_tests.mcnemar(jnp.full(9, jnp.nan), jnp.ones(9))[2]) == 1
    assert float(paired_tests.mcnemar(jnp.full(9, jnp.nan), jnp.zeros(9))[2]) == 1


@pytest.mark.parametrize("pairs", range(6))
def test_a_tie_never_beats_any_level(pairs):
    assert float(counted(pairs, pairs, 40)[2]) > 0.5
    assert float(adapt.level(budget(0, 0, 0.49), jnp.bool_(True))) < 0.5


# The error budget.


def first_false(left, depth, better, closing):
    """Largest probability, by a union bound, that a false promotion is made below a node, over all that can follow.

    Args:
      left: the budget at the node.
      depth: how many tests may follow at most.
      better, closing: [nodes] bool, of each node in the order they are met: whether its candidate is truly better,
        whether it ends the run.
    """
    ends = depth == 0 or next(closing)
    level = float(adapt.level(left, jnp.bool_(ends)))
    good = next(better)
    own = 0.0 if good else level
    if ends:
        return own
    kept, promoted = (adapt.spend(left, jnp.bool_(False), jnp.bool_(True), jnp.bool_(to)) for to in (False, True))
    below = first_false(kept, depth - 1, better, closing)
    if good:  # behind a false promotion nothing more is counted: the first one was made
        below += first_false(promoted, depth - 1, better, closing)
    return own + below


@pytest.mark.parametrize("goodness", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("stop", [0.0, 0.3])
def test_levels_of_a_tree_sum_to_at_most_delta(goodness, stop):
    """Whatever candidates are met, and wherever runs end, the levels that count towards a first false promotion."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        better, closing = iter(rng.random(1000) < goodness), iter(rng.random(1000) < stop)
        most = first_false(adapt.initial_budget(0.05), 6, better, closing)
        assert most <= 0.05 * (1 + 1e-5)
        if goodness == 0:
            assert most == pytest.approx(0.05)  # and the budget is not left lying about


def test_levels_by_hand():
    c = adapt.SHARE
    for tests, promotions, want in [(0, 0, 1), (1, 0, 1 - c), (1, 1, c), (3, 1, c * (1 - c) ** 2)]:
        left = budget(tests, promotions, 0.05)
        assert (int(left.tests), int(left.promotions)) == (tests, promotions)
        assert float(adapt.level(left, jnp.bool_(True))) == pytest.approx(0.05 * want)
        assert float(adapt.level(left, jnp.bool_(False))) == pytest.approx(0.05 * want * c)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), max_size=100), st.floats(0.001, 0.999), st.booleans())
def test_a_level_is_a_probability_however_long_the_run(promoted, delta, closing):
    left = adapt.initial_budget(delta)
    for outcome in promoted:
        left = adapt.spend(left, jnp.bool_(False), jnp.bool_(True), jnp.bool_(outcome))
    got = float(adapt.level(left, jnp.bool_(closing)))
    assert 0 <= got <= delta * (1 + 1e-6)  # false for nan


@pytest.mark.parametrize(
    ("closing", "tested", "promoted", "want"),
    [
        (False, False, False, (4, 2, 1.0)),
        (True, False, False, (4, 2, 0.0)),
        (False, True, False, (5, 2, 1 - adapt.SHARE)),
        (False, True, True, (5, 3, adapt.SHARE)),
        (True, True, True, (5, 3, 0.0)),
    ],
)
def test_spend(closing, tested, promoted, want):
    before = ErrorBudget(jnp.int32(4), jnp.int32(2), jnp.float32(0.25))
    after = adapt.spend(before, jnp.bool_(closing), jnp.bool_(tested), jnp.bool_(promoted))
    assert (int(after.tests), int(after.promotions)) == want[:2]
    assert float(after.left) == pytest.approx(0.25 * want[2])
    assert [x.dtype for x in after] == [x.dtype for x in before]


RUNS, EXAMPLES, TESTS, DELTA = 3000, 128, 16, 0.2


@jax.jit
def simulated(key, redraw):
    """Many runs, each reusing one finite decide split, a third of the tests being of truly better candidates.

    The other candidates are no better than the champion in truth: they differ from it on a share `redraw` of the examples.
    Returns the budgets at the end and whether each run promoted one of these, [RUNS].
    """
    truth = 0.6
    p_values = jax.vmap(lambda a, b: paired_tests.mcnemar(a, b)[2])

    def test(carry, row):
        champion, paths, false = carry
        i, key = row
        keys = jax.random.split(key, 4)
        better = jax.random.bernoulli(keys[0], 1 / 3, (RUNS,))
        redrawn = jax.random.bernoulli(keys[1], redraw, (RUNS, EXAMPLES))
        null = jnp.where(redrawn, jax.random.bernoulli(keys[2], truth, (RUNS, EXAMPLES)), champion)
        good = champion | jax.random.bernoulli(keys[3], 0.3, (RUNS, EXAMPLES))
        candidate = jnp.where(better[:, None], good, null)
        closing = i == TESTS - 1
        alpha = adapt.level(paths, closing)
        promoted = p_values(candidate.astype(jnp.float32), champion.astype(jnp.float32)) <= alpha
        champion = jnp.where(promoted[:, None], candidate, champion)
        return (
            champion,
            adapt.spend(paths, closing, jnp.ones(RUNS, int), promoted),
            false | (promoted & ~better),
        ), None

    start = jax.random.bernoulli(jax.random.fold_in(key, TESTS), truth, (RUNS, EXAMPLES))
    paths = jax.tree.map(lambda x: jnp.full(RUNS, x), adapt.initial_budget(DELTA))
    rows = (jnp.arange(TESTS), jax.random.split(key, TESTS))
    (_, paths, false), _ = jax.lax.scan(test, (start, paths, jnp.zeros(RUNS, bool)), rows)
    return paths, false


@pytest.mark.parametrize("redraw", [1.0, 0.2])
def test_false_promotions_stay_within_the_budget(redraw):
    paths, false = simulated(jax.random.key(0), redraw)
    assert float(false.mean()) <= DELTA + 3 * (DELTA * (1 - DELTA) / RUNS) ** 0.5
    assert float(paths.promotions.mean()) > 0.5  # the truly better ones do get through


# Which proposal, and whether to test it.

choose = jax.jit(adapt.choose)
NAN = float("nan")


def best(rows, active, leader, takeover, current=0):
    """Scores [P, N] by both objectives -> the row chosen, or none; whether exploration moves."""
    rows, active = np.asarray(rows, np.float32), np.asarray(active)
    current = np.broadcast_to(np.float32(current), rows.shape[1:])
    choice = choose(
        Evidence(rows, rows), Evidence(current, current), active, np.int32(leader), takeover=np.float32(takeover)
    )
    return int(choice.row) if choice.any_active else None, bool(choice.moves)


@pytest.mark.parametrize("takeover", [0.0, 1.0])
@pytest.mark.parametrize("leader", [0, 1, 2])
def test_a_tie_among_proposals_goes_to_the_leader(leader, takeover):
    assert best([[1, 0, 1, 0]] * 3, [True] * 3, leader, takeover) == (leader, True)  # example by example
    same_mean = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
    assert best(same_mean, [True] * 3, leader, takeover) == (leader, True)


def test_a_tie_with_the_current_student_keeps_it():
    assert best([[0, 0], [0, 0]], [True, True], 0, 0.0) == (0, False)
    assert best([[1, 1], [1, 1]], [True, True], 0, 0.0, current=1) == (0, False)
    assert best([[0, 1], [1, 1]], [True, True], 0, 0.0, current=1) == (1, False)
    assert best([[0, 1], [1, 1]], [True, True], 0, 0.0, current=0.5) == (1, True)


def test_a_challenger_needs_the_takeover_margin():
    # Row 1 beats row 0 on 2 of 8 examples: mean gain 1/4, standard error sqrt(3/16) / sqrt(7) = 0.164, ratio 1.53.
    rows = [[0] * 8, [1, 1, 0, 0, 0, 0, 0, 0]]
    assert best(rows, [True, True], 0, 0.0) == (1, True)
    assert best(rows, [True, True], 0, 1.5) == (1, True)
    assert best(rows, [True, True], 0, 1.55) == (0, False)
    assert best(rows, [True, True], 1, 1.55) == (1, True)  # the leader itself needs no margin


@pytest.mark.parametrize(
    ("rows", "active", "leader", "want"),
    [
        ([[1, 0], [NAN, NAN]], [True, False], 1, (0, True)),  # an inactive leader gives way
        ([[NAN, NAN], [0, 0], [1, 1]], [False, True, True], 0, (2, True)),
        ([[1, NAN], [0, 1]], [True, True], 1, (1, True)),  # a nan score never wins, however good the rest
        ([[1, NAN], [0, 1]], [True, True], 0, (1, True)),  # not even for the leader
        ([[1, 1], [0, 1]], [False, True], 1, (1, True)),  # nor does an inactive row with scores
        ([[1, 1], [0, 1]], [False, True], 0, (1, True)),
        ([[NAN, NAN], [NAN, 1]], [False, False], 0, (None, False)),
    ],
)
def test_the_choice_among_broken_proposals(rows, active, leader, want):
    assert best(rows, active, leader, 1.0) == want


@pytest.mark.parametrize("leader", [0, 1])
def test_nothing_moves_where_all_scores_are_nan(leader):
    assert best([[NAN, NAN], [NAN, 1]], [True, True], leader, 1.0)[1] is False


@pytest.mark.parametrize("broken", ["promise", "select"])
def test_a_student_with_a_nan_score_of_one_kind_never_wins(broken):
    """Finite parameters may still overflow: one example's logits are then not finite, and so is its select score."""
    scores = np.float32([[1, 1, 1], [0, 0, 1], [0, 0, 0]])
    poisoned = scores.copy()
    poisoned[0, 0] = NAN
    evidence = Evidence(scores, poisoned) if broken == "promise" else Evidence(poisoned, scores)
    current = Evidence(np.zeros(3, np.float32), np.zeros(3, np.float32))
    for leader in range(3):
        choice = choose(evidence, current, np.ones(3, bool), np.int32(leader), takeover=np.float32(0))
        assert not (choice.moves and int(choice.row) == 0)


def worth(p_assess, cost, tested_cost, closing, path=(0, 0)):
    closing = jnp.bool_(closing)
    alpha = adapt.level(budget(*path), closing)
    due = adapt.due(jnp.int32(cost), jnp.int32(tested_cost), closing)
    return bool(due & adapt.worth_testing(jnp.float32(p_assess), alpha, closing))


def test_a_test_is_worth_making_only_where_assess_predicts_success():
    assert worth(1e-9, 100, 0, closing=False)
    assert not worth(0.4, 100, 0, closing=False)
    for path in [(0, 0), (3, 1), (6, 6)]:  # at the very level that the test would have
        alpha = float(adapt.level(budget(*path), jnp.bool_(False)))
        assert worth(0.99 * alpha, 10**6, 1, closing=False, path=path)
        assert not worth(1.01 * alpha, 10**6, 1, closing=False, path=path)


def test_a_test_waits_after_the_last_one():
    assert not worth(0.0, 100, 100, closing=False)
    assert worth(0.0, 10_000, 100, closing=False)


def test_the_closing_iteration_asks_where_assess_sees_a_gain():
    assert worth(0.4, 100, 100, closing=True)
    assert not worth(0.5, 100, 100, closing=True)
    assert not worth(1.0, 100, 0, closing=True)  # nothing differs: there is nothing to prove


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_what_proves_is_what_the_p_value_says(alpha):
    """The shortcut for a candidate that is not ahead changes nothing."""
    rng = np.random.default_rng(0)
    told = set()
    for _ in range(60):
        candidate, champion = (rng.random((2, 40)) < rng.random((2, 1))).astype(np.float32)
        proof = bool(paired_tests.proves(candidate, champion, alpha))
        assert proof == bool(paired_tests.mcnemar(candidate, champion)[2] <= alpha)
        told.add(proof)
    assert told == {False, True}
    assert not paired_tests.proves(candidate, candidate, alpha)
