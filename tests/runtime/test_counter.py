"""The counter of examples: plain lines, a bar on a terminal, silence where there is little to do."""

import contextlib
import sys

import pytest

from ev3_distill.runtime import counter
from ev3_distill.runtime.counter import Counter


def counted(clock, told):
    with Counter("teacher") as shown:
        for now, done in told:
            clock.append(now)
            shown.tell(done, 1000)
        shown.line("waiting")


@pytest.fixture
def clock(monkeypatch):
    times = [0.0]
    monkeypatch.setattr(counter.time, "perf_counter", lambda: times[-1])
    return times


def test_counter_in_plain_lines(clock, capsys):
    counted(clock, [(0, 200), (1, 300), (6, 500), (7, 600), (16, 1000)])
    assert capsys.readouterr().err.splitlines() == [
        "teacher: 800 of 1,000 rows to do",
        "teacher: 50%, 500 of 1,000 rows, 50 rows/s, 10 s left",
        "teacher: 100%, 1,000 of 1,000 rows, 50 rows/s",
        "teacher: waiting",
    ]


def test_counter_with_little_to_do_is_silent(clock, capsys):
    with Counter("teacher") as shown:
        shown.tell(5, 5)
    counted_little = [(0, 0), (0.5, 500), (0.9, 1000)]
    with Counter("teacher") as shown:
        for now, done in counted_little:
            clock.append(now)
            shown.tell(done, 1000)
    assert capsys.readouterr().err == ""


def test_counter_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(counter, "SHOWN_AFTER_S", 0.0)
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(Counter("teacher"))
        shown.tell(0, 10)
        shown.line("[waiting]")
        shown.tell(10, 10)
    told = capsys.readouterr().err
    assert "10/10" in told
    assert "teacher: [waiting]" in told
