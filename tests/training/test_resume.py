"""A run that is killed or interrupted at any moment, any number of times, ends with the same results once resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import SMALL, assert_same_run, rows_without_times, variables_of

from ev3_distill.runtime.ledger import read_rows

KILLS = 9
PIECES = 3
LONGEST = 300  # seconds; after that, a process counts as hanging


def start(run):
    """Starts or resumes the run in a process of its own."""
    exists = (run / "config.toml").exists()
    argv = ["--resume", run] if exists else [*SMALL, "--out", run]
    command = [sys.executable, "-m", "ev3_distill", "compress", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait(process, reached):
    """Waits until `reached()` or the end of the process; returns whether the process is still alive."""
    started = time.perf_counter()
    while process.poll() is None and not reached():
        assert time.perf_counter() - started < LONGEST, "the process hangs"
        time.sleep(0.0005)
    return process.poll() is None


def half_written(run):
    """Checkpoints that Orbax is writing."""
    return [
        *run.glob("checkpoints/*.orbax-checkpoint-tmp*"),
        *run.glob("teacher/checkpoints/*.orbax-checkpoint-tmp*"),
    ]


def count_rows(run):
    paths = [run / "teacher" / "ledger.jsonl", run / "ledger.jsonl"]
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def random_moment(rng, run):
    """A name for a random moment of the run, and a predicate that becomes true at that moment."""
    kind = rng.choice(("time", "row", "checkpoint", "stage"))
    if kind == "time":
        until = time.perf_counter() + rng.uniform(0.0, 9.0)
        return kind, lambda: time.perf_counter() >= until
    if kind == "row":
        wanted = count_rows(run) + rng.randint(1, 8)
        return kind, lambda: count_rows(run) >= wanted
    if kind == "checkpoint":
        return kind, lambda: bool(half_written(run))
    stages = ("given.json", "config.toml", "teacher/student", "teacher/opened.json", "teacher/report.json", "checkpoints",
              "student", "opened.json", "certificate.json", "report.json")  # fmt: skip
    ahead = [name for name in stages if not (run / name).exists()]
    name = rng.choice(ahead[:3]) if ahead else "report.html"
    return f"{kind} {name}", (run / name).exists


@pytest.mark.parametrize("piece", [0, *(pytest.param(piece, marks=pytest.mark.slow) for piece in range(1, PIECES))])
def test_run_killed_at_random_moments_ends_with_the_same_results(piece, finished, tmp_path):
    rng = random.Random(piece)
    kills, torn, number = [], 0, 0
    run = tmp_path / "0"
    while len(kills) < KILLS // PIECES or not torn:
        process = start(run)
        kind, reached = random_moment(rng, run)
        if len(kills) >= KILLS // PIECES - 1 and not torn:  # at least one kill while a checkpoint is being written
            kind, reached = "checkpoint", lambda run=run: bool(half_written(run))
        if wait(process, reached):
            if kind != "checkpoint":
                time.sleep(rng.uniform(0, 0.03))
            process.kill()
        _, error = process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills.append(kind)
            torn += bool(half_written(run))
        else:
            assert process.returncode == 0, error
            assert_same_run(finished, run)
            number += 1
            run = tmp_path / str(number)
        assert len(kills) < 3 * KILLS, "no kill occurred while a checkpoint was being written"
    process = start(run)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert_same_run(finished, run)


@pytest.mark.parametrize("stage", [pytest.param("teacher/ledger.jsonl", marks=pytest.mark.slow), "ledger.jsonl"])
def test_interrupt_prints_how_to_resume(stage, finished, tmp_path):
    run = tmp_path / "run"
    process = start(run)
    assert wait(process, lambda: (run / stage).exists() and count_rows(run.joinpath(stage).parent) >= 3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.splitlines()[-1] == f"ev3-distill: interrupted; resume with: ev3-distill compress --resume {run}"
    assert "Traceback" not in error
    seen = count_rows(run)
    again = start(run)
    assert again.wait() == 0, again.communicate()[1]
    again.communicate()
    assert seen < count_rows(run)
    assert_same_run(finished, run)


def test_interrupt_saves_a_checkpoint_of_the_last_ledger_row(monkeypatch, cli, here, random_logits):
    """After Ctrl-C between an iteration and its row, with no checkpoint due, ledger and checkpoint agree."""
    from ev3_distill.training import run_loop, train

    options = ("--student", "mlp:hidden=8", "--arms", "ce", "--budget", "8000", "--teacher", f"logits:{random_logits}")
    options += ("--max-length", "50")  # more iterations than one dispatch holds
    assert cli("compress", *options, "--out", "whole").code == 0
    row_of = run_loop.row_of

    def interrupted(decision, *facts, **rest):
        if int(decision.iteration) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return row_of(decision, *facts, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_loop, "row_of", interrupted)
        answer = cli("compress", *options, "--out", "run")
    assert answer.code == 130
    assert "resume with: ev3-distill compress --resume run" in answer.err
    saved = len(rows_without_times(here / "run/ledger.jsonl"))
    assert 3 <= saved < len(rows_without_times(here / "whole/ledger.jsonl"))
    assert [path.name for path in (here / "run/checkpoints").iterdir()] == [str(saved)]

    iterations = []
    with monkeypatch.context() as patch:
        patch.setattr(train.RunProgress, "row", lambda self, row: iterations.append(row["iteration"]))
        assert cli("compress", "--resume", "run").code == 0
    assert iterations[0] == saved + 1
    assert newest(here / "run") == newest(here / "whole")
    assert_same_run(here / "whole", here / "run")


class Killed(BaseException):
    """Ends a process at once; nothing is saved."""


def test_wall_time_run_does_not_test_again_at_a_level_that_it_spent(monkeypatch, cli, here, random_logits):
    """Killed after a test, before its ledger row and a checkpoint. The resumed run has other candidates."""
    from ev3_distill.training import run_loop

    options = ("--student", "mlp:hidden=8", "--arms", "ce", "--budget", "4s", "--teacher", f"logits:{random_logits}")
    append, spent = run_loop.Ledger.append, here / "run/spent.json"

    def append_or_die(self, rows):
        if spent.exists():
            raise Killed
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(run_loop.Ledger, "append", append_or_die)
        with pytest.raises(Killed):
            cli("compress", *options, "--out", "run")
    left = json.loads(spent.read_text())["left"]
    assert left in (pytest.approx(0.04), pytest.approx(0.01))
    assert not any(row["test"] for row in read_rows(here / "run/ledger.jsonl"))
    assert cli("compress", "--resume", "run").code == 0
    first = next(row["test"] for row in read_rows(here / "run/ledger.jsonl") if row["test"])
    assert first["alpha"] <= left * (1 + 1e-6)
    assert json.loads(spent.read_text())["tests"] > 1


def test_run_killed_in_its_final_phase_ends_with_the_same_results(monkeypatch, cli, finished, here):
    from ev3_distill.training import iterate, run_loop

    append, turn, killed_at = run_loop.Ledger.append, 1200, 1300  # the phase is the last fifth of 1500 steps

    def append_or_die(self, rows):
        if rows[-1]["cost"] > killed_at:
            raise Killed
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(run_loop.Ledger, "append", append_or_die)
        patch.setattr(iterate, "DISPATCH_S", 0)  # one iteration in each call, so that there is a checkpoint of each
        with pytest.raises(Killed):
            cli("compress", *SMALL, "--out", "run")
    *_, last = read_rows(here / "run/ledger.jsonl")
    assert turn < last["cost"] <= killed_at and newest(here / "run") == last["iteration"]
    assert cli("compress", "--resume", "run").code == 0
    assert json.loads((here / "run/report.json").read_text())["student"]["delivered"] == "final"
    assert_same_run(finished, here / "run")


def newest(run):
    return max(int(path.name) for path in (run / "checkpoints").iterdir())


def test_early_interrupt_leaves_no_files(monkeypatch, cli, here):
    from ev3_distill.training import run_reader as room

    def load(source, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "load_data", load)
    answer = cli("compress", "--out", "run")
    assert (answer.code, answer.err) == (130, "ev3-distill: interrupted; nothing was written\n")
    assert not list(here.iterdir())


def test_seed_determines_the_run(cli, here, finished):
    assert cli("compress", *SMALL, "--out", "again").code == 0
    assert_same_run(finished, here / "again")
    assert cli("compress", *SMALL, "--seed", 1, "--out", "other").code == 0
    assert variables_of(finished) != variables_of(here / "other")
    assert rows_without_times(finished / "ledger.jsonl") != rows_without_times(here / "other" / "ledger.jsonl")


def test_resume_of_a_finished_run_changes_nothing(cli, here, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    answer = cli("compress", "--resume", finished)
    assert answer.code == 0
    assert "with 95 % confidence" in " ".join(answer.out.split())
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_resume_does_not_train_a_finished_teacher_again(monkeypatch, cli, here, random_logits):
    """Its logits are not computed again either."""
    from ev3_distill.teachers import targets
    from ev3_distill.training.train import run_loop

    iterate, trained = run_loop.iterate, []

    def stop(directory, *args, **kwargs):
        trained.append(directory.name)
        if directory.name == "run":
            raise KeyboardInterrupt
        return iterate(directory, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_loop, "iterate", stop)
        assert cli("compress", *SMALL, "--out", "run").code == 130
        patch.setattr(targets, "collect", None)
        assert cli("compress", "--resume", "run").code == 130
    assert trained == ["teacher", "run", "run"]
