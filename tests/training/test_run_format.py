"""Run directories of another format version: finished runs are readable, unfinished ones are refused by one error."""

import dataclasses
import json
import shutil

import pytest
import tomli_w

from ev3_distill.config import Compress
from ev3_distill.data.sources import load_data
from ev3_distill.errors import InputError
from ev3_distill.training import run_dir


@pytest.fixture
def old_run(tmp_path):
    """A directory of version 1, as it is before the first checkpoint: no version, data and teacher alone."""
    inputs = {"fingerprint": load_data("digits").fingerprint, "teacher": None}
    (tmp_path / "given.json").write_text(json.dumps(inputs))
    config = dataclasses.asdict(Compress(budget="100", teacher_budget="50"))
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config))
    return tmp_path


def test_unfinished_run_of_version_1_is_refused(old_run, cli):
    answer = cli("compress", "--resume", old_run)
    assert answer.code == 2
    assert (
        f"{old_run} has version 1 and this is version {run_dir.FORMAT}: resume it with the older release" in answer.err
    )
    assert sorted(path.name for path in old_run.iterdir()) == ["config.toml", "given.json"]


@pytest.mark.parametrize("version", [1, run_dir.FORMAT + 1])
def test_versions_other_than_this_one_are_refused_while_unfinished(old_run, version):
    inputs = json.loads((old_run / "given.json").read_text())
    (old_run / "given.json").write_text(json.dumps({**inputs, "format": version}))
    with pytest.raises(InputError, match=f"has version {version} and this is version {run_dir.FORMAT}"):
        run_dir.read_inputs(old_run, inputs["fingerprint"])
    (old_run / "report.json").write_text("{}")
    assert run_dir.read_inputs(old_run, inputs["fingerprint"])["teacher"] is None


def test_new_run_records_its_version(finished):
    for directory in (finished, finished / "teacher"):
        assert json.loads((directory / "given.json").read_text())["format"] == run_dir.FORMAT


def test_finished_run_of_version_1_serves_every_reader(finished, cli, here):
    """Such a run has no version, and is otherwise as a new one."""
    run = here / "run"
    shutil.copytree(finished, run)
    for directory in (run, run / "teacher"):
        inputs = json.loads((directory / "given.json").read_text())
        del inputs["format"]
        (directory / "given.json").write_text(json.dumps(inputs))
    fast = ("--student", "mlp:hidden=4", "--budget", "20")
    commands = (
        ("report", run),
        ("evaluate", run),
        ("compress", "--resume", run),
        ("export", run, "--format", "flax", "--out", here / "f"),
    )
    for argv in (*commands, ("compress", "--teacher", f"flax:{run}", *fast, "--out", here / "second")):
        answer = cli(*argv)
        assert answer.code == 0, (argv, answer.err)
