"""The safety suite: its simulation is calibrated, and its table pools runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill.benchmarks import (
    false_promotions,
    guard_promotions,
)
from ev3_distill.core import adapt


@pytest.mark.parametrize("rule", ["ev3", "ev3, always asking"])
def test_simulation_detects_a_rule_that_overspends_its_error_budget(monkeypatch, rule):
    def promoted_falsely(runs):
        false_promotions._simulate.cache_clear()
        ended = false_promotions._simulate("near-copies", rule, 60)(jax.random.split(jax.random.key(0), runs))
        return int(ended.false.sum())

    assert promoted_falsely(40) <= 6  # beyond that with probability 2e-3 if the rate were 0.05
    monkeypatch.setattr(adapt, "level", lambda budget, closing: jnp.float32(0.4))
    assert promoted_falsely(40) >= 20
    false_promotions._simulate.cache_clear()


def test_candidates_win_and_lose_the_documented_shares():
    key = jax.random.key(0)
    run = false_promotions._initial_run(key, 0.9)
    run = run._replace(champion=jax.tree.map(lambda h: jnp.where(jnp.arange(h.size) < 922, 1.0, 0.0), run.champion))
    for kind, won, lost in (
        ("near-copies", 0.03, 0.03),
        (false_promotions._BETTER, 0.04, 0.02),
        ("after gains", 0.05, 0.01),
    ):
        decides = [
            false_promotions._candidate(k, kind, run, jnp.int32(0))[0].decide for k in jax.random.split(key, 100)
        ]
        difference = np.stack(decides) - np.asarray(run.champion.decide)
        np.testing.assert_allclose((difference > 0).mean(), won, atol=0.002)  # 5 standard errors
        np.testing.assert_allclose((difference < 0).mean(), lost, atol=0.002)


def test_table_pools_runs_and_judges_the_worst_rate():
    def row(question, candidates, rule, count, of):
        return {"seed": 0, "question": question, "candidates": candidates, "rule": rule, "count": count, "of": of}

    rows = [
        row("false", "equal", "ev3", 1, 1000),
        row("false", "equal", "ev3", 3, 1000),
        row("false", "equal", "ev3, always asking", 100, 2000),
        row("wait", false_promotions._BETTER, "ev3", 500, 100),
        row("wait", false_promotions._BETTER, "ev3, always asking", 700, 100),
        row("power", "first test", "ev3", 50, 100),
        row("power", "one of five", "ev3", 30, 100),
    ]
    text = false_promotions.table(rows)
    assert "| equal | 0.2 (0.1 to 0.5) | 5.0 (4.1 to 6.0) |" in text  # intervals of Clopper and Pearson
    assert "an upper limit of at most 6.5 %: held" in text
    assert "| iterations up to a promotion, mean | 5.0 | 7.0 |" in text
    assert "one of five: target ≥ 70 %: missed." in text
    assert "an upper limit of at most 6.5 %: missed" in false_promotions.table(
        [*rows, row("false", "equal", "ev3, always asking", 30, 100)]
    )


def test_promotions_for_a_broken_guard_need_every_class():
    def promoted(candidates, rule):
        return int(guard_promotions.simulate(candidates, rule)(jax.random.split(jax.random.key(0), 50)).sum())

    assert promoted("new worst class", "every class") <= 6
    assert promoted("new worst class", "one class") == 50
    assert promoted("better", "every class") == 50


def test_table_has_promotions_for_a_broken_guard():
    def row(question, candidates, rule, count, of):
        return {"seed": 0, "question": question, "candidates": candidates, "rule": rule, "count": count, "of": of}

    counts = {"new worst class": (1, 900), "equal": (4, 5), "better": (1000, 1000)}
    rows = [
        row("guard", kind, rule, count, 1000)
        for kind, pair in counts.items()
        for rule, count in zip(guard_promotions.RULES, pair, strict=True)
    ]
    rows += [row("false", "equal", "ev3", 1, 1000), row("wait", false_promotions._BETTER, "ev3", 500, 100)]
    rows += [row("power", question, "ev3", 50, 100) for question in false_promotions.TARGETS]
    text = false_promotions.table(rows)
    assert "| new worst class | 0.1 (0.0 to 0.6) | 90.0 (88.0 to 91.8) |" in text
    assert "Target ≤ 5 % for the first two: held." in text
