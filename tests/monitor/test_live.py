"""The live view reads the files of a run in progress, a killed run and a finished run."""

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
from ev3_distill.training.run_dir import is_locked, lock_run


def row(iteration, **changes):
    fields = {"iteration": iteration, "cost": 10 * iteration, "steps": {"ce": 4, "kd4": 6}, "objective": "promise"}
    fields |= {"test": None, "verdict": "keep", "arm": None, "champion_accuracy": 0.5, "current_accuracy": None}
    return fields | {"wall_s": 1.0} | changes


def lines_of(run):
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def command(*words):
    return [sys.executable, "-m", "ev3_distill", *map(str, words)]


def test_tail_returns_complete_rows_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    tail = Tail(path)
    assert tail.rows() == []
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert tail.rows() == [{"a": 1}, {"a": 2}]
    assert tail.rows() == []
    with path.open("ab") as file:
        file.write(b": 3}\n")
    assert tail.rows() == [{"a": 3}]
    (tmp_path / "other").write_bytes(b'{"a": 1}\n')  # a resume replaces the file
    os.replace(tmp_path / "other", path)
    assert tail.rows() == [{"a": 1}]


def test_tails_follow_every_ledger_of_a_run(tmp_path):
    assert list(open_tails(tmp_path, {})) == ["student"]
    for name in ("teacher", "sizes/01", "sizes/02"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "ledger.jsonl").touch()
    known = open_tails(tmp_path, {})
    assert list(known) == ["teacher", "sizes/01", "sizes/02"]
    assert open_tails(tmp_path, known) == known


def test_part_reports_promotions_rollbacks_and_error_budget():
    part = live.Part("student", budget="100", delta=0.05)
    assert part.add(row(1)) is None
    alpha = 0.05 * SHARE
    line = part.add(row(2, test={"alpha": alpha}, verdict="promote", arm="kd4", champion_accuracy=0.9))
    assert line == "20 steps: promote kd4, 90.0% on decide"
    assert part.left == pytest.approx(0.05 * SHARE)
    assert part.add(row(1)) is None  # repeated after a resume
    part.add(row(3, test={"alpha": part.left * SHARE}, verdict="roll back"))
    assert part.left == pytest.approx(0.05 * SHARE * (1 - SHARE))
    assert part.lines()[0] == "student: 30%, 30 steps, iteration 3"
    assert part.lines()[2] == "arms: kd4 60%, ce 40%"
    part.add(row(4, cost=30))
    assert part.left == 0  # the closing iteration spends the rest
    assert live.Part("student", budget="10e", delta=0.05).fraction_done() is None


def test_part_reports_the_race():
    part = live.Part("student", budget="100", delta=0.05)
    racing = {"racing": ["ce", "kd4"], "left": [], "asked": None, "final": False}
    assert part.add(row(1, **racing)) is None
    assert part.lines()[2] == "arms: kd4 60%, ce 40%; racing: ce, kd4"
    left = {"racing": [], "left": ["ce"], "behind": {"ce": -0.02, "kd4": 0.0}, "behind_se": {"ce": 0.01, "kd4": 0.0}}
    line = part.add(row(2, **(racing | left)))
    assert line == "20 steps: ce left the race, 2.0 points (2.0 standard errors) behind kd4; kd4 leads"
    promoted = part.add(row(3, verdict="promote", arm="kd4", **(racing | left)))
    assert promoted.startswith("30 steps: promote kd4, 50.0% on decide; ce left the race, ")
    part.add(row(4, **(racing | {"racing": [], "final": True})))
    assert part.lines()[2] == "arms: kd4 60%, ce 40%; final phase"


def test_error_budget_equals_that_of_the_report(finished):
    part = live.Part("student", budget="1500", delta=0.05)
    for ledger_row in lines_of(finished):
        part.add(ledger_row)
    left = json.loads((finished / "report.json").read_text())["error_budget"]["left"]
    assert part.left == pytest.approx(left, rel=1e-4, abs=1e-9)


def test_lock_is_visible_to_readers(tmp_path):
    assert not is_locked(tmp_path)
    with lock_run(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_finished_run_is_shown_and_missing_run_is_an_error(finished, cli, here):
    result = cli("report", finished, "--live")
    assert result.code == 0
    assert re.search(r"^student: 100%, 1,5\d\d steps, iteration \d+; champion [\d.]+% on decide, ", result.out, re.M)
    assert result.out.startswith("champion: the best student so far")
    promotions = [row for row in lines_of(finished) if row["verdict"] == "promote"]
    news = "(; .* leads)?"  # the race ended in the same iteration
    lines = re.findall(rf"^student: [\d,]+ steps: promote \w+, [\d.]+% on decide{news}$", result.out, re.M)
    assert len(lines) == len(promotions)
    assert "Report: " in result.out
    refused = cli("report", here, "--live")
    assert refused.code == 2
    assert "report --live follows a run; " in refused.err


def test_killed_run_is_followed_until_its_process_ends(tmp_path):
    """One follower has a terminal, the other writes to a pipe. Ctrl-C stops the follower, not the run."""
    run = tmp_path / "run"
    options = [*SMALL, "--out", run]
    options[options.index("--budget") + 1] = "4m"
    running = subprocess.Popen(command("compress", *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ledger = run / "ledger.jsonl"
        wait_until(lambda: ledger.exists() and ledger.stat().st_size > 0, running)
        terminal, child_end = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        handle_interrupts = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # even if ignored
        words = [
            sys.executable,
            "-c",
            f"{handle_interrupts}; from ev3_distill.cli.main import main; main()",
            "report",
            str(run),
            "--live",
        ]
        on_terminal = subprocess.Popen(words, stdout=child_end, env=environment)
        os.close(child_end)
        plain = subprocess.Popen(command("report", run, "--live"), stdout=subprocess.PIPE, text=True)
        output = b""
        while b"error budget left" not in output:
            output += os.read(terminal, 4096)
        on_terminal.send_signal(signal.SIGINT)
        while True:
            try:
                output += os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
        assert on_terminal.wait() == 130
        assert re.search(r"student: \d+%", output.decode(errors="replace"))
        assert running.poll() is None
        rows = ledger.stat().st_size
        wait_until(lambda: ledger.stat().st_size > rows, running)
    finally:
        running.kill()
        running.wait()
    out, _ = plain.communicate(timeout=120)
    assert plain.returncode == 0
    assert re.search(r"^student: \d+%, [\d,]+ steps, iteration \d+; champion ", out, re.M)
    assert out.endswith(f"No process works in {run}; resume it with: ev3-distill compress --resume {run}\n")


def wait_until(condition, process):
    start = time.monotonic()
    while not condition():
        assert process.poll() is None
        assert time.monotonic() - start < 300
        time.sleep(0.05)
