"""The portfolio suite: rows per contender, and the comparison with the best single arm."""

import numpy as np

import ev3_distill.arms
from ev3_distill.benchmarks import (
    portfolio_cost,
    problems,
)


def _label_teacher(dataset, cost):
    return lambda seed: 5 * np.eye(dataset.num_classes, dtype=np.float32)[dataset.labels]


def test_collect_measures_each_contender_once(monkeypatch):
    monkeypatch.setattr(ev3_distill.arms, "DEFAULT", ("ce",))
    monkeypatch.setattr(portfolio_cost, "SINGLES", ("ce",))
    monkeypatch.setattr(portfolio_cost, "COST", {"digits": 2000})
    monkeypatch.setattr(problems, "trained_teacher", _label_teacher)  # one less to compile
    found = list(portfolio_cost.collect(seeds=1, size="smoke"))
    assert [row["contender"] for row in found] == ["portfolio", "EV3, ce alone", "bare ce"]
    assert len({tuple(row[field] for field in portfolio_cost.KEY) for row in found}) == 3
    assert all(0 <= row["accuracy"] <= 1 for row in found)
    assert "| bare ce |" in portfolio_cost.table(found)


def test_table_compares_with_the_best_arm_in_hindsight_paired_by_seed():
    accuracies = {"portfolio": [0.95, 0.94, 0.96], "EV3, a alone": [0.90, 0.99, 0.90], "bare b": [0.955, 0.945, 0.965]}
    found = [
        {"data": "d", "seed": seed, "contender": contender, "accuracy": accuracy, "cost": 4000}
        for contender, by_seed in accuracies.items()
        for seed, accuracy in reversed(list(enumerate(by_seed)))
    ]
    text = portfolio_cost.table(found)
    assert "(bare b), paired over 3 seeds: -0.50 (-0.50 to -0.50) points; target ≥ -0.3: missed." in text
    assert "| portfolio | 95.00 ± 2.48 | 4,000 |" in text  # t(.975, 2) = 4.303, std 1, n 3
