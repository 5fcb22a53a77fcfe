"""Bounds of latencies: once and on record they hold as promised; the best of ten without correction does not."""

import numpy as np
import pytest

from ev3_distill.benchmarks import latency_coverage
from ev3_distill.benchmarks.latency_coverage import OFF_RECORD, ON_RECORD, ONCE, latency_claims, pass_times, true_median


def test_true_median_is_that_of_many_passes():
    times = pass_times(400_000, np.random.default_rng(0))
    assert np.median(times) == pytest.approx(true_median(), rel=1e-3)
    assert 0.04 < (times > 3).mean() < 0.06


def test_lowest_of_several_bounds_needs_a_correction():
    rows = [latency_claims(np.random.default_rng([0, run]), confidence=0.95) for run in range(400)]
    assert [claim["metric"] for claim in rows[0]] == [ONCE, ON_RECORD, OFF_RECORD]
    once, on_record, off_record = (
        np.mean([claim["upper_bound"] >= claim["truth"] for claim in claims]) for claims in zip(*rows, strict=True)
    )
    assert 0.92 < once < 0.99
    assert on_record > 0.98
    assert off_record < 0.75  # .95 ** 10 = .60, a little more because order statistics are discrete


def test_shares_are_those_of_reopenings(monkeypatch):
    asked = []
    monkeypatch.setattr(latency_coverage, "_upper", lambda times, share, confidence: asked.append(share) or share)
    latency_claims(np.random.default_rng(0), confidence=0.95)
    family = len(latency_coverage.claimable_metrics())
    expected = [1.0, *(1 / family / (j * (j + 1)) for j in range(1, 11)), *[1.0] * 10]
    assert asked == pytest.approx(expected)
