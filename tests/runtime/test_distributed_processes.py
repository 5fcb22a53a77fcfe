"""Commands in several processes: option errors, results equal to one process, and recovery from a killed process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import QUICK_COMPILE, ROOT, free_port

from ev3_distill import students
from ev3_distill.benchmarks import omniglot, protonet_training
from ev3_distill.cli.main import main
from ev3_distill.data.sources import load_data
from ev3_distill.runtime import ledger

RECIPE = protonet_training.Recipe(2, (3,), 60, 0.05, way=2, shot=1, query=1)
DRAWINGS = np.random.default_rng(0).integers(0, 256, (4, 20, 28, 28), np.uint8)
CHARACTERS = omniglot.Characters(DRAWINGS, DRAWINGS, DRAWINGS)

# Program of a process: `ev3-distill` on a tiny problem, slowed down so that there is time to kill it.
WORK = f"""
import sys, time
from ev3_distill.cli import main as cli
from ev3_distill.runtime import distributed as sharding
start, sharding.PEER_TIMEOUT_S = sharding.join_processes, 4

def started(*group):  # imports that initialize JAX must come after this
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
# The same training in a single process.
ALONE = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "runtime")!r}]
import test_distributed_processes as ours
ours.train(sys.argv[1])
"""
# A run with slow checkpoints.
RUN = """
import sys, time
from ev3_distill.runtime import checkpoint, distributed as sharding
from ev3_distill.cli import main as cli
sharding.PEER_TIMEOUT_S, save = 4, checkpoint.Checkpoints.save
checkpoint.Checkpoints.save = lambda *given: (save(*given), time.sleep(0.2))
cli.main(sys.argv[1:])
"""
COMPRESS = (*("--arms", "ce", "mse", "--student", "mlp:hidden=8", "--checkpoint-s", "0"), "--budget")


@pytest.mark.parametrize(
    ("argv", "message"),
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
def test_invalid_process_options_are_rejected(cli, monkeypatch, argv, message):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    answer = cli("bench", *argv)
    assert answer.code == 2
    assert message in answer.err and answer.err.count("\n") == 1


@pytest.mark.slow
def test_training_resumes_after_the_death_of_a_process(tmp_path):
    """After one of two processes is killed, the other stops with an error, and one process resumes with equal results."""
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [_launch(tmp_path, coordinator, i) for i in (0, 1)]
    try:
        checkpoint = _wait_for(tmp_path / "0", processes)
        processes[1].send_signal(signal.SIGKILL)
        died = time.monotonic()
        _, err = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode != 0 and time.monotonic() - died < 60
    assert "start all anew" in err or "another task died" in err, err[-3000:]
    before = json.loads(str(_load_arrays(checkpoint)["log"]))
    assert 0 < before[-1]["generation"] < RECIPE.generations
    assert not (tmp_path / "1" / "protonet").exists()  # only process 0 writes
    for place in (checkpoint.parent, tmp_path / "alone"):
        alone = _launch(tmp_path, None, "cache", (str(place),), ALONE)
        _, err = alone.communicate(timeout=200)
        assert alone.returncode == 0, err[-3000:]
    resumed, whole = _load_arrays(checkpoint), _load_arrays(tmp_path / "alone" / checkpoint.name)
    log = json.loads(str(resumed.pop("log")))
    assert log[: len(before)] == before  # resumed, not restarted
    assert [row["generation"] for row in log] == list(range(1, RECIPE.generations + 1))
    assert whole.pop("log") is not None and resumed.keys() == whole.keys() and len(whole) > 0
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array)


@pytest.mark.slow
def test_two_processes_make_the_decisions_of_one(tmp_path, logits):
    """With batches split in two, decisions equal those of one process, and only process 0 writes and prints."""
    options = [*COMPRESS, "300", "--teacher", f"logits:{logits}"]
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [
        _launch(tmp_path, coordinator, i, ["compress", *options, "--out", str(tmp_path / "two")], RUN) for i in (0, 1)
    ]
    texts = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts[0][1][-2000:] + texts[1][1][-2000:]
    assert "This student has at least" in texts[0][0] and "Report" not in texts[1][0]
    main(["compress", *options, "--out", str(tmp_path / "one")])
    two, one = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("two", "one"))
    assert (two["devices"], one["devices"]) == ("2, batch spread, 2 processes", "1")
    assert two["cost"]["steps"] == one["cost"]["steps"]
    rows = [list(ledger.read_rows(tmp_path / name / "ledger.jsonl")) for name in ("two", "one")]
    for two_row, one_row in zip(*(of_run[:3] for of_run in rows), strict=True):
        assert [two_row[key] for key in ("steps", "selected", "verdict")] == [
            one_row[key] for key in ("steps", "selected", "verdict")
        ]
        assert two_row["champion_accuracy"] == pytest.approx(one_row["champion_accuracy"], abs=0.01)


@pytest.mark.slow
def test_run_resumes_after_the_death_of_a_process(tmp_path, logits, cli):
    """A single process resumes it."""
    run, coordinator = tmp_path / "run", f"127.0.0.1:{free_port()}"
    argv = ["compress", *COMPRESS, "3000", "--teacher", f"logits:{logits}", "--out", str(run)]
    processes = [_launch(tmp_path, coordinator, i, argv, RUN) for i in (0, 1)]
    try:
        _wait_for(run, processes, "checkpoints/*/state")
        processes[1].send_signal(signal.SIGKILL)
        died = time.monotonic()
        _, err = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode != 0 and time.monotonic() - died < 60
    assert "start all anew" in err or "another task died" in err, err[-3000:]
    before = len(list(ledger.read_rows(run / "ledger.jsonl")))
    assert cli("compress", "--resume", run).code == 0
    rows = [row["iteration"] for row in ledger.read_rows(run / "ledger.jsonl")]
    assert rows == list(range(1, len(rows) + 1)) and len(rows) > before > 0


@pytest.fixture
def logits(tmp_path):
    """A file of logits of a fairly accurate teacher of digits."""
    dataset = load_data("digits")
    rng = np.random.default_rng(0)
    logits = 3 * np.eye(10)[dataset.labels] + rng.normal(size=(len(dataset.labels), 10))
    np.savez(tmp_path / "logits.npz", logits=logits.astype(np.float32))
    return tmp_path / "logits.npz"


def _launch(tmp_path, coordinator, i, argv=("bench", "protonet", "--seeds", "1", "--size", "smoke"), work=WORK):
    """Starts process i of two, or a single process without coordinator, with a cache of its own.

    MLIR fusion stays on, as for users: without it, two processes that share one core deadlock.
    """
    alone = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {QUICK_COMPILE}"}
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
    """Called in a process of its own: see ALONE."""
    protonet_training.trained_state(
        RECIPE, 0, students.from_name("conv4:width=2", protonet_training.SHAPE, 1), CHARACTERS, Path(place)
    )


def _load_arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _wait_for(place, processes, name="protonet/*/state.npz"):
    """Waits for the checkpoint of process 0; returns its path."""
    until = time.monotonic() + 120
    while not (paths := list(place.glob(name))):
        if any(process.poll() is not None for process in processes) or time.monotonic() > until:
            for process in processes:
                process.kill()
            raise AssertionError(processes[0].communicate()[1][-3000:])
        time.sleep(0.05)
    return paths[0]
