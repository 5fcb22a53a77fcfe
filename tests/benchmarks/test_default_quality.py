"""The quality suite: contenders, costs, and the comparison with the grid."""

from ev3_distill.benchmarks import default_quality


def quality_row(seed, contender, accuracy, held_out=0.5, cost=100):
    facts = {"cost": cost, "held_out": held_out, "accuracy": accuracy, "bound": accuracy - 0.02}
    return {"data": "digits", "seed": seed, "contender": contender, **facts}


def test_table_picks_the_grid_point_by_held_out_accuracy():
    """Of seed 0 that is the point which the test examples like least, and the grid costs all its points."""
    rows = [
        *[quality_row(seed, "EV3", 0.9 + seed / 100, cost=150) for seed in (0, 1)],
        quality_row(0, "grid T=4 alpha=0.9", 0.88, held_out=0.7),
        quality_row(0, "grid T=1 alpha=0.9", 0.95, held_out=0.6),
        quality_row(1, "grid T=4 alpha=0.9", 0.89, held_out=0.6),
        quality_row(1, "grid T=1 alpha=0.9", 0.91, held_out=0.7),
    ]
    table = default_quality.table(rows)
    assert "| best of the grid | 89.50 ± 19.06 | 87.50 | 200 |" in table
    assert "| KD, T = 4 | 88.50 ± 6.35 | 86.50 | 100 |" in table
    assert "EV3 minus best of the grid, paired: 1.00 (-11.71 to 13.71) points at 0.75 times the cost" in table
    assert "at no more than 0.33: missed, by its cost." in table
    assert (
        "EV3 minus KD, T = 4, paired: 2.00 (2.00 to 2.00) points at 1.50 times the cost; target > 0 at no more than 1.5: held."
        in table
    )


def test_collect_measures_each_missing_contender_once(tmp_path, monkeypatch):
    """The smoke size: each contender once, with what its cost comes to; a row at hand is left out."""
    monkeypatch.setattr(default_quality, "ALONE", ("ce",))
    monkeypatch.setattr(default_quality, "TEMPERATURES", (1.0, 4.0))
    monkeypatch.setattr(default_quality, "ALPHAS", (0.9,))
    rows = list(default_quality.collect(seeds=1, size="smoke", done=[("digits", 0, "EV3, tuning")]))
    costs = {row["contender"]: row["cost"] for row in rows}
    assert costs == {
        "ce": 150, "grid T=1 alpha=0.9": 150, "grid T=4 alpha=0.9": 150, "EV3": 225, "EV3, synergy": 450,
    }  # fmt: skip
    assert all(0 <= row["bound"] < row["accuracy"] <= 1 and 0 < row["held_out"] <= 1 for row in rows)
    by_name = {row["contender"]: row["accuracy"] for row in rows}
    assert by_name["grid T=1 alpha=0.9"] != by_name["grid T=4 alpha=0.9"]
