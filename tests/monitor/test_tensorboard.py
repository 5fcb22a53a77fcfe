"""TensorBoard events contain the scalars of the ledger, once per step, even if a run is killed and resumed."""

import json
import sys

import pytest

from ev3_distill.monitor.tensorboard import Scalars, scalars_of

ROW = {"cost": 30, "champion_accuracy": 0.5, "current_accuracy": None, "length": 8.0, "gain": None, "wall_s": 2.0,
       "scores": {"ce": 0.25, "average": None}, "steps": {"ce": 30}, "risks": {"ece": 0.125}, "verdict": "promote",
       "proposed_accuracy": {"ce": 0.75}, "behind": {"ce": -0.125, "kd4": None},
       "tuned": {"ce": {"rate": 0.5, "weights": [1.0, 2.0]}}}  # fmt: skip


def test_scalars_are_the_numbers_of_a_ledger_row():
    assert scalars_of(ROW) == {
        "champion_accuracy": 0.5,
        "length": 8.0,
        "wall_s": 2.0,
        "score/ce": 0.25,
        "proposed/ce": 0.75,
        "behind/ce": -0.125,
        "steps/ce": 30.0,
        "risk/ece": 0.125,
        "promoted": 1.0,
        "tuned/ce/rate": 0.5,
    }


def test_missing_packages_are_an_error(cli, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "clu", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    result = cli("compress", "--out", "run", "--tensorboard", "events")
    assert result.code == 2
    assert "--tensorboard needs the packages clu and tensorflow" in result.err
    assert "pip install 'ev3-distill[tensorboard]'" in result.err
    assert list(here.iterdir()) == []


def steps_in(folder):
    import tensorflow

    steps = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in tensorflow.compat.v1.train.summary_iterator(str(path)):
            steps += [(event.step, value.tag) for value in event.summary.value]
    return steps


def distinct_costs(lines):
    """Distinct costs of ledger rows. The closing row repeats the cost of the row before it."""
    return sorted({json.loads(line)["cost"] for line in lines})


def test_each_step_is_written_once(finished, tmp_path):
    pytest.importorskip("clu", reason="needs clu, of the extra tensorboard")
    pytest.importorskip("tensorflow", reason="needs tensorflow, of the extra tensorboard")
    lines = (finished / "ledger.jsonl").read_text().splitlines(keepends=True)
    run, out = tmp_path / "run", tmp_path / "events"
    run.mkdir()
    for complete in (5, 3, len(lines)):  # killed after five rows, resumed from the third
        (run / "ledger.jsonl").write_text("".join(lines[:complete]) + lines[-1][:40] * (complete < len(lines)))
        scalars = Scalars(run, out)
        scalars.write()
        scalars.close()
    steps = [step for step, tag in steps_in(out / "student") if tag == "champion_accuracy"]
    assert steps == distinct_costs(lines)
    assert {"score/ce", "steps/mse", "length", "promoted"} <= {tag for _, tag in steps_in(out / "student")}


def test_run_writes_events(cli, here):
    pytest.importorskip("clu", reason="needs clu, of the extra tensorboard")
    pytest.importorskip("tensorflow", reason="needs tensorflow, of the extra tensorboard")
    options = ("--network", "mlp:hidden=8", "--budget", "300", "--out", "run", "--tensorboard", "events")
    assert cli("teach", *options).code == 0
    costs = distinct_costs((here / "run/ledger.jsonl").read_text().splitlines())
    assert [step for step, tag in steps_in(here / "events/student") if tag == "champion_accuracy"] == costs
    assert cli("teach", "--resume", "run", "--tensorboard", "events").code == 0
    assert [step for step, tag in steps_in(here / "events/student") if tag == "champion_accuracy"] == costs
