"""Decisions: exact paired tests, an error budget that holds for every sequence of outcomes, ties, when to test."""

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
    """The error budget after `tests` tests, of which the first `promotions` promoted."""
    left = adapt.initial_budget(delta)
    for i in range(tests):
        left = adapt.spend(left, jnp.bool_(False), jnp.bool_(True), jnp.bool_(i < promotions))
    return left


# The paired test.


@functools.partial(jax.jit, static_argnums=2)
def mcnemar_of_counts(wins, losses, n):
    """McNemar's test on n examples: only the candidate is right on `wins` of them, only the champion on `losses`."""
    row = jnp.arange(n)
    both = row % 2 == 0  # where they agree, both are right on even rows and wrong on odd rows
    only_candidate, only_champion = row < wins, (row >= wins) & (row < wins + losses)
    agree = ~only_candidate & ~only_champion & both
    return paired_tests.mcnemar(
        (only_candidate | agree).astype(jnp.float32), (only_champion | agree).astype(jnp.float32)
    )


SMALL = [(w, n - w) for n in (0, 1, 2, 3, 5, 8, 13, 21, 40) for w in range(n + 1)]
LARGE = [(w, n - w) for n in (100, 1000, 4000, 10_000) for z in (-4, -1, 0, 0.5, 1, 2, 2.5, 3, 4, 6)
         for w in [round(n / 2 + z * n**0.5 / 2)]] + [(10_000, 10_000), (10_000, 9_700), (10_000, 0), (0, 10_000)]  # fmt: skip


@pytest.mark.parametrize(("grid", "n"), [(SMALL, 40), (LARGE, 20_000)], ids=["small", "large"])
def test_mcnemar_agrees_with_the_exact_binomial_test(grid, n):
    for w, losses in grid:
        got_wins, got_losses, p_value = mcnemar_of_counts(w, losses, n)
        assert (int(got_wins), int(got_losses)) == (w, losses)
        want = binomtest(w, w + losses, 0.5, alternative="greater").pvalue if w + losses else 1.0
        rounding = 1e-5 + 2e-6 * (w + losses)  # of float32; it never favors the candidate
        assert want * (1 - 1e-6) - 1e-30 <= float(p_value) <= min(want * (1 + 2 * rounding) + 1e-30, 1), (w, losses)


def test_mcnemar_counts_nan_as_wrong():
    right, wrong, nan = 1.0, 0.0, float("nan")
    candidate = jnp.array([nan, nan, right, right, right, nan])
    champion = jnp.array([right, wrong, nan, wrong, right, nan])
    wins, losses, p_value = paired_tests.mcnemar(candidate, champion)
    assert (int(wins), int(losses)) == (2, 1)
    assert float(p_value) == pytest.approx(0.5, rel=3e-5)  # P(Bin(3, 1/2) >= 2)


def test_mcnemar_p_value_is_one_for_a_student_that_is_nan_everywhere():
    assert float(paired_tests.mcnemar(jnp.full(9, jnp.nan), jnp.ones(9))[2]) == 1
    assert float(paired_tests.mcnemar(jnp.full(9, jnp.nan), jnp.zeros(9))[2]) == 1


@pytest.mark.parametrize("pairs", range(6))
def test_p_value_of_a_tie_exceeds_every_level(pairs):
    assert float(mcnemar_of_counts(pairs, pairs, 40)[2]) > 0.5
    assert float(adapt.level(budget(0, 0, 0.49), jnp.bool_(True))) < 0.5


# The error budget.


def false_promotion_bound(left, depth, better, closing):
    """Union bound on the probability of a false promotion at or below a node of the tree of test outcomes.

    Args:
      left: the error budget at the node.
      depth: maximum number of tests after this one.
      better, closing: iterators of bool over the nodes in depth-first order: whether a node's candidate is truly
        better, and whether the node ends the run.
    """
    ends = depth == 0 or next(closing)
    level = float(adapt.level(left, jnp.bool_(ends)))
    truly_better = next(better)
    own = 0.0 if truly_better else level
    if ends:
        return own
    not_promoted, promoted = (
        adapt.spend(left, jnp.bool_(False), jnp.bool_(True), jnp.bool_(outcome)) for outcome in (False, True)
    )
    below = false_promotion_bound(not_promoted, depth - 1, better, closing)
    if truly_better:  # below a false promotion nothing is added: only the first one counts
        below += false_promotion_bound(promoted, depth - 1, better, closing)
    return own + below


@pytest.mark.parametrize("goodness", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("stop", [0.0, 0.3])
def test_levels_along_all_test_outcomes_sum_to_at_most_delta(goodness, stop):
    """The bound on a first false promotion holds for random candidates and random ends of runs."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        better, closing = iter(rng.random(1000) < goodness), iter(rng.random(1000) < stop)
        bound = false_promotion_bound(adapt.initial_budget(0.05), 6, better, closing)
        assert bound <= 0.05 * (1 + 1e-5)
        if goodness == 0:
            assert bound == pytest.approx(0.05)  # the whole budget is used


def test_levels_agree_with_hand_computation():
    c = adapt.SHARE
    for tests, promotions, want in [(0, 0, 1), (1, 0, 1 - c), (1, 1, c), (3, 1, c * (1 - c) ** 2)]:
        left = budget(tests, promotions, 0.05)
        assert (int(left.tests), int(left.promotions)) == (tests, promotions)
        assert float(adapt.level(left, jnp.bool_(True))) == pytest.approx(0.05 * want)
        assert float(adapt.level(left, jnp.bool_(False))) == pytest.approx(0.05 * want * c)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), max_size=100), st.floats(0.001, 0.999), st.booleans())
def test_level_stays_between_zero_and_delta_in_long_runs(promoted, delta, closing):
    left = adapt.initial_budget(delta)
    for outcome in promoted:
        left = adapt.spend(left, jnp.bool_(False), jnp.bool_(True), jnp.bool_(outcome))
    got = float(adapt.level(left, jnp.bool_(closing)))
    assert 0 <= got <= delta * (1 + 1e-6)  # also fails for NaN


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
def test_spend_counts_tests_and_reduces_the_budget(closing, tested, promoted, want):
    before = ErrorBudget(jnp.int32(4), jnp.int32(2), jnp.float32(0.25))
    after = adapt.spend(before, jnp.bool_(closing), jnp.bool_(tested), jnp.bool_(promoted))
    assert (int(after.tests), int(after.promotions)) == want[:2]
    assert float(after.left) == pytest.approx(0.25 * want[2])
    assert [x.dtype for x in after] == [x.dtype for x in before]


RUNS, EXAMPLES, TESTS, DELTA = 3000, 128, 16, 0.2


@jax.jit
def simulate_runs(key, redraw):
    """Simulates runs of TESTS tests that each reuse one decide split; a third of the candidates are truly better.

    The other candidates are null: no better than the champion on the population. Their outcomes are redrawn on a
    fraction `redraw` of the examples. Returns the final budgets and whether each run promoted a null candidate, [RUNS].
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
def test_rate_of_false_promotions_is_at_most_delta(redraw):
    paths, false = simulate_runs(jax.random.key(0), redraw)
    assert float(false.mean()) <= DELTA + 3 * (DELTA * (1 - DELTA) / RUNS) ** 0.5
    assert float(paths.promotions.mean()) > 0.5  # truly better candidates are promoted


# Selection of a proposal, and whether to test it.

choose = jax.jit(adapt.choose)
NAN = float("nan")


def choose_by_scores(rows, active, leader, current=0):
    """The selected row, None if no proposal is active, and whether the student moves; for scores [P, N] of both kinds."""
    rows, active = np.asarray(rows, np.float32), np.asarray(active)
    current = np.broadcast_to(np.float32(current), rows.shape[1:])
    choice = choose(Evidence(rows, rows), Evidence(current, current), active, np.int32(leader))
    return int(choice.row) if choice.any_active else None, bool(choice.moves)


@pytest.mark.parametrize("leader", [0, 1, 2])
def test_tie_among_proposals_goes_to_the_leader(leader):
    same_scores = [[1, 0, 1, 0]] * 3
    assert choose_by_scores(same_scores, [True] * 3, leader) == (leader, True)
    same_mean = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
    assert choose_by_scores(same_mean, [True] * 3, leader) == (leader, True)


def test_tie_with_the_current_student_keeps_it():
    assert choose_by_scores([[0, 0], [0, 0]], [True, True], 0) == (0, False)
    assert choose_by_scores([[1, 1], [1, 1]], [True, True], 0, current=1) == (0, False)
    assert choose_by_scores([[0, 1], [1, 1]], [True, True], 0, current=1) == (1, False)
    assert choose_by_scores([[0, 1], [1, 1]], [True, True], 0, current=0.5) == (1, True)


@pytest.mark.parametrize("leader", [0, 1])
def test_best_proposal_is_selected_by_any_margin(leader):
    """Row 1 is right on one more of eight examples: one standard error."""
    rows = [[0] * 8, [1] + 7 * [0]]
    assert choose_by_scores(rows, [True, True], leader) == (1, True)


@pytest.mark.parametrize(
    ("promise", "select", "leader", "moves"),
    [
        ([1, 0, 0, 0], [0, 0, 0, 0], 0, False),  # equal in both scores
        ([0, 1, 0, 0], [9, 9, 9, 9], 0, True),  # the promise is equal, on other examples: the smooth score decides
        ([1, 0, 0, 0], [0, 0, 0, 0.1], 0, True),
        ([1, 0, 0, 0], [0, 0, 0, -0.1], 0, False),
        ([1, 0, 0, 0], [9, 9, 9, 9], 1, False),  # another arm than the leader needs a higher promise
        ([0, 0, 0, 0], [9, 9, 9, 9], 0, False),  # a lower promise, by one standard error
        ([1, 1, 0, 0], [-9, -9, -9, -9], 1, True),
    ],
)
def test_smooth_score_decides_for_the_leader_if_the_promise_is_equal(promise, select, leader, moves):
    """Row 0 is the best proposal; row 1 is wrong everywhere. The current student is right on the first of four examples."""
    promise, select = np.float32([promise, [-1] * 4]), np.float32([select, [0] * 4])
    current = Evidence(select=np.zeros(4, np.float32), promise=np.float32([1, 0, 0, 0]))
    choice = choose(Evidence(select, promise), current, np.ones(2, bool), np.int32(leader))
    assert (int(choice.row), bool(choice.any_active), bool(choice.moves)) == (0, True, moves)
    rises = promise[0].sum() > 1
    gains = (promise[0] - current.promise) if rises else select[0]
    assert float(choice.gain) == pytest.approx(gains.mean())
    assert float(choice.gain_se) == pytest.approx(gains.std(ddof=1) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "active", "leader", "want"),
    [
        ([[1, 0], [NAN, NAN]], [True, False], 1, (0, True)),  # an inactive leader is passed over
        ([[NAN, NAN], [0, 0], [1, 1]], [False, True, True], 0, (2, True)),
        ([[1, NAN], [0, 1]], [True, True], 1, (1, True)),  # a row with a NaN score never wins
        ([[1, NAN], [0, 1]], [True, True], 0, (1, True)),  # even if it is the leader's
        ([[1, 1], [0, 1]], [False, True], 1, (1, True)),  # an inactive row with finite scores never wins
        ([[1, 1], [0, 1]], [False, True], 0, (1, True)),
        ([[NAN, NAN], [NAN, 1]], [False, False], 0, (None, False)),
    ],
)
def test_broken_and_inactive_proposals_are_never_selected(rows, active, leader, want):
    assert choose_by_scores(rows, active, leader) == want


@pytest.mark.parametrize("leader", [0, 1])
def test_student_does_not_move_if_all_scores_are_nan(leader):
    assert choose_by_scores([[NAN, NAN], [NAN, 1]], [True, True], leader)[1] is False


@pytest.mark.parametrize("broken", ["promise", "select"])
def test_student_with_a_nan_in_select_or_promise_never_wins(broken):
    """Finite parameters may overflow in the forward pass; then one example has a NaN score of one kind."""
    scores = np.float32([[1, 1, 1], [0, 0, 1], [0, 0, 0]])
    poisoned = scores.copy()
    poisoned[0, 0] = NAN
    evidence = Evidence(scores, poisoned) if broken == "promise" else Evidence(poisoned, scores)
    current = Evidence(np.zeros(3, np.float32), np.zeros(3, np.float32))
    for leader in range(3):
        choice = choose(evidence, current, np.ones(3, bool), np.int32(leader))
        assert not (choice.moves and int(choice.row) == 0)


def promotion_test_runs(p_assess, cost, tested_cost, closing, path=(0, 0)):
    closing = jnp.bool_(closing)
    alpha = adapt.level(budget(*path), closing)
    due = adapt.due(jnp.int32(cost), jnp.int32(tested_cost), closing)
    return bool(due & adapt.worth_testing(jnp.float32(p_assess), alpha, closing))


def test_promotion_test_runs_only_if_assess_predicts_success():
    assert promotion_test_runs(1e-9, 100, 0, closing=False)
    assert not promotion_test_runs(0.4, 100, 0, closing=False)
    for path in [(0, 0), (3, 1), (6, 6)]:  # p-values just below and just above the level of the test
        alpha = float(adapt.level(budget(*path), jnp.bool_(False)))
        assert promotion_test_runs(0.99 * alpha, 10**6, 1, closing=False, path=path)
        assert not promotion_test_runs(1.01 * alpha, 10**6, 1, closing=False, path=path)


def test_next_promotion_test_waits_until_the_cost_has_grown():
    assert not promotion_test_runs(0.0, 100, 100, closing=False)
    assert promotion_test_runs(0.0, 10_000, 100, closing=False)


def test_closing_iteration_runs_a_promotion_test_for_any_gain_on_assess():
    assert promotion_test_runs(0.4, 100, 100, closing=True)
    assert not promotion_test_runs(0.5, 100, 100, closing=True)
    assert not promotion_test_runs(1.0, 100, 0, closing=True)  # a tie on assess is not tested


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_proves_agrees_with_the_p_value(alpha):
    """The shortcut for candidates with no more wins than losses does not change the outcome."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        candidate, champion = (rng.random((2, 40)) < rng.random((2, 1))).astype(np.float32)
        proof = bool(paired_tests.proves(candidate, champion, alpha))
        assert proof == bool(paired_tests.mcnemar(candidate, champion)[2] <= alpha)
        outcomes.add(proof)
    assert outcomes == {False, True}
    assert not paired_tests.proves(candidate, candidate, alpha)
