"""The command line end to end: data, teachers, budgets and output."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import SMALL, rows_without_times, variables_of

from ev3_distill import students
from ev3_distill.data.sources import load_data
from ev3_distill.data.splits import split_rows
from ev3_distill.teachers.kinds.flax import forward

FAST = ("--student", "mlp:hidden=8", "--arms", "ce", "--budget", "300")


@pytest.mark.parametrize("argv", [["--help"], ["compress", "--help"], ["evaluate", "--help"]])
def test_help_imports_no_numerical_library(argv):
    code = f"""if True:
        import sys
        from ev3_distill.cli.main import main
        try:
            main({argv!r})
        except SystemExit as exit_:
            assert exit_.code == 0
        heavy = {{"jax", "jaxlib", "numpy", "scipy", "flax", "optax", "orbax", "matplotlib", "sklearn"}}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: ev3-distill" in done.stdout


def test_help_shows_options_and_defaults(cli):
    text = " ".join(re.sub(r"[│\n]", " ", cli("compress", "--help").out).split())
    for option in ("--data", "--teacher", "--student", "--budget", "--arms", "--seed", "--config", "--resume", "--out"):
        assert option in text
    assert "(default: auto)" in text
    assert "training steps summed over all arms" in text


def test_a_run_prints_its_bounds_and_its_directory(finished, cli, here):
    answer = cli("compress", "--resume", finished)
    text = " ".join(answer.out.split())
    report = json.loads((finished / "report.json").read_text())
    assert re.search(
        r"This student has at least \d+\.\d % accuracy and at least \d+\.\d % agreement .*95 % confidence", text
    )
    assert f"Student: {finished / 'student'}" in answer.out
    assert report["cost"]["steps"] == 1500
    cost = report["cost"]
    assert cost["compile_s"] == cost["phases"]["compiling"]
    assert sum(cost["phases"].values()) == pytest.approx(cost["wall_s"], abs=0.01)
    assert {"importing", "reading", "teacher", "training", "certifying", "writing"} < set(cost["phases"])
    assert sum(arm["steps"] for arm in report["arms"]) == 1500
    assert report["student"]["params"] == 64 * 8 + 8 + 8 * 10 + 10
    assert report["teacher"]["params"] == 64 * 16 + 16 + 16 * 10 + 10
    assert report["splits"] == {"explore": 898, "assess": 270, "decide": 270, "test": 359}


def test_evaluate_reproduces_the_certificate(finished, cli, here, new_digits):
    claim = json.loads((finished / "report.json").read_text())["certificate"]["claims"][0]
    answer = cli("evaluate", finished)
    assert answer.code == 0
    assert answer.out.startswith(f"accuracy: {claim['point']:.2%} of {claim['n']} examples; at least ")
    stated = float(re.search(r"at least ([\d.]+)%", answer.out)[1]) / 100
    assert claim["lower_bound"] - 1e-4 < stated <= claim["lower_bound"]  # rounded down
    whole = cli("evaluate", finished, "--data", new_digits, "--confidence", "0.9")
    assert re.match(r"accuracy: [\d.]+% of 1797 examples; at least [\d.]+% with 90% confidence\n", whole.out)
    teacher = cli("evaluate", finished / "teacher")
    accuracy = json.loads((finished / "report.json").read_text())["teacher"]["accuracy"]
    assert teacher.out.startswith(f"accuracy: {accuracy:.2%} of 359 examples")


def test_report_renders_the_page_again(finished, cli, here):
    page = (finished / "report.html").read_text()
    (finished / "report.html").write_text("lost")
    answer = cli("report", finished)
    assert answer.code == 0
    assert f"Report: {finished / 'report.html'}" in answer.out
    assert (finished / "report.html").read_text() == page


def test_resuming_a_finished_run_restores_its_page(finished, cli, here):
    page = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    assert cli("compress", "--resume", finished).code == 0
    assert (finished / "report.html").read_text() == page


def test_recorded_logits_train_the_same_student_as_their_teacher(finished, cli, here):
    """The same student results from a teacher that runs and from a file of its logits."""
    network, variables = students.load(finished / "teacher")
    logits = here / "logits.npz"
    np.savez(logits, logits=forward(network, variables)(load_data("digits").inputs))
    assert cli("compress", *SMALL, "--teacher", f"logits:{logits}", "--out", "run").code == 0
    assert variables_of(here / "run") == variables_of(finished)
    assert rows_without_times(here / "run/ledger.jsonl") == rows_without_times(finished / "ledger.jsonl")
    teacher = json.loads((here / "run/report.json").read_text())["teacher"]
    assert teacher["source"] == f"logits:{logits}"
    assert teacher["params"] is None
    assert not (here / "run/teacher").exists()


def test_a_run_of_teach_or_compress_can_be_the_teacher(cli, here):
    taught = cli("teach", "--network", "mlp:hidden=16", "--budget", "300", "--out", "teacher")
    assert taught.code == 0, taught.err
    assert "at least" in taught.out
    answer = cli("compress", *FAST, "--teacher", "flax:teacher", "--out", "run")
    assert answer.code == 0, answer.err
    assert "warning" not in answer.err
    teacher = json.loads((here / "run/report.json").read_text())["teacher"]
    of_teach = json.loads((here / "teacher/report.json").read_text())
    assert teacher["params"] == of_teach["student"]["params"] == 64 * 16 + 16 + 16 * 10 + 10
    assert teacher["accuracy"] == pytest.approx(of_teach["student"]["accuracy"])
    # A student may teach as well.
    answer = cli("compress", *FAST, "--teacher", "flax:run", "--out", "second")
    assert answer.code == 0, answer.err


def test_a_teacher_that_has_seen_the_test_split_is_reported(finished, cli, here, monkeypatch):
    from ev3_distill.training.train import run_loop

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_loop, "iterate", stop)
    labels = load_data("digits").labels
    sealed = split_rows(labels, None, seed=0)["test"]
    unsealed = np.setdiff1d(split_rows(labels, None, seed=1)["test"], sealed)
    for i, teacher in enumerate((finished / "teacher", finished / "teacher/student", finished, f"{finished}#")):
        same = cli("compress", *FAST, "--teacher", f"flax:{teacher}", "--out", f"same{i}")
        assert "warning" not in same.err
        other = cli("compress", *FAST, "--teacher", f"flax:{teacher}", "--seed", 1, "--out", f"other{i}")
        assert f"flax:{teacher} was trained on these data with other splits" in other.err
        assert f"has seen {len(unsealed)} of the 359 test examples" in other.err
        assert "give both runs the same data, --seed and splits" in other.err
    more = ("--test", "0.3", "--explore", "0.4")
    answer = cli("compress", *FAST, "--teacher", f"flax:{finished}", *more, "--out", "more")
    assert re.search(r"has seen \d+ of the 539 test examples", answer.err)


def test_compress_and_evaluate_on_npz_data(cli, here):
    """Vectors of three classes, with test examples of their own and names."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=900)
    inputs = (np.eye(5)[labels] * 3 + rng.normal(size=(900, 5))).astype(np.float32)
    np.savez(
        here / "data.npz",
        train_inputs=inputs[:700],
        train_labels=labels[:700],
        test_inputs=inputs[700:],
        test_labels=labels[700:],
        class_names=np.array(["ant", "bee", "<cat>"]),
    )
    np.savez(here / "rest.npz", inputs=inputs[700:], labels=labels[700:])
    np.savez(here / "new.npz", inputs=inputs[700:] + np.float32(1e-4), labels=labels[700:])
    answer = cli(
        *("compress", *FAST, "--data", "npz:data.npz", "--out", "run"),
        *("--teacher-network", "mlp:hidden=16", "--teacher-budget", "200"),
    )
    assert answer.code == 0, answer.err
    report = json.loads((here / "run/report.json").read_text())
    assert report["splits"]["test"] == 200
    assert report["data"]["classes"] == ["ant", "bee", "<cat>"]
    assert report["student"]["accuracy"] > 0.85
    again = cli("evaluate", "run")
    assert again.out.startswith(f"accuracy: {report['student']['accuracy']:.2%} of 200 examples")
    refused = cli("evaluate", "run", "--data", "npz:rest.npz")  # the same examples, from another file
    assert (refused.code, "200 in its sealed split, which has been opened" in refused.err) == (2, True)
    other = cli("evaluate", "run", "--data", "npz:new.npz")
    assert other.out.partition(";")[0] == again.out.partition(";")[0]
    bounds = [float(re.search(r"at least ([\d.]+)%", answer.out)[1]) for answer in (again, other)]
    assert bounds[0] < bounds[1]  # one claim alone has all of the error probability


def test_a_wall_time_budget_is_kept(cli, here, random_logits):
    options = ("--teacher", f"logits:{random_logits}", "--student", "mlp:hidden=8", "--arms", "ce")
    assert cli("compress", *options, "--budget", "3s", "--out", "run").code == 0
    report = json.loads((here / "run/report.json").read_text())
    assert 2 < report["cost"]["phases"]["training"] < 6
    assert report["cost"]["steps"] > 0


def test_a_budget_in_epochs_is_converted_to_steps(cli, here, random_logits):
    options = ("--teacher", f"logits:{random_logits}", "--student", "mlp:hidden=8", "--arms", "ce")
    assert cli("compress", *options, "--budget", "20e", "--out", "run").code == 0
    report = json.loads((here / "run/report.json").read_text())
    assert report["cost"]["steps"] == round(20 * 898 / 128)
    assert report["budget"] == "20e"


def test_options_override_the_configuration_file(cli, here, random_logits):
    """The run stores its whole configuration in config.toml, which is a configuration file again."""
    (here / "c.toml").write_text(
        f"teacher = 'logits:{random_logits}'\nstudent = 'mlp:hidden=8'\narms = ['ce']\nbudget = '9e'\n"
    )
    assert cli("compress", "--config", "c.toml", "--budget", "150", "--out", "run").code == 0
    assert json.loads((here / "run/report.json").read_text())["cost"]["steps"] == 150
    assert cli("compress", "--config=run/config.toml", "--out", "again").code == 0
    assert variables_of(here / "run") == variables_of(here / "again")
    assert (here / "run/config.toml").read_bytes() == (here / "again/config.toml").read_bytes()


def test_the_default_run_directory_is_named_by_the_time(cli, here, random_logits):
    assert cli("compress", *FAST, "--teacher", f"logits:{random_logits}").code == 0
    (run,) = (here / "runs").iterdir()
    assert re.fullmatch(r"compress-\d{8}-\d{6}", run.name)
    assert (run / "report.html").exists()


def test_progress_without_a_terminal_is_plain_lines(finished, cli, here, random_logits):
    """No line shows a rate before one was measured."""
    answer = cli("compress", *FAST, "--teacher", f"logits:{random_logits}", "--out", "run")
    lines = answer.err.splitlines()
    assert lines[0] == "student: compiling"
    assert lines[1].startswith("student: champion: the best student so far")
    for line in lines[2:]:
        match = re.fullmatch(r"student: (\d+)%, \d+ steps, (no rate yet|[\d,]+ steps/s, \d+ s left); champion .*", line)
        assert match, line
        assert int(match[1]) <= 100
