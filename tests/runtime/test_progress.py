"""Progress of runs and of passes over many items: plain lines, a bar on a terminal, silence if there is little to do."""

import io
import sys

import pytest

from ev3_distill.runtime import progress
from ev3_distill.runtime.glossary import TERMS
from ev3_distill.runtime.progress import Bar, CountProgress, RunProgress

ROW = {
    "cost": 50,
    "champion_accuracy": 0.5,
    "current_accuracy": 0.75,
    "wall_s": 1.0,
    "verdict": "keep",
    "arm": None,
}


@pytest.fixture
def clock(monkeypatch):
    times = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: times[-1])
    return times


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """A terminal as standard error. Call it in the test: pytest replaces standard error after the fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def count(clock, updates):
    with CountProgress("teacher") as shown:
        for now, done in updates:
            clock.append(now)
            shown.update(done, 1000)
        shown.line("waiting")


def test_count_prints_plain_lines_every_five_seconds(clock, capsys):
    count(clock, [(0, 200), (1, 300), (4, 400), (6, 500), (7, 600), (16, 1000)])
    assert capsys.readouterr().err.splitlines() == [
        "teacher: 800 of 1,000 rows to do",
        "teacher: 50%, 500 of 1,000 rows, 50 rows/s, 10 s left",
        "teacher: 100%, 1,000 of 1,000 rows, 50 rows/s",
        "teacher: waiting",
    ]


def test_short_count_is_silent(clock, capsys):
    with CountProgress("teacher") as shown:
        shown.update(5, 5)
    with CountProgress("teacher") as shown:
        for now, done in [(0, 0), (0.9, 500), (0.95, 1000)]:
            clock.append(now)
            shown.update(done, 1000)
    assert capsys.readouterr().err == ""


def test_count_of_two_seconds_is_shown(clock, capsys):
    with CountProgress("teacher") as shown:
        for now, done in [(0, 0), (1.9, 500), (2.0, 1000)]:
            clock.append(now)
            shown.update(done, 1000)
    assert capsys.readouterr().err.splitlines()[0] == "teacher: 1,000 of 1,000 rows to do"


def test_count_shows_a_bar_on_a_terminal(monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    with CountProgress("teacher") as shown:
        shown.update(0, 10)
        shown.line("[waiting]")
        shown.update(10, 10)
    assert "10/10" in terminal.getvalue()
    assert "teacher: [waiting]" in terminal.getvalue()


def test_run_prints_promotions_at_once_and_other_rows_every_five_seconds(clock, capsys):
    with RunProgress("student", steps=400, seconds=None) as shown:
        for now, changes in (
            (0, {}),
            (1, {"cost": 100}),
            (4, {"cost": 120}),
            (6, {"cost": 150}),
            (7, {"cost": 200, "verdict": "promote"}),
        ):
            clock.append(now)
            shown.row(ROW | changes)
    first, legend, *lines = capsys.readouterr().err.splitlines()
    assert first == "student: compiling"
    assert legend == f"student: champion: {TERMS['champion']}; current: {TERMS['current']}"
    assert lines == [
        "student: 38%, 150 steps, 17 steps/s, 15 s left; champion 50.0%, current 75.0%; keep",
        "student: 50%, 200 steps, 21 steps/s, 9 s left; champion 50.0%, current 75.0%; promote",
    ]


RACING = {
    "steps": {"ce": 50, "kd4": 50, "dist": 50},
    "behind": {"ce": -0.0581, "kd4": 0.0, "dist": -0.004},
    "behind_se": {"ce": 0.0063846, "kd4": 0.0, "dist": 0.005},
    "racing": ["kd4", "dist"],
    "left": ["ce"],
    "asked": None,
    "final": False,
}


def test_run_prints_at_once_who_left_the_race_and_who_trains(clock, capsys):
    with RunProgress("student", steps=400, seconds=None) as shown:
        for now, changes in (
            (0, {"racing": ["ce", "kd4", "dist"], "left": []}),
            (1, {"cost": 150}),
            (7, {"cost": 200, "racing": [], "left": [], "asked": "ce"}),
            (14, {"cost": 400, "racing": [], "left": [], "final": True, "verdict": "final phase", "arm": "kd4"}),
        ):
            clock.append(now)
            shown.row(ROW | RACING | changes)
    ends = [line.split("current 75.0%")[1] for line in capsys.readouterr().err.splitlines()[2:]]
    assert ends == [
        ", racing: kd4, dist; keep; ce left the race, 5.8 points (9.1 standard errors) behind kd4",
        ", asked: ce; keep",
        ", final phase; final phase kd4",
    ]


def test_run_shows_a_bar_on_a_terminal(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with RunProgress("student", steps=100, seconds=None) as shown:
        shown.row(ROW)
        with shown.paused():
            pass
        shown.row(ROW | {"cost": 100})
    assert "100%" in terminal.getvalue()
    assert "champion 50.0%, current 75.0%" in terminal.getvalue()


def test_run_shows_above_its_bar_who_left_the_race(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with RunProgress("student", steps=100, seconds=None) as shown:
        shown.row(ROW | RACING)
    assert "ce left the race, 5.8 points (9.1 standard errors) behind kd4" in " ".join(terminal.getvalue().split())


def test_bar_without_a_total_shows_its_note(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with Bar("bench", total=None) as bar:
        bar.update(note="row 3")
    assert "bench" in terminal.getvalue() and "row 3" in terminal.getvalue()
