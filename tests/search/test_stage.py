"""Rules for judging a stage of a search: each is a function of evidence or of ledger rows."""

import types

import numpy as np
import pytest
from scipy import stats

from ev3_distill.config import EV3
from ev3_distill.search import search, stage
from ev3_distill.search.stage import (
    falls_behind,
    first_check,
    leads,
    required_level,
    required_levels,
    stage_limit,
    trial_steps,
)
from ev3_distill.types import Evidence


def ledger(*risks, every=250):
    """Rows of a size that started at global step 1000 and cost 1200, with its distance above its goals."""
    return [
        {"position": 1000 + every * i, "cost": 1200 + every * i, "risks": {"accuracy": risk, "worst": 9.0}}
        for i, risk in enumerate(risks, 1)
    ]


@pytest.mark.parametrize(
    ("risks", "steps", "until", "behind"),
    [
        ((-12.0, -8.0), 500, 1200 + 500 * 4, False),  # 4 more with each of two doublings: level
        ((-12.0, -8.0), 500, 1200 + 500 * 2, True),  # with one doubling: 4 below
        ((-12.0, -8.0), 500, 1200 + 1420, False),  # with one and a half: 2 below, which may be chance
        ((-3.0, -3.5), 500, 10**6, True),  # does not rise
        ((-1.0, -1.5), 500, 10**6, False),  # does not rise, but is near
        ((-12.0,), 500, 1300, False),  # too early
        ((-12.0, -8.0, -1.0, 3.0), 500, 1200 + 500 * 2, True),  # later rows are ignored
        ((-12.0, -8.0, -7.0, -6.0), 1000, 1200 + 1000 * 3, True),
        ((None, -8.0), 500, 1300, False),
    ],
)
def test_a_size_that_will_miss_its_guards_falls_behind(risks, steps, until, behind):
    assert falls_behind(ledger(*risks), 1000, steps, until=until) is behind


@pytest.mark.parametrize(("below", "behind"), [(1.2, False), (1.9, False), (2.1, True), (3.5, True)])
def test_a_size_is_abandoned_two_standard_errors_below_its_goals(below, behind):
    assert falls_behind(ledger(-below, -below), 1000, 500, until=1700) is behind


def test_a_size_without_steps_does_not_fall_behind():
    assert not falls_behind(ledger(-12.0, every=0), 1000, 0, until=10**6)


def test_without_goals_no_size_falls_behind():
    rows = [{**row, "risks": {}} for row in ledger(-9.0, -9.0)]
    assert not falls_behind(rows, 1000, 500, until=1300)


def certified_share(level, n=400, sealed=900, threshold=0.8, claim=0.025):
    """Of students that decide proves exactly at a level, the share for which the sealed split proves the guard."""
    rng = np.random.default_rng(0)
    margin = stats.norm.isf(level) * (threshold * (1 - threshold) / n) ** 0.5
    accuracy = threshold + margin + rng.normal(size=20000) * (threshold * (1 - threshold) / n) ** 0.5
    share = rng.binomial(sealed, accuracy) / sealed
    bound = share - stats.norm.isf(claim) * (threshold * (1 - threshold) / sealed) ** 0.5
    return (bound >= threshold).mean()


@pytest.mark.parametrize("probability", [0.5, 0.9])
def test_decide_at_the_required_level_predicts_the_sealed_split(probability):
    level = required_level(0.025, 400 / 900, probability)
    assert certified_share(level) == pytest.approx(probability, abs=0.02)


def test_guards_are_met_once_nine_of_ten_sealed_splits_would_prove_them():
    met, candidate = required_levels(0.025, 400 / 900, 1)
    assert certified_share(met) == pytest.approx(0.9, abs=0.02)
    assert certified_share(candidate, claim=0.025 / 2) == pytest.approx(0.5, abs=0.02)  # one of two candidates
    assert required_levels(0.025, 400 / 900, 3) == pytest.approx((met / 3, candidate / 3))


def test_the_first_check_comes_after_ten_initial_trajectories():
    assert first_check(50) == 500


def test_a_growing_size_may_use_a_tenth_of_the_remaining_budget():
    assert stage_limit(1000, 6000) == 1500
    assert stage_limit(6000, 6000) == 6000


def test_a_trial_takes_a_tenth_of_the_cost_so_far():
    assert trial_steps(5000, 10**6, length=50) == 500
    assert trial_steps(100, 10**6, length=50) == 100  # at least two initial trajectories
    assert trial_steps(5000, 300, length=50) == 300  # at most what each may have


@pytest.mark.parametrize(("differences", "expected"), [(1.2, True), (0.8, False)])
def test_a_student_leads_by_more_than_one_standard_error(differences, expected):
    """Of 400 examples, 100 differ: more of them in favor of one student by some standard errors of the difference."""
    n, discordant = 400, 100
    ahead = round((discordant + differences * discordant**0.5) / 2)
    ours, theirs = np.zeros(n), np.zeros(n)
    ours[:ahead] = 1
    theirs[ahead:discordant] = 1
    evidence = [Evidence(promise, promise) for promise in (ours, theirs)]
    objectives = types.SimpleNamespace(thresholds=np.zeros(0))  # no goals: the promise decides
    evaluator = types.SimpleNamespace(objectives=objectives)
    run = types.SimpleNamespace(distillation=types.SimpleNamespace(evaluator=evaluator))
    assert leads(*evidence, run) is expected


def test_the_patience_of_a_search_is_the_one_that_help_names():
    import inspect

    assert f"A search for a size uses {search.PATIENCE:g}." in inspect.getsource(EV3)


def test_no_more_candidates_than_the_certificate_accounts_for():
    assert stage.MAX_CANDIDATES == 2  # `SearchPolicy.candidates` returns one or two
