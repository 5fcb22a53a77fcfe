"""The quality suite: contenders at equal steps, the rows that each trains on, and the comparisons."""

import jax
import numpy as np
import pytest

from ev3_distill.benchmarks import default_quality
from ev3_distill.data import batches
from ev3_distill.data.sources import load_data


def quality_row(seed, contender, accuracy, held_out=None, cost=100):
    facts = {"cost": cost, "accuracy": accuracy, "bound": accuracy - 0.02}
    facts |= {} if held_out is None else {"held_out": held_out}
    return {"data": "digits", "seed": seed, "contender": contender, **facts}


def test_table_picks_the_grid_point_by_held_out_accuracy():
    """Of seed 0 that is the point which the test examples like least, and the grid costs all its points."""
    rows = [
        *[quality_row(seed, "EV3", 0.9 + seed / 100) for seed in (0, 1)],
        quality_row(0, "grid T=4 alpha=0.9", 0.88, held_out=0.7),
        quality_row(0, "grid T=1 alpha=0.9", 0.95, held_out=0.6),
        quality_row(1, "grid T=4 alpha=0.9", 0.89, held_out=0.6),
        quality_row(1, "grid T=1 alpha=0.9", 0.91, held_out=0.7),
    ]
    table = default_quality.table(rows)
    assert "| best of the grid | 89.50 ± 19.06 | 87.50 | 200 |" in table
    assert "| KD, T = 4 | 88.50 ± 6.35 | 86.50 | 100 |" in table
    assert (
        "EV3 minus best of the grid, paired, at 0.50 times its steps: 1.00 (-11.71 to 13.71) points; target ≥ 0: held, but the "
        "interval reaches below." in table
    )
    assert "EV3 minus KD, T = 4, paired, at 1.00 times its steps: 2.00 (2.00 to 2.00) points." in table


@pytest.mark.parametrize(("gain", "verdict"), [(-0.001, "held"), (-0.002, "missed")])
def test_target_is_a_tenth_of_a_point_below_kd_on_all_rows(gain, verdict):
    kd = [0.875, 0.75]
    rows = [quality_row(seed, "KD, all rows", x) for seed, x in enumerate(kd)]
    rows += [quality_row(seed, "EV3", x + gain + 1e-9) for seed, x in enumerate(kd)]
    points = f"{100 * gain:.2f} ({100 * gain:.2f} to {100 * gain:.2f})"
    assert (
        f"EV3 minus KD, all rows, paired, at 1.00 times its steps: {points} points; target ≥ -0.1: {verdict}."
        in default_quality.table(rows)
    )


def test_collect_measures_each_missing_contender_once_at_equal_steps(monkeypatch):
    """The smoke size: each contender once, none with more steps than another; a row at hand is left out."""
    monkeypatch.setattr(default_quality, "ALONE", ("ce",))
    monkeypatch.setattr(default_quality, "TEMPERATURES", (1.0, 4.0))
    monkeypatch.setattr(default_quality, "ALPHAS", (0.9,))
    rows = list(default_quality.collect(seeds=1, size="smoke", done=[("digits", 0, "EV3, tuning")]))
    costs = {row["contender"]: row["cost"] for row in rows}
    assert [*costs] == ["ce", "grid T=1 alpha=0.9", "grid T=4 alpha=0.9", "KD, all rows", "EV3"]
    assert set(costs.values()) == {150}
    assert all(0 <= row["bound"] < row["accuracy"] <= 1 for row in rows)
    by_name = {row["contender"]: row["accuracy"] for row in rows}
    assert by_name["grid T=1 alpha=0.9"] != by_name["grid T=4 alpha=0.9"]
    held_out = {
        row["contender"] for row in rows if "held_out" in row
    }  # of students that have not learned from these rows
    assert held_out == {"grid T=1 alpha=0.9", "grid T=4 alpha=0.9"}


def test_all_rows_are_those_of_the_three_splits_and_no_others():
    """Epochs of the usual pool visit explore alone; those of all rows also visit assess and decide, never a sealed row."""
    digits = load_data("digits")
    pools, test = batches.split(digits, np.zeros((len(digits.labels), 10), np.float32), seed=3)
    sample = batches.sampler(batch_size=64)

    def visited(pool, rows):
        return {int(i) for step in range(4 * rows // 64) for i in sample(pool, jax.numpy.int32(step)).index}

    assess, decide, sealed = ({*map(int, split.index)} for split in (pools.assess, pools.decide, test))
    everything = {*range(len(digits.labels))}
    explore = everything - assess - decide - sealed
    assert visited(pools.explore, len(explore)) == explore
    assert visited(default_quality.with_all_rows(pools).explore, len(everything - sealed)) == everything - sealed
