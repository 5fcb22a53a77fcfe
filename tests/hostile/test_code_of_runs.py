"""Reading a stranger's run imports nothing that only the run names. Each command is a process of its own."""

import os
import subprocess
import sys

import numpy as np
import pytest

TEACHER = """
import pathlib
import numpy as np
pathlib.Path("imported").touch()
def logits(x):
    return np.stack([-x[:, 0], x[:, 0]], 1) * 3
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a finished run whose teacher is code, an export of it, and `imported` if that code was imported."""
    folder = tmp_path_factory.mktemp("stranger")
    x = np.random.default_rng(0).normal(size=(600, 2)).astype(np.float32)
    np.savez(folder / "data.npz", inputs=x, labels=(x[:, 0] > 0).astype(np.int32))
    (folder / "wicked.py").write_text(TEACHER)
    command(
        folder,
        *("compress", "--data", "npz:data.npz", "--teacher", "python:wicked:logits", "--student", "mlp:hidden=4"),
        *("--arms", "kd4", "--budget", "100", "--checkpoint-s", "0", "--out", "run"),
    )
    assert (folder / "imported").exists()
    command(folder, "export", "run", "--format", "onnx", "--out", "exported", imports=False)
    return folder


def command(folder, *argv, code=0, imports=None):
    """Runs a command line; `imports`: whether it may import the code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if imports is not None:
        (folder / "imported").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "ev3_distill", *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    if imports is not None:
        assert (folder / "imported").exists() == imports, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ("evaluate", "exported", "--of", "run"),
        ("evaluate", "exported", "--of", "run", "--data", "npz:data.npz", "--keep-overlap"),
        ("evaluate", "run"),
        ("export", "run", "--latency", "--format", "onnx", "--out", "{new}"),
        ("report", "run"),
        ("compress", "--resume", "run"),
    ],
    ids=["evaluate of", "evaluate of on data", "evaluate", "export", "report", "resume of a finished run"],
)
def test_commands_that_read_a_finished_run_import_none_of_its_code(run, argv, tmp_path):
    argv = [word.format(new=tmp_path / "new") for word in argv]
    text = command(run, *argv, imports=False, code=3 if "--keep-overlap" in argv else 0)
    if "--of" in argv or "--latency" in argv:
        assert "'wicked:logits': if you trust the run, add --trust-run" in text


@pytest.mark.parametrize(
    "argv",
    [("evaluate", "exported", "--of", "run"), ("export", "run", "--latency", "--format", "onnx", "--out", "{new}")],
    ids=["evaluate", "export"],
)
def test_a_trusted_run_may_import_its_teacher(run, argv, tmp_path):
    argv = [word.format(new=tmp_path / "new") for word in argv]
    assert "--trust-run" not in command(run, *argv, "--trust-run", imports=True)


def test_a_resumed_run_says_what_it_imports(run, tmp_path):
    (run / "run" / "report.json").rename(tmp_path / "report.json")
    try:
        text = command(run, "compress", "--resume", "run", imports=True)
        assert "importing wicked:logits, which run/config.toml names" in text
    finally:
        (tmp_path / "report.json").replace(run / "run" / "report.json")
