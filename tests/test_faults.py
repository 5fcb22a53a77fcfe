"""What can go wrong: bad input gives one clear error and writes nothing; broken surroundings lose nothing.

Every error names the rule, the value got, and the way out.
"""

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import SMALL, assert_same_run

ROWS, CLASSES = 1797, 10


def refused(cli, here, *argv, says):
    """The command line ends with code 2, one error that says so, no traceback, and nothing written."""
    before = sorted(here.rglob("*"))
    answer = cli(*argv)
    assert answer.code == 2, answer
    assert answer.out == ""
    assert re.search(says, answer.err), answer.err
    assert "Traceback" not in answer.err
    if not says.startswith("tyro:"):
        assert answer.err.startswith("ev3-distill: error: ")
        assert answer.err.count("\n") == 1, answer.err
    assert sorted(path for path in here.rglob("*") if "__pycache__" not in path.parts) == before
    return answer.err


def save_npz(path, *, rows=60, **changes):
    rng = np.random.default_rng(0)
    arrays = {"inputs": rng.normal(size=(rows, 4)).astype(np.float32), "labels": np.arange(rows) % 3, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


# The command line.


def test_unknown_option(cli, here):
    answer = cli("compress", "--colour", "red")
    assert answer.code == 2
    assert "Unrecognized options: --colour" in answer.err
    assert not list(here.iterdir())


@pytest.mark.parametrize("argv", [[], ["shrink"]])
def test_unknown_command(cli, here, argv):
    answer = cli(*argv)
    assert answer.code == 2
    for name in ("compress", "teach", "evaluate", "report", "bench"):
        assert name in answer.err


def test_resume_without_a_value(cli, here):
    answer = cli("compress", "--resume")
    assert answer.code == 2
    assert "--resume" in answer.err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--budget", "ten", r"a budget is a positive number of steps \(2000\).*; got 'ten': try 2000"),
        ("--budget", "-3", "got '-3': try 2000"),
        ("--budget", "nan", "got 'nan': try 2000"),
        ("--budget", "1.5", r"got '1\.5': try 2000"),
        ("--budget", "900000000e", r"a budget is below 1073741824 steps; got '900000000e', \d+ steps: give less"),
        ("--teacher-budget", "0", "got '0': try 2000"),
        ("--seed", "-1", r"seed must be 0 to 2\^31 - 1; got -1: try 0"),
        ("--confidence", "95", "confidence must be at least 0.5 and below 1; got 95.0: try 0.95"),
        ("--deliver", "newest", "deliver is best or champion; got 'newest': try best"),
        ("--test", "0", r"every split's fraction must be positive; got .*: raise the one that is not"),
        ("--delta", "2", "delta is a probability above 0 and below 1; got 2.0: try 0.05"),
        ("--arms", "sgd", r"an arm is one of ce, .*, or a mix .* of kd, .*; got 'sgd': for example 0\.7\*kd\+0\.3\*ce"),
        ("--arms", "0.5*kd+ce", r"an arm is one of ce, .*; got '0\.5\*kd\+ce'"),
        ("--arms", "1*kd@0", r"an arm is one of ce, .*; got '1\*kd@0'"),
        ("--data", "mnist", "a data source is digits, npz:FILE, .* or tfds:NAME; got 'mnist': name one of these"),
        ("--data", "npz:no.npz", "got no.npz, which is missing or no file: check the path"),
        (
            "--teacher",
            "torch:x.pt",
            r"torch:FILE needs a file; got 'x.pt', which is missing or no file: check the path",
        ),
        ("--teacher", "flax:", r"a teacher is KIND:PLACE with a KIND of onnx, .* or logits; got 'flax:': for example"),
        ("--teacher", "logits:no.npz", "got no.npz, which is missing or no file: check the path"),
        ("--teacher", "flax:nowhere", r"nowhere has none that can be read .*: name a finished run"),
        ("--student", "cnn", r"a student is one of mlp.* or MODULE:FACTORY; got 'cnn': for example"),
        ("--student", ":make", r"got ':make': for example"),
        ("--student", "mlp:width=3", "the options of mlp are hidden; got width: take one of those"),
        ("--student", "mlp:hidden=big", r"NAME=NUMBER .*got 'hidden=big' in 'mlp:hidden=big': try mlp:hidden=32-32"),
        ("--student", "mlp:hidden=0", r"of numbers from 1; got 'hidden=0'"),
        ("--teacher-network", "cnn", r"got 'cnn': for example"),
    ],
)
def test_bad_option(cli, here, option, value, says):
    refused(cli, here, "compress", f"{option}={value}", says=says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sedd = 1", r"a configuration's keys are data, .*; got 'sedd' in bad.toml: remove it"),
        (
            "[ev3]\nbatch = 1",
            r"a configuration's keys are batch_size, .*; got 'batch' in \[ev3\] of bad.toml: remove it",
        ),
        ("seed = '1'", "'seed' in bad.toml is a int; got '1': write it like 0"),
        ("seed = true", "'seed' in bad.toml is a int; got True: write it like 0"),
        ("arms = [1]", r"'arms' in bad.toml is a tuple; got \[1\]"),
        ("ev3 = 3", r"'ev3' in bad.toml is a table; got 3: write \[ev3\]"),
        ("[splits]\ntest = 0.5", r"the splits' fractions must sum to 1; got 1\.3.*: rescale them"),
        ("seed = ", r"a configuration is a TOML file; bad.toml is not \(.*\): mend it"),
        (b"\xff\xfe", r"a configuration is a TOML file; bad.toml is not \(.*\): mend it"),
    ],
)
def test_bad_configuration(cli, here, text, says):
    (here / "bad.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(cli, here, "compress", "--config", "bad.toml", says=says)


def test_missing_configuration(cli, here):
    refused(cli, here, "compress", "--config=no.toml", says=r"readable TOML file; got no.toml \(No such file")


# The data.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": None}, "needs labels; npz:data.npz has none: name a --teacher, or data with labels"),
        ({"inputs": np.array([None, "x"], object)}, "got Python objects in 'inputs': save it with a plain dtype"),
        ({"labels": np.arange(60) % 3 - 1}, "labels must not be negative; got -1 in row 0: number classes from 0"),
        (
            {"class_names": np.array(["a", "b"])},
            "labels must be below the number of class_names, 2; got 2 in row 2: add names or mend labels",
        ),
        ({"labels": np.arange(59) % 3}, r"must have the same length .*; got \[60, 4\] and \[59\]: pair them up"),
        (
            {"inputs": np.where(np.arange(240).reshape(60, 4) == 165, np.nan, 1.0)},
            "inputs must be finite; got nan or infinity in row 41: repair or remove that example",
        ),
        ({"labels": np.linspace(0, 2, 60)}, "labels must be integers; got float64: convert"),
    ],
)
def test_bad_data(cli, here, changes, says):
    save_npz(here / "data.npz", **changes)
    refused(cli, here, "compress", "--data", "npz:data.npz", "--out", "run", says=says)
    refused(cli, here, "teach", "--data", "npz:data.npz", "--out", "run", says=says)


def test_too_few_examples(cli, here):
    save_npz(here / "data.npz", rows=4)
    says = "got 4 examples, too few for .*: give at least 7, or other fractions"
    refused(cli, here, "compress", "--data", "npz:data.npz", "--out", "run", says=says)


def test_truncated_data(cli, here):
    save_npz(here / "data.npz")
    whole = (here / "data.npz").read_bytes()
    (here / "data.npz").write_bytes(whole[: len(whole) // 2])
    refused(
        cli, here, "compress", "--data", "npz:data.npz", says="must be a whole npz file; got one that cannot be read"
    )


# The teacher.


@pytest.mark.parametrize(
    ("logits", "says"),
    [
        (
            np.zeros((ROWS - 1, CLASSES)),
            f"one row per example, {ROWS}; got {ROWS - 1}: run the teacher on this data set",
        ),
        (np.zeros((ROWS, CLASSES + 1)), f"one column per class, {CLASSES}; got {CLASSES + 1}: use a teacher of these"),
        (
            np.where(np.arange(ROWS)[:, None] == 77, np.inf, np.zeros((ROWS, CLASSES))),
            "logits must be finite; got nan or infinity in row 77: check the teacher",
        ),
        (np.array([None]), "got Python objects in 'logits'"),
    ],
)
def test_bad_logits(cli, here, logits, says):
    np.savez(here / "logits.npz", logits=logits)
    refused(cli, here, "compress", "--teacher", "logits:logits.npz", "--out", "run", says=says)


def test_logits_of_other_data(cli, here):
    np.savez(here / "logits.npz", logits=np.zeros((ROWS, CLASSES)), fingerprint=np.array("f00"))
    refused(cli, here, "compress", "--teacher", "logits:logits.npz", says="very data set, fingerprint .*; got f00: ")


def test_flax_teacher_of_other_data(cli, here, finished):
    save_npz(here / "data.npz")
    argv = ["compress", "--data", "npz:data.npz", "--teacher", f"flax:{finished}", "--out", "run"]
    refused(
        cli,
        here,
        *argv,
        says=r"a teacher's input must be of the data's size; flax:.* takes \[8, 8, 1\], the examples are \[4\]: take another",
    )


# The user's own student.


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, r"got 'own_0:make', which fails with ModuleNotFoundError: No module named 'own_0': check the name"),
        ("1 +", r"got 'own_1:make', which fails with SyntaxError"),
        ("raise RuntimeError('at import')", r"got 'own_2:make', which fails with RuntimeError: at import"),
        ("x = 1", r"got 'own_3:make', which fails with AttributeError: .*'make'"),
        ("make = 7", r"FACTORY is callable; got int of 'own_4:make': name a function"),
        (
            "def make(input_shape, num_classes, rngs): raise KeyError('oh')",
            r"own_5:make .* fails with KeyError: 'oh': mend",
        ),
        ("def make(): pass", r"own_6:make .* fails with TypeError: make\(\) got an unexpected keyword"),
        ("def make(input_shape, num_classes, rngs): return 3", r"own_7:make .* fails with .*: mend it"),
        (
            "from flax import nnx\n"
            "def make(input_shape, num_classes, rngs):\n"
            "    return nnx.Sequential(lambda x: x.reshape(len(x), -1), nnx.Linear(64, num_classes + 1, rngs=rngs))\n",
            r"logits float32 \[B, K\], \[2, 10\] for 2 examples; own_8:make gives float32 \[2, 11\]: mend its last layer",
        ),
        (
            "from flax import nnx\n"
            "def make(input_shape, num_classes, rngs): return nnx.Linear(7, num_classes, rngs=rngs)\n",
            r"inputs \[B, 8, 8, 1\] to logits \[B, K\]; own_9:make .* fails with TypeError: ",
        ),
    ],
)
def test_bad_factory(cli, here, request, code, says):
    module = re.search(r"own_\d", says)[0]
    if code is not None:
        (here / f"{module}.py").write_text(code)
    refused(cli, here, "compress", "--student", f"{module}:make", "--out", "run", says=says)
    if module == "own_8":
        refused(cli, here, "compress", "--teacher-network", f"{module}:make", "--out", "run", says=says)


# The run directory.


def test_occupied_directory(cli, here):
    (here / "run").mkdir()
    (here / "run" / "thesis.tex").write_text("mine")
    (here / "file").write_text("mine")
    for name in ("run", "file"):
        for command in ("compress", "teach"):
            says = f"does not exist or is empty; {name} is neither: choose another --out, or go on with it by --resume"
            refused(cli, here, command, "--out", name, says=says)


def test_directory_that_cannot_be_made(cli, here, random_logits):
    (here / "file").write_text("mine")
    argv = ["compress", "--teacher", f"logits:{random_logits}", "--out", "file/run"]
    refused(
        cli,
        here,
        *argv,
        says=r"a directory that it can make and write; got file/run \(Not a directory\): choose another",
    )


def test_empty_directory_and_a_killed_beginning_are_new(here, finished):
    from ev3_distill import run

    (here / "run").mkdir()
    run.refuse_occupied(here / "run")
    (here / "run" / "given.json").write_text("{}")
    (here / "run" / ".config.toml.tmp").write_text("seed")
    run.refuse_occupied(here / "run")
    run.refuse_occupied(here / "new")
    (here / "run" / ".vimrc").write_text("mine")
    with run.held(here / "run"):  # cleans up what is half written, and nothing else
        assert sorted(path.name for path in (here / "run").iterdir()) == [".vimrc", "given.json"]
    with pytest.raises(run.InputError, match="is neither"):
        run.refuse_occupied(here / "run")


def test_resume_of_no_run(cli, here):
    says = "--resume needs the directory of a run; no has no config.toml: name another, or start one by --out"
    refused(cli, here, "compress", "--resume", "no", says=says)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--budget", "1600"], "budget"),
        (["--seed=1", "--arms", "ce"], "arms, seed"),
        (["--delta", "0.1"], "ev3"),
        (["--out", "elsewhere"], "--out"),
        (["--config", "same.toml"], "--config"),
    ],
)
def test_resume_with_another_configuration(cli, here, finished, options, changed):
    shutil.copy(finished / "config.toml", here / "same.toml")
    says = f"a resumed run keeps its configuration; got another {changed}: resume without it, or start anew with --out"
    refused(cli, here, "compress", "--resume", finished, *options, says=says)


def test_resume_by_the_other_command(cli, here, finished):
    says = "teach --resume needs a run of teach; .*run is one of compress: use compress --resume"
    refused(cli, here, "teach", "--resume", finished, says=says)
    says = "compress --resume needs a run of compress; .*teacher is one of teach: use teach --resume"
    refused(cli, here, "compress", "--resume", finished / "teacher", says=says)


def test_two_processes_in_one_run(cli, here, finished):
    from ev3_distill import run

    holder = "import sys; from pathlib import Path; from ev3_distill import run\n"
    holder += "with run.held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    command = [sys.executable, "-c", holder, str(finished)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        says = f"one process at a time may work in a run; another works in {finished}: wait for it"
        refused(cli, here, "compress", "--resume", finished, says=says)
        process.kill()  # the lock goes with its holder
    with run.held(finished):
        pass


def test_data_that_changed_since_the_start(cli, here, monkeypatch, random_logits):
    """Whether the teacher was not yet trained, or its logits were already kept."""
    from ev3_distill import run

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    np.savez(here / "logits.npz", logits=np.random.default_rng(0).normal(size=(60, 3)))
    with monkeypatch.context() as patch:
        patch.setattr(run, "iterate", stop)
        for name, options in (("own", ()), ("file", ("--teacher", "logits:logits.npz"))):
            save_npz(here / "data.npz")
            assert cli("compress", "--data", "npz:data.npz", *options, "--out", name).code == 130
            save_npz(here / "data.npz", labels=np.arange(60)[::-1] % 3)
            says = r"needs the data that it began with, fingerprint \w{12}; got \w{12}: put the old data back, or start anew"
            refused(cli, here, "compress", "--resume", name, says=says)


def test_data_that_changed_since_the_end(cli, here, finished):
    shutil.copytree(finished, here / "run")
    config = (here / "run" / "config.toml").read_text()
    save_npz(here / "data.npz", rows=90, inputs=np.ones((90, 8, 8)), labels=np.arange(90) % 10)
    (here / "run" / "config.toml").write_text(config.replace('data = "digits"', 'data = "npz:data.npz"'))
    refused(cli, here, "evaluate", "run", says="needs the data that it began with")


# Checkpoints.


@pytest.fixture
def interrupted(cli, here, monkeypatch, finished):
    """A copy of the finished run as it was before its last iterations: checkpoints of the student, and no results."""
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


def test_truncated_newest_checkpoint(cli, interrupted, finished):
    newest = checkpoints(interrupted)[-1]
    damage(newest)
    answer = cli("compress", "--resume", interrupted)
    assert answer.code == 0
    says = f"ev3-distill: warning: checkpoint {newest.name} is damaged, falling back to the one before ("
    assert sum(line.startswith(says) for line in answer.err.splitlines()) == 1
    assert_same_run(finished, interrupted)


def test_all_checkpoints_damaged(cli, here, interrupted):
    for path in checkpoints(interrupted):
        damage(path)
    answer = cli("compress", "--resume", interrupted)
    assert answer.code == 2
    error = [line for line in answer.err.splitlines() if line.startswith("ev3-distill: error")]
    assert len(error) == 1
    assert "a resume needs one readable checkpoint; got 3 in " in error[0]
    assert error[0].endswith(": start the run again elsewhere")
    assert len(checkpoints(interrupted)) == 3


def test_ledger_shorter_than_its_checkpoint(cli, interrupted):
    ledger = interrupted / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:3]))
    answer = cli("compress", "--resume", interrupted)
    assert answer.code == 2
    assert "a resume needs the ledger row of every iteration that the checkpoint has seen" in answer.err
    assert len(ledger.read_bytes().splitlines()) == 3


# A full disk.


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of its own where that is permitted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs; test_file_size_limit stands for it")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def compress(*argv, limit=resource.RLIM_INFINITY):
    """In a process of its own, which may write no file above `limit` bytes."""
    code = "import resource, sys; from ev3_distill.cli import main; "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY})); main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "compress", *map(str, argv)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def assert_told_of_a_full_disk(process, run):
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1] == (
        f"ev3-distill: error: a run needs room on its disk; {run} is on one that is full: free some, then go on with "
        f"--resume {run} (all up to the last checkpoint is kept)"
    )


@pytest.mark.parametrize("room", [40, 400])  # KiB: full while the teacher trains, while the student does
def test_full_disk(room, finished, tmp_path):
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    with small_disk(disk, "16m"):
        ballast = disk / "ballast"
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - room * 1024))
        assert_told_of_a_full_disk(compress(*SMALL, "--out", run), run)
        ballast.unlink()
        again = compress("--resume", run)
        assert again.returncode == 0, again.stderr
        assert_same_run(finished, run)


def test_file_size_limit(finished, tmp_path, monkeypatch):
    """EFBIG in place of ENOSPC: the logits of the teacher, 69 kB, are the first file that is too large."""
    run = tmp_path / "run"
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "cache"))
    assert_told_of_a_full_disk(compress(*SMALL, "--out", run, limit=60_000), run)
    again = compress("--resume", run)
    assert again.returncode == 0, again.stderr
    assert_same_run(finished, run)


# Evaluate and report.


def test_evaluate_and_report_need_a_finished_run(cli, here, interrupted):
    refused(
        cli,
        here,
        "evaluate",
        interrupted,
        says=r"evaluate needs a finished run; .*run has no report.json: finish it by",
    )
    refused(cli, here, "report", interrupted, says=r"a run has a report.json that can be read; .*: name another run")
    (interrupted / "report.json").write_text("{")
    refused(cli, here, "evaluate", interrupted, says=r"a run has a report.json that can be read; .*: name another run")
    refused(cli, here, "report", interrupted, says=r"a run has a report.json that can be read; .*: name another run")


def test_evaluate_on_other_shapes(cli, here, finished):
    save_npz(here / "vectors.npz")
    save_npz(here / "more.npz", inputs=np.zeros((60, 8, 8)), labels=np.arange(60) % 12)
    says = r"takes inputs of shape \[8, 8, 1\] and knows 10 classes; npz:vectors.npz has \[4\] and 3: name data like its own"
    refused(cli, here, "evaluate", finished, "--data", "npz:vectors.npz", says=says)
    says = r"npz:more.npz has \[8, 8, 1\] and 12: name data like its own"
    refused(cli, here, "evaluate", finished, "--data", "npz:more.npz", says=says)


def test_evaluate_with_no_confidence(cli, here, finished):
    refused(cli, here, "evaluate", finished, "--confidence", "1.5", says="confidence is a probability")


def test_a_real_process_tells_the_same(here):
    process = compress("--budget", "ten", "--out", here / "run")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("ev3-distill: error: a budget is a positive number of steps")
    assert process.stderr.count("\n") == 1
    assert not list(here.iterdir())
