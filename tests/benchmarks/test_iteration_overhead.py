"""The throughput suite: its contenders do the same training, and its table compares their speeds."""

import json

import jax
import numpy as np
import pytest

from ev3_distill.benchmarks import (
    iteration_overhead,
)
from ev3_distill.cli.main import main
from ev3_distill.errors import InputError


@pytest.fixture(scope="module")
def contenders(tmp_path_factory):
    """Every contender over 20 steps, in iterations and calls of 10."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration_overhead, "CONFIG", iteration_overhead.EV3(batch_size=128, length=10, max_length=10))
        ledger = tmp_path_factory.mktemp("throughput") / "ledger.jsonl"
        yield iteration_overhead.contenders(20, 20, ledger=ledger, race_steps=20)


@pytest.mark.parametrize("name", ["ev3", "ev3 with ledger", "bare, calls of 100", "reference way"])
def test_contenders_reach_the_same_parameters(contenders, name):
    pools = iteration_overhead.problem(3)
    bare = contenders["bare, one call"][0](pools, 3)()
    found = contenders[name][0](pools, 3)()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(bare), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def test_race_trains_what_four_bare_loops_train(contenders):
    """Four arms of different losses and optimizers, each with the steps of its own bare loop, on the same batches."""
    pools = iteration_overhead.problem(3)
    race, bare = (contenders[name][0](pools, 3)() for name in ("race of four", "four bare loops"))
    assert len(race) == len(bare) == 4 and {contenders[name][1] for name in ("race of four", "four bare loops")} == {80}
    for a, b in zip(jax.tree.leaves(race), jax.tree.leaves(bare), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)
    assert len({float(jax.tree.leaves(params)[0].sum()) for params in race}) == 4


def test_training_changes_parameters_and_depends_on_the_seed(contenders):
    bare, start = contenders["bare, one call"][0], iteration_overhead.problem(3)
    one, other = jax.tree.leaves(bare(start, 3)()), jax.tree.leaves(bare(start, 4)())
    assert max(float(abs(a - b).max()) for a, b in zip(one, other, strict=True)) > 0.1


def test_problem_has_the_documented_split_sizes():
    pools = iteration_overhead.problem(0)
    assert [len(split.index) for split in (pools.explore.examples, *pools[1:3])] == [1024, 512, 1024]
    assert (
        len(set(np.asarray(pools.explore.examples.index)) | set(np.asarray(pools.assess.index))) == 1536
    )  # none twice


def test_command_writes_rows_and_prints_the_table(tmp_path, capsys):
    main(["bench", "throughput", "--seeds", "2", "--size", "smoke", "--out", str(tmp_path)])
    head, *found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in found] == [0, 1]
    assert all(speed > 0 for row in found for speed in row["steps_per_s"].values())
    assert head["command"] == "ev3-distill bench throughput --seeds 2 --size smoke"
    assert head["versions"]["jax"] == jax.__version__
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "table.md").read_text()
    assert "bench throughput: row 2, seed 1" in printed.err


def test_table_compares_with_the_faster_bare_loop():
    speed = {
        "ev3": 95.0,
        "ev3 with ledger": 80.0,
        "bare, one call": 90.0,
        "bare, calls of 100": 100.0,
        "reference way": 4.0,
        "race of four": 81.0,
        "four bare loops": 90.0,
    }
    text = iteration_overhead.table([{"seed": seed, "steps": 1, "steps_per_s": speed} for seed in range(7)])
    assert "| ev3 / `bare, calls of 100` | 0.95 (0.95 to 0.95) | ≥ 0.9: held |" in text
    assert "| ev3 / reference way | 23.75 (23.75 to 23.75) | ≥ 20: held |" in text
    assert "| race of four / four bare loops | 0.90 (0.90 to 0.90) | ≥ 0.9: held |" in text
    assert "| reference way | 4 (4 to 4) |" in text


def test_full_size_requires_seven_turns():
    with pytest.raises(InputError, match="at least 7 turns; got 3"):
        list(iteration_overhead.collect(seeds=3, size="full"))
