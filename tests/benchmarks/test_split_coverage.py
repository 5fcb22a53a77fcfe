"""Simulated splits of the coverage suite: promises hold as runs deal them, and not with joint strata or split patients."""

import numpy as np

from ev3_distill.benchmarks.certificate_coverage import _table_of_dealing, beyond
from ev3_distill.benchmarks.split_coverage import BY_EXAMPLES, BY_GROUPS, SHARES, near_copies, prior_splits


def test_simple_random_splits_promise_too_much_in_at_most_one_of_twenty():
    rows = [prior_splits(np.random.default_rng([0, run]), confidence=0.95, repetitions=8) for run in range(40)]
    for setting in range(len(SHARES)):
        runs, wrong, promoted = (sum(row[setting][name] for row in rows) for name in ("runs", "wrong", "promoted"))
        assert max(wrong, promoted) <= 0.05 * runs + 3 * (0.05 * 0.95 * runs) ** 0.5
    by_setting = {(part["classes"], part["share"]): part for row in rows for part in row}
    assert list(by_setting) == list(SHARES)
    jointly = sum(row[SHARES.index((10, 0.7))]["jointly_wrong"] for row in rows)
    assert jointly > 0.15 * 320  # joint strata: 22 %
    _, table = _table_of_dealing([{"dealt": row} for row in rows])
    assert table.count("\n") == 1 + len(SHARES)
    assert _table_of_dealing([{}]) == []


def test_near_copies_need_splits_by_groups():
    rows = [near_copies(np.random.default_rng([0, run]), confidence=0.95) for run in range(60)]
    by_examples, by_groups = zip(*rows, strict=True)
    assert {claim["metric"] for claim in by_examples} == {BY_EXAMPLES}
    assert min(claim["lower_bound"] for claim in by_examples) > 0.95
    assert {claim["metric"] for claim in by_groups} == {BY_GROUPS}
    assert sum(beyond(claim) > 0 for claim in by_groups) <= 3
