"""Errors of runs: recovery from full disks and damaged files, and rejection of other inputs or options."""

import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import SMALL, assert_same_run, small_disk
from refused_inputs import refused, save_npz

# The run directory.


def test_occupied_directory_is_rejected(cli, here):
    (here / "run").mkdir()
    (here / "run" / "thesis.tex").write_text("mine")
    (here / "file").write_text("mine")
    for name in ("run", "file"):
        for command in ("compress", "teach"):
            says = f"does not exist or is empty; {name} is neither: choose another --out, or continue the run with --resume"
            refused(cli, here, command, "--out", name, says=says)


def test_directory_that_cannot_be_created_is_rejected(cli, here):
    (here / "file").write_text("mine")
    argv = ["compress", "--out", "file/run"]
    refused(
        cli,
        here,
        *argv,
        says=r"a directory that can be created and written; got file/run \(Not a directory\): choose another",
    )


def test_empty_directory_or_one_of_a_killed_start_counts_as_new(here, finished):
    from ev3_distill.training import run_dir

    (here / "run").mkdir()
    run_dir.refuse_occupied(here / "run")
    (here / "run" / "given.json").write_text("{}")
    (here / "run" / ".config.toml.tmp").write_text("seed")
    run_dir.refuse_occupied(here / "run")
    run_dir.refuse_occupied(here / "new")
    (here / "run" / ".vimrc").write_text("mine")
    with run_dir.lock_run(here / "run"):  # removes half-written files and nothing else
        assert sorted(path.name for path in (here / "run").iterdir()) == [".vimrc", "given.json"]
    with pytest.raises(run_dir.InputError, match="is neither"):
        run_dir.refuse_occupied(here / "run")


def test_resume_needs_a_run(cli, here):
    says = "--resume needs a run directory; no has no config.toml: name another, or start a new run with --out"
    refused(cli, here, "compress", "--resume", "no", says=says)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--budget", "1600"], "budget"),
        (["--seed=1", "--arms", "ce"], "seed, arms"),
        (["--delta", "0.1"], "ev3"),
        (["--out", "elsewhere"], "--out"),
        (["--config", "same.toml"], "--config"),
    ],
)
def test_resume_rejects_another_configuration(cli, here, finished, options, changed):
    shutil.copy(finished / "config.toml", here / "same.toml")
    says = f"a resumed run keeps its configuration; got another {changed}: resume without it, or start a new run with --out"
    refused(cli, here, "compress", "--resume", finished, *options, says=says)


def test_resume_rejects_a_run_of_the_other_command(cli, here, finished):
    says = "teach --resume needs a run of teach; .*run is a run of compress: use compress --resume"
    refused(cli, here, "teach", "--resume", finished, says=says)
    says = "compress --resume needs a run of compress; .*teacher is a run of teach: use teach --resume"
    refused(cli, here, "compress", "--resume", finished / "teacher", says=says)


def test_run_is_locked_by_one_process(cli, here, finished):
    from ev3_distill.training import run_dir

    holder = "import sys; from pathlib import Path; from ev3_distill.training import run_dir\n"
    holder += "with run_dir.lock_run(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    command = [sys.executable, "-c", holder, str(finished)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        says = f"only one process at a time may work in a run; another one works in {finished}: wait for it"
        refused(cli, here, "compress", "--resume", finished, says=says)
        process.kill()  # the lock is released with its process
    with run_dir.lock_run(finished):
        pass


def test_resume_rejects_changed_data(cli, here, monkeypatch, random_logits):
    """Before the teacher is trained, and after its logits are stored."""
    from ev3_distill.training.train import run_loop

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    np.savez(here / "logits.npz", logits=np.random.default_rng(0).normal(size=(60, 3)))
    with monkeypatch.context() as patch:
        patch.setattr(run_loop, "iterate", stop)
        for name, options in (("own", ()), ("file", ("--teacher", "logits:logits.npz"))):
            save_npz(here / "data.npz")
            assert cli("compress", "--data", "npz:data.npz", *options, "--out", name).code == 130
            save_npz(here / "data.npz", labels=np.arange(60)[::-1] % 3)
            says = (
                r"needs the data that it started with, fingerprint \w{12}; got \w{12}: restore the old data, or start"
            )
            refused(cli, here, "compress", "--resume", name, says=says)


def test_evaluate_rejects_changed_data(cli, here, finished):
    shutil.copytree(finished, here / "run")
    config = (here / "run" / "config.toml").read_text()
    save_npz(here / "data.npz", rows=90, inputs=np.arange(5760.0).reshape(90, 8, 8), labels=np.arange(90) % 10)
    (here / "run" / "config.toml").write_text(config.replace('data = "digits"', 'data = "npz:data.npz"'))
    refused(cli, here, "evaluate", "run", says="needs the data that it started with")


# Checkpoints.


@pytest.fixture
def interrupted(cli, here, monkeypatch, finished):
    """A copy of the finished run with checkpoints but without results, as if it had been interrupted."""
    shutil.copytree(finished, here / "run")
    for name in ("report.json", "report.html"):
        (here / "run" / name).unlink()
    shutil.rmtree(here / "run" / "student")
    return here / "run"


def checkpoints(run):
    return sorted((path for path in (run / "checkpoints").iterdir()), key=lambda path: int(path.name))


def damage(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            os.truncate(path, path.stat().st_size // 2)


def test_resume_falls_back_from_a_truncated_checkpoint(cli, interrupted, finished):
    newest = checkpoints(interrupted)[-1]
    damage(newest)
    answer = cli("compress", "--resume", interrupted)
    assert answer.code == 0
    says = f"ev3-distill: warning: checkpoint {newest.name} is damaged, falling back to the one before ("
    assert sum(line.startswith(says) for line in answer.err.splitlines()) == 1
    assert_same_run(finished, interrupted)


def test_resume_needs_one_readable_checkpoint(cli, here, interrupted):
    for path in checkpoints(interrupted):
        damage(path)
    answer = cli("compress", "--resume", interrupted)
    assert answer.code == 2
    error = [line for line in answer.err.splitlines() if line.startswith("ev3-distill: error")]
    assert len(error) == 1
    assert "a resume needs one readable checkpoint; got 3 in " in error[0]
    assert error[0].endswith("resume with that version, or start a new run in another directory")
    assert len(checkpoints(interrupted)) == 3


def test_resume_rejects_a_ledger_shorter_than_its_checkpoint(cli, interrupted):
    ledger = interrupted / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:3]))
    answer = cli("compress", "--resume", interrupted)
    assert answer.code == 2
    assert "a resume needs the ledger row of every iteration that the checkpoint includes" in answer.err
    assert len(ledger.read_bytes().splitlines()) == 3


# A full disk.


def compress(*argv, limit=resource.RLIM_INFINITY):
    """Runs compress in a process of its own, with a limit on file size in bytes."""
    code = "import resource, sys; from ev3_distill.cli.main import main; "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY})); main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "compress", *map(str, argv)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def assert_full_disk_is_reported(process, run):
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1] == (
        f"ev3-distill: error: a run needs free space on its disk; {run} is on a full one: free some, then "
        f"--resume {run} (nothing up to the last checkpoint is lost)"
    )


@pytest.mark.slow
@pytest.mark.parametrize("free_kib", [40, 400])  # KiB: full during training of the teacher, of the student
def test_run_resumes_after_a_full_disk(free_kib, finished, tmp_path):
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    with small_disk(disk, "16m"):
        ballast = disk / "ballast"
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - free_kib * 1024))
        assert_full_disk_is_reported(compress(*SMALL, "--out", run), run)
        ballast.unlink()
        resumed = compress("--resume", run)
        assert resumed.returncode == 0, resumed.stderr
        assert_same_run(finished, run)


def test_run_resumes_after_a_limit_on_file_size(finished, tmp_path, monkeypatch):
    """EFBIG instead of ENOSPC: a file of teacher outputs, 43 kB, is the first that is too large."""
    run = tmp_path / "run"
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "cache"))
    assert_full_disk_is_reported(compress(*SMALL, "--out", run, limit=40_000), run)
    resumed = compress("--resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(finished, run)


# Evaluate and report.


def test_evaluate_and_report_need_a_finished_run(cli, here, interrupted):
    refused(
        cli,
        here,
        "evaluate",
        interrupted,
        says=r"evaluate needs a finished run; .*run has no report.json: finish it with",
    )
    refused(cli, here, "report", interrupted, says=r"a run needs a readable report.json; .*: name another run")
    (interrupted / "report.json").write_text("{")
    refused(cli, here, "evaluate", interrupted, says=r"a run needs a readable report.json; .*: name another run")
    refused(cli, here, "report", interrupted, says=r"a run needs a readable report.json; .*: name another run")


def test_evaluate_rejects_data_of_other_shapes(cli, here, finished):
    save_npz(here / "vectors.npz")
    save_npz(here / "more.npz", inputs=np.arange(3840.0).reshape(60, 8, 8), labels=np.arange(60) % 12)
    says = r"takes inputs of shape \[8, 8, 1\]; npz:vectors.npz has \[4\]: name data like"
    refused(cli, here, "evaluate", finished, "--data", "npz:vectors.npz", says=says)
    says = r"npz:more.npz has 10, 11, the student knows 0, 1, 2, 3, 4 and 5 more"
    refused(cli, here, "evaluate", finished, "--data", "npz:more.npz", says=says)


def test_evaluate_rejects_a_bad_confidence(cli, here, finished):
    refused(cli, here, "evaluate", finished, "--confidence", "1.5", says="confidence must lie between 0 and 1")


def test_separate_process_reports_the_same_error(here):
    process = compress("--budget", "ten", "--out", here / "run")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("ev3-distill: error: a budget must be a positive number of steps")
    assert process.stderr.count("\n") == 1
    assert not list(here.iterdir())
