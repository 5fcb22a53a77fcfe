"""Several processes on one command: what they are told, what they make, and work that outlives the death of one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, free_port

from ev3_distill import students
from ev3_distill.benchmarks import omniglot, protonet_training
from ev3_distill.cli.main import main
from ev3_distill.data.sources import load_data
from ev3_distill.runtime import ledger

RECIPE = protonet_training.Recipe(2, (3,), 60, 0.05, way=2, shot=1, query=1)
DRAWINGS = np.random.default_rng(0).integers(0, 256, (4, 20, 28, 28), np.uint8)
CHARACTERS = omniglot.Characters(DRAWINGS, DRAWINGS, DRAWINGS)

# What a process runs: `ev3-distill` on a tiny problem, in no hurry, so that there is time to kill it.
WORK = f"""
import sys, time
from ev3_distill.cli import main as cli
from ev3_distill.runtime import distributed as sharding
start, sharding.PEER_TIMEOUT_S = sharding.join_processes, 4

def started(*group):  # only then may the rest be imported
    joined = start(*group)
    sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "runtime")!r}]
    import test_distributed_processes as ours
    from ev3_distill.benchmarks import omniglot, protonet_evolution, protonet_training
    protonet_evolution.RECIPES, protonet_training.SAVE_S = {{"smoke": (ours.RECIPE,)}}, 0
    omniglot.load = lambda: ours.CHARACTERS
    save = protonet_training._save
    protonet_training._save = lambda *given: (save(*given), time.sleep(0.2))
    return joined

sharding.join_processes = started
cli.main(sys.argv[1:])
"""
# The same, by one process alone.
ALONE = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "runtime")!r}]
import test_distributed_processes as ours
ours.train(sys.argv[1])
"""
# A run on one core, whose checkpoints take their time.
RUN = """
import os, sys, time
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from ev3_distill.runtime import checkpoint, distributed as sharding
from ev3_distill.cli import main as cli
sharding.PEER_TIMEOUT_S, save = 4, checkpoint.Checkpoints.save
checkpoint.Checkpoints.save = lambda *given: (save(*given), time.sleep(0.2))
cli.main(sys.argv[1:])
"""
COMPRESS = (*("--arms", "ce", "mse", "--student", "mlp:hidden=8", "--checkpoint-s", "0"), "--budget")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["safety", "--processes", "2"],
            "suites that several processes can share are evolution, protonet; got 'safety'",
        ),
        (["protonet", "--processes", "many"], "--processes must be a positive number or 'auto'; got 'many'"),
        (["protonet", "--processes", "0"], "--processes must be a positive number or 'auto'; got '0'"),
        (["protonet", "--processes", "2"], "2 processes need a coordinator HOST:PORT"),
        (["protonet", "--processes", "2", "--coordinator", "a:1"], "needs its own number from 0 to 1; got None"),
        (
            ["protonet", "--coordinator", "a:1"],
            "--coordinator and --process-id are for several processes; got a:1",
        ),
        (["evolution", "--process-id", "0"], "--coordinator and --process-id are for several processes; got 0"),
    ],
)
def test_what_makes_no_group_is_told(cli, monkeypatch, argv, told):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    answer = cli("bench", *argv)
    assert answer.code == 2
    assert told in answer.err and answer.err.count("\n") == 1


def test_a_training_outlives_the_death_of_a_process(tmp_path):
    """Two processes train; one is killed; the other stops and says why; one process goes on where they were, as if alone."""
    coordinator = f"127.0.0.1:{free_port()}"
    begun = [_begin(tmp_path, coordinator, i) for i in (0, 1)]
    try:
        kept = _kept(tmp_path / "0", begun)
        begun[1].send_signal(signal.SIGKILL)
        died = time.monotonic()
        _, err = begun[0].communicate(timeout=60)
    finally:
        for process in begun:
            process.kill()
            process.communicate()
    assert begun[0].returncode != 0 and time.monotonic() - died < 60
    assert "start all anew" in err or "another task died" in err, err[-3000:]
    before = json.loads(str(_saved(kept)["log"]))
    assert 0 < before[-1]["generation"] < RECIPE.generations
    assert not (tmp_path / "1" / "protonet").exists()  # process 0 alone writes
    for place in (kept.parent, tmp_path / "alone"):
        alone = _begin(tmp_path, None, "cache", (str(place),), ALONE)
        _, err = alone.communicate(timeout=200)
        assert alone.returncode == 0, err[-3000:]
    resumed, whole = _saved(kept), _saved(tmp_path / "alone" / kept.name)
    log = json.loads(str(resumed.pop("log")))
    assert log[: len(before)] == before  # went on, and did not begin anew
    assert [row["generation"] for row in log] == list(range(1, RECIPE.generations + 1))
    assert whole.pop("log") is not None and resumed.keys() == whole.keys() and len(whole) > 0
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array)


def test_two_processes_make_one_run(tmp_path, logits):
    """Batches in two parts: the decisions of one process, in one directory, told by one of them."""
    asked = [*COMPRESS, "300", "--teacher", f"logits:{logits}"]
    coordinator = f"127.0.0.1:{free_port()}"
    begun = [
        _begin(tmp_path, coordinator, i, ["compress", *asked, "--out", str(tmp_path / "two")], RUN) for i in (0, 1)
    ]
    told = [process.communicate(timeout=200) for process in begun]
    assert [process.returncode for process in begun] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    assert "This student has at least" in told[0][0] and "Report" not in told[1][0]
    main(["compress", *asked, "--out", str(tmp_path / "one")])
    two, one = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("two", "one"))
    assert (two["devices"], one["devices"]) == ("2, batch spread, 2 processes", "1")
    assert two["cost"]["steps"] == one["cost"]["steps"]
    rows = [list(ledger.read_rows(tmp_path / name / "ledger.jsonl")) for name in ("two", "one")]
    for ours, theirs in zip(*(found[:3] for found in rows), strict=True):
        assert (ours["steps"], ours["selected"], ours["verdict"]) == (
            theirs["steps"],
            theirs["selected"],
            theirs["verdict"],
        )
        assert ours["champion_accuracy"] == pytest.approx(theirs["champion_accuracy"], abs=0.01)


def test_a_run_outlives_the_death_of_a_process(tmp_path, logits, cli):
    """One process goes on with it."""
    run, coordinator = tmp_path / "run", f"127.0.0.1:{free_port()}"
    argv = ["compress", *COMPRESS, "3000", "--teacher", f"logits:{logits}", "--out", str(run)]
    begun = [_begin(tmp_path, coordinator, i, argv, RUN) for i in (0, 1)]
    try:
        _kept(run, begun, "checkpoints/*/state")
        begun[1].send_signal(signal.SIGKILL)
        died = time.monotonic()
        _, err = begun[0].communicate(timeout=60)
    finally:
        for process in begun:
            process.kill()
            process.communicate()
    assert begun[0].returncode != 0 and time.monotonic() - died < 60
    assert "start all anew" in err or "another task died" in err, err[-3000:]
    before = len(list(ledger.read_rows(run / "ledger.jsonl")))
    assert cli("compress", "--resume", run).code == 0
    rows = [row["iteration"] for row in ledger.read_rows(run / "ledger.jsonl")]
    assert rows == list(range(1, len(rows) + 1)) and len(rows) > before > 0


@pytest.fixture
def logits(tmp_path):
    """Of a teacher of digits that is often right."""
    dataset = load_data("digits")
    rng = np.random.default_rng(0)
    said = 3 * np.eye(10)[dataset.labels] + rng.normal(size=(len(dataset.labels), 10))
    np.savez(tmp_path / "said.npz", logits=said.astype(np.float32))
    return tmp_path / "said.npz"


def _begin(tmp_path, coordinator, i, argv=("bench", "protonet", "--seeds", "1", "--size", "smoke"), work=WORK):
    """Process i of two, or one alone where there is no coordinator, with a cache of its own as on a machine of its own.

    It fuses by MLIR, as users' processes do: without, two of them wait for each other for ever where they share one core.
    """
    alone = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"}
    environment = {**os.environ, **alone, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["EV3_DISTILL_CACHE"] = str(tmp_path / str(i))
    group = ["--processes", "2", "--coordinator", coordinator, "--process-id", str(i)] if coordinator else []
    return subprocess.Popen(
        [sys.executable, "-c", work, *argv, *group],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(place):
    """In a process of its own: see ALONE."""
    protonet_training.trained_state(
        RECIPE, 0, students.from_name("conv4:width=2", protonet_training.SHAPE, 1), CHARACTERS, Path(place)
    )


def _saved(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _kept(place, begun, name="protonet/*/state.npz"):
    """The path of what process 0 keeps, once it is there."""
    until = time.monotonic() + 120
    while not (found := list(place.glob(name))):
        if any(process.poll() is not None for process in begun) or time.monotonic() > until:
            for process in begun:
                process.kill()
            raise AssertionError(begun[0].communicate()[1][-3000:])
        time.sleep(0.05)
    return found[0]
