"""A run is followed by who only reads its files: while it goes on, when it is killed, and when it is finished."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import SMALL

from ev3_distill.core.adapt import SHARE
from ev3_distill.monitor import live
from ev3_distill.runtime.ledger import Tail, open_tails
from ev3_distill.training.run_dir import held, is_held


def row(iteration, **changes):
    told = {"iteration": iteration, "cost": 10 * iteration, "steps": {"ce": 4, "kd4": 6}, "objective": "promise"}
    told |= {"test": None, "verdict": "keep", "arm": None, "champion_accuracy": 0.5, "current_accuracy": None}
    return told | {"wall_s": 1.0} | changes


def lines_of(run):
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def command(*words):
    return [sys.executable, "-m", "ev3_distill", *map(str, words)]


def test_a_tail_gives_whole_rows_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    tail = Tail(path)
    assert tail.rows() == []
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert tail.rows() == [{"a": 1}, {"a": 2}]
    assert tail.rows() == []
    with path.open("ab") as file:
        file.write(b": 3}\n")
    assert tail.rows() == [{"a": 3}]
    (tmp_path / "other").write_bytes(b'{"a": 1}\n')  # a resume puts what is left in its place
    os.replace(tmp_path / "other", path)
    assert tail.rows() == [{"a": 1}]


def test_the_parts_of_a_run(tmp_path):
    assert list(open_tails(tmp_path, {})) == ["student"]
    for name in ("teacher", "sizes/01", "sizes/02"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "ledger.jsonl").touch()
    known = open_tails(tmp_path, {})
    assert list(known) == ["teacher", "sizes/01", "sizes/02"]
    assert open_tails(tmp_path, known) == known


def test_what_a_part_tells():
    part = live.Part("student", budget="100", delta=0.05)
    assert part.take(row(1)) is None
    alpha = 0.05 * SHARE
    told = part.take(row(2, test={"alpha": alpha}, verdict="promote", arm="kd4", champion_accuracy=0.9))
    assert told == "20 steps: promote kd4, 90.0% on decide"
    assert part.left == pytest.approx(0.05 * SHARE)
    assert part.take(row(1)) is None  # again, after a resume
    part.take(row(3, test={"alpha": part.left * SHARE}, verdict="roll back"))
    assert part.left == pytest.approx(0.05 * SHARE * (1 - SHARE))
    assert part.lines()[0] == "student: 30%, 30 steps, iteration 3"
    assert part.lines()[2] == "arms: kd4 60%, ce 40%"
    part.take(row(4, cost=30))
    assert part.left == 0  # all of it is the closing iteration's
    assert live.Part("student", budget="10e", delta=0.05).share() is None


def test_the_error_budget_is_the_reports(finished):
    part = live.Part("student", budget="1500", delta=0.05)
    for told in lines_of(finished):
        part.take(told)
    left = json.loads((finished / "report.json").read_text())["error_budget"]["left"]
    assert part.left == pytest.approx(left, rel=1e-4, abs=1e-9)


def test_is_held(tmp_path):
    assert not is_held(tmp_path)
    with held(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


def test_a_finished_run_and_none(finished, cli, here):
    answer = cli("report", finished, "--live")
    assert answer.code == 0
    assert re.search(r"^student: 100%, 1,5\d\d steps, iteration \d+; champion [\d.]+% on decide, ", answer.out, re.M)
    promotions = [told for told in lines_of(finished) if told["verdict"] == "promote"]
    assert len(re.findall(r"^student: [\d,]+ steps: promote \w+, [\d.]+% on decide$", answer.out, re.M)) == len(
        promotions
    )
    assert "Report: " in answer.out
    refused = cli("report", here, "--live")
    assert refused.code == 2
    assert "report --live follows a run; " in refused.err


def test_a_run_that_is_killed(tmp_path):
    """Followed by a process on a terminal and one that is none, to the moment at which it is gone; Ctrl-C leaves it alone."""
    run = tmp_path / "run"
    options = [*SMALL, "--out", run]
    options[options.index("--budget") + 1] = "4m"
    running = subprocess.Popen(command("compress", *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ledger = run / "ledger.jsonl"
        until(lambda: ledger.exists() and ledger.stat().st_size > 0, running)
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        heeds = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also where a script ignores it
        )
        words = [
            sys.executable,
            "-c",
            f"{heeds}; from ev3_distill.cli import main; main()",
            "report",
            str(run),
            "--live",
        ]
        on_terminal = subprocess.Popen(words, stdout=theirs, env=environment)
        os.close(theirs)
        plain = subprocess.Popen(command("report", run, "--live"), stdout=subprocess.PIPE, text=True)
        seen = b""
        while b"error budget left" not in seen:
            seen += os.read(ours, 4096)
        on_terminal.send_signal(signal.SIGINT)
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert on_terminal.wait() == 130
        assert re.search(r"student: \d+%", seen.decode(errors="replace"))
        assert running.poll() is None
        rows = ledger.stat().st_size
        until(lambda: ledger.stat().st_size > rows, running)
    finally:
        running.kill()
        running.wait()
    out, _ = plain.communicate(timeout=120)
    assert plain.returncode == 0
    assert re.search(r"^student: \d+%, [\d,]+ steps, iteration \d+; champion ", out, re.M)
    assert out.endswith(f"No process works in {run}; go on with: ev3-distill compress --resume {run}\n")


def until(reached, process):
    began = time.monotonic()
    while not reached():
        assert process.poll() is None
        assert time.monotonic() - began < 300
        time.sleep(0.05)
