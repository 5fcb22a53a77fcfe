"""Rules for the stages of a search, as functions of evidence or of ledger rows."""

import dataclasses
import inspect
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_walks import CONFIG, OBJECTIVES, POOLS, WALKERS, apply_threshold, sample, threshold
from scipy import stats

from ev3_distill.config import EV3, Compress
from ev3_distill.core import Algorithm, adapt, initial_state, make_step
from ev3_distill.search import policy, search, stage
from ev3_distill.search.archive import Entry
from ev3_distill.search.policy import SearchPolicy
from ev3_distill.search.stage import (
    falls_behind,
    first_check,
    leads,
    required_level,
    required_levels,
    stage_limit,
    trial_steps,
)
from ev3_distill.types import Clock, CurrentStudent, ErrorBudget, Evidence, State


def ledger(*risks, every=250):
    """Ledger rows of a size that started at step 1000 and cost 1200; `risks` are its margins above its goals."""
    return [
        {"position": 1000 + every * i, "cost": 1200 + every * i, "risks": {"accuracy": risk, "worst": 9.0}}
        for i, risk in enumerate(risks, 1)
    ]


@pytest.mark.parametrize(
    ("risks", "steps", "until", "behind"),
    [
        ((-12.0, -8.0), 500, 1200 + 500 * 4, False),  # +4 with each of two doublings: reaches 0
        ((-12.0, -8.0), 500, 1200 + 500 * 2, True),  # one doubling: 4 below
        ((-12.0, -8.0), 500, 1200 + 1420, False),  # one and a half doublings: 2 below, within chance
        ((-3.0, -3.5), 500, 10**6, True),  # does not rise
        ((-1.0, -1.5), 500, 10**6, False),  # does not rise, but is close
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


def fraction_certified(level, n=400, sealed=900, threshold=0.8, claim=0.025):
    """Fraction of students, each proven on `decide` at exactly this level, whose guard the sealed split proves."""
    rng = np.random.default_rng(0)
    margin = stats.norm.isf(level) * (threshold * (1 - threshold) / n) ** 0.5
    accuracy = threshold + margin + rng.normal(size=20000) * (threshold * (1 - threshold) / n) ** 0.5
    fraction = rng.binomial(sealed, accuracy) / sealed
    bound = fraction - stats.norm.isf(claim) * (threshold * (1 - threshold) / sealed) ** 0.5
    return (bound >= threshold).mean()


@pytest.mark.parametrize("probability", [0.5, 0.9])
def test_required_level_predicts_the_result_on_the_sealed_split(probability):
    level = required_level(0.025, 400 / 900, probability)
    assert fraction_certified(level) == pytest.approx(probability, abs=0.02)


def test_guards_are_met_once_nine_of_ten_sealed_splits_would_prove_them():
    met, candidate = required_levels(0.025, 400 / 900, 1)
    assert fraction_certified(met) == pytest.approx(0.9, abs=0.02)
    assert fraction_certified(candidate, claim=0.025 / 2) == pytest.approx(0.5, abs=0.02)  # one of two candidates
    assert required_levels(0.025, 400 / 900, 3) == pytest.approx((met / 3, candidate / 3))


def test_the_first_check_comes_after_ten_initial_trajectories():
    assert first_check(50) == 500


def test_a_growing_size_may_use_a_tenth_of_the_remaining_budget():
    assert stage_limit(1000, 6000) == 1500
    assert stage_limit(6000, 6000) == 6000


def test_a_trial_takes_a_tenth_of_the_cost_so_far():
    assert trial_steps(5000, 10**6, length=50) == 500
    assert trial_steps(100, 10**6, length=50) == 100  # at least two initial trajectories
    assert trial_steps(5000, 300, length=50) == 300  # at most the steps left for each


@pytest.mark.parametrize(("differences", "expected"), [(1.2, True), (0.8, False)])
def test_a_student_leads_by_more_than_one_standard_error(differences, expected):
    """The students differ on 100 of 400 examples; one is ahead by some standard errors of that difference."""
    n, discordant = 400, 100
    ahead = round((discordant + differences * discordant**0.5) / 2)
    ours, theirs = np.zeros(n), np.zeros(n)
    ours[:ahead] = 1
    theirs[ahead:discordant] = 1
    evidence = [Evidence(promise, promise) for promise in (ours, theirs)]
    objectives = types.SimpleNamespace(thresholds=np.zeros(0))  # no goals, so the promise decides
    evaluator = types.SimpleNamespace(objectives=objectives)
    run = types.SimpleNamespace(distillation=types.SimpleNamespace(evaluator=evaluator))
    assert leads(*evidence, run) is expected


def stage_with(*, left, iteration):
    """The state of a stage: what is left of its error budget, and its iteration."""
    budget = ErrorBudget(jnp.int32(0), jnp.int32(0), jnp.float32(left))
    clock = Clock(*jnp.zeros(len(Clock._fields), jnp.int32))._replace(iteration=jnp.int32(iteration))
    return State(**dict.fromkeys(State._fields))._replace(clock=clock, budget=budget)


def test_trials_share_one_error_budget_and_the_winner_continues_with_what_they_left(tmp_path):
    """Each option begins with what the one before left, here a half. The first wins."""

    def train(option, **limits):
        runner.budget = adapt.divide(runner.budget, 2)
        began.append(float(runner.budget.left))
        evidence = Evidence(np.ones(8), np.ones(8))
        variables = types.SimpleNamespace(params=np.zeros(option.number))
        state = stage_with(left=began[-1], iteration=10 * option.number)
        return state._replace(current=CurrentStudent(variables, evidence, jnp.int32(0)), closed=False)

    began, evaluator = [], types.SimpleNamespace(objectives=types.SimpleNamespace(thresholds=np.zeros(0)))
    run = types.SimpleNamespace(distillation=types.SimpleNamespace(evaluator=evaluator))
    options = [stage.Stage(n, tmp_path, None, run, f"option {n}", None) for n in (1, 2, 3)]
    setup = types.SimpleNamespace(guards=())
    runner = types.SimpleNamespace(directory=tmp_path, budget=adapt.initial_budget(0.08), train=train, setup=setup)
    before = stage_with(left=0.08, iteration=5)._replace(closed=False)
    outcome = SearchPolicy(runner)._run_trial(options[0], before, options, steps=4, limit=100)
    assert began == pytest.approx([0.04, 0.02, 0.01])
    outcome = json.loads(json.dumps(outcome))
    assert (outcome["taken"], outcome["iteration"]) == (1, 10)
    options[0].handed = policy._handed(outcome)
    assert float(options[0].begin(stage_with(left=0.04, iteration=10)).budget.left) == pytest.approx(0.01)
    later = stage_with(left=0.002, iteration=11)  # it has continued since
    assert options[0].begin(later) is later
    assert policy._handed({"taken": 1}) is None  # a record of an older version


class SearchStarted(Exception):
    """Holds the config with which a search starts."""


def config_of_search(monkeypatch, config):
    """The config with which `run_search` starts its first stage."""

    def start(directory, config, *args, **options):
        raise SearchStarted(config)

    monkeypatch.setattr(search, "StageRunner", start)
    with pytest.raises(SearchStarted) as started:
        search.run_search(Path(), config, types.SimpleNamespace(steps=100), ("ce",), None, teacher={})
    return started.value.args[0]


def steps_until_stuck(patience):
    """The global step after which a student that does not move is stuck, on trajectories of two steps."""
    algorithm = Algorithm(
        apply_threshold, WALKERS[:1], sample, OBJECTIVES, dataclasses.replace(CONFIG, patience=patience)
    )
    pools = POOLS._replace(seen=POOLS.assess)
    state = initial_state(jax.random.key_data(jax.random.key(0)), threshold(8), pools, algorithm)
    step, stuck = make_step(algorithm), False
    while not stuck:
        state, decision = step(pools, state, np.int32(10**6))
        stuck = bool(decision.stuck)
    return int(decision.position)


def test_a_size_is_stuck_after_thirty_initial_trajectories_without_gain(monkeypatch):
    """The default patience of a search is 6, as the help text says: six times five trajectories, here of two steps."""
    config = config_of_search(monkeypatch, Compress(start="mlp:hidden=3"))
    assert steps_until_stuck(config.ev3.patience) == 62
    assert f"A search for a size uses {config.ev3.patience:g}." in inspect.getsource(EV3)


def test_a_search_keeps_the_patience_of_its_config(monkeypatch):
    config = Compress(start="mlp:hidden=3", ev3=EV3(patience=9.0))
    assert config_of_search(monkeypatch, config).ev3.patience == 9.0


@pytest.mark.parametrize(
    ("p_values", "numbers"), [((0.02, 0.01, 0.005, 0.001), [0, 3]), ((0.001, 0.01, 0.02, 0.03), [0])]
)
def test_at_most_two_students_are_candidates(p_values, numbers, tmp_path):
    """Of four students proven on `decide`: the smallest, and possibly a larger one with a lower p-value."""
    entries = [
        Entry(i, f"net {i}", {}, 10 + i, "", "", 0, 100, 0.9, 0.8, 0, float(i), met=False, p_value=p_value)
        for i, p_value in enumerate(p_values)
    ]
    runner = types.SimpleNamespace(directory=tmp_path, entries=entries, candidate_level=0.05)
    candidates = SearchPolicy(runner).candidates()
    assert [entry.number for entry in candidates] == numbers
    assert (
        len(candidates) <= stage.MAX_CANDIDATES
    )  # the number by which `required_levels` divides the error probability
