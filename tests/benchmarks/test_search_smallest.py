"""The search suite: its table compares searches with runs of single sizes."""

import pytest

from ev3_distill.benchmarks import (
    search_smallest,
)


def test_table_compares_each_search_with_the_single_runs_of_its_seed():
    """Each against the runs alone of its own seed; the last accuracy is beyond them."""

    def alone(seed, params, bound):
        result = {
            "params": params,
            "accuracy": bound + 0.0196,
            "bound": bound,
            "steps": 100,
        }  # a standard error of 0.01
        return {"data": "d", "seed": seed, "run": f"alone {params}", **result}

    def searched(seed, aim, params, bound):
        result = {"params": params, "bound": bound, "exit": 0 if bound >= aim else 3, "steps": 100, "sizes": []}
        return {"data": "d", "seed": seed, "run": f"search {aim}", **result}

    bounds = {0: {10: 0.6, 20: 0.8, 40: 0.9}, 1: {10: 0.71, 20: 0.75, 40: 0.9}}
    rows = [alone(seed, params, bound) for seed, of_seed in bounds.items() for params, bound in of_seed.items()]
    rows += [searched(0, 0.7, 10, 0.72), searched(1, 0.7, 20, 0.8), searched(0, 0.85, 40, 0.86)]
    rows += [searched(1, 0.85, 40, 0.8), searched(0, 0.99, 40, 0.9), searched(1, 0.99, 40, 0.91)]
    text = search_smallest.table(rows)
    # at 0.7 a bound of 0.71 would come again 3 times in 4, which is too seldom
    assert "| d | 0.7 | 20, 10 | 20, 20 | 10, 20 | 0 | 1 | 1 | 0 | 100 | 300 |" in text
    assert "| d | 0.85 | 40, 40 | 40, 40 | 40, none, 80.0% | 1 | 0 | 0 | 1 | 100 | 300 |" in text
    assert "| d | 0.99 | none, none | none, none | none, 90.0%, none, 91.0% | 2 | 0 | 0 | 0 | 100 | 300 |" in text
    assert "none where none does: 4 of 6 searches. As small as any that would certify again: 5 of 6." in text
    assert search_smallest.again(alone(0, 10, 0.7), 0.7) == pytest.approx(0.5)
    assert search_smallest.again(alone(0, 10, 0.7 + 0.01 * 2**0.5 * 1.2816), 0.7) == pytest.approx(0.9, abs=1e-4)
