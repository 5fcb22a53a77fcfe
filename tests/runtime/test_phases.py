"""The clock of a command: every second belongs to one phase."""

import json
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from ev3_distill.runtime import console, phases
from ev3_distill.runtime.phases import NAMES, Clock


class Time:
    """A time that tests set."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def now(monkeypatch):
    time_ = Time()
    monkeypatch.setattr(phases.time, "perf_counter", time_)
    return time_


def spent(clock):
    return {name: seconds for name, seconds in clock.times()["phases"].items() if seconds}


def test_inner_phases_interrupt_outer_ones(now):
    clock = Clock(now.now, "importing")
    now.now += 1
    clock.turn_to("other")
    now.now += 2
    with clock.phase("training"):
        now.now += 4
        with clock.phase("compiling"):
            now.now += 8
        now.now += 16
    now.now += 32
    assert spent(clock) == {"importing": 1, "compiling": 8, "training": 20, "other": 34}
    assert clock.times()["wall_s"] == 63 and clock.times()["compile_s"] == 8
    assert list(clock.times()["phases"]) == list(NAMES)


def test_all_work_for_the_teacher_is_the_teachers_except_compiling(now):
    clock = Clock(now.now, "other")
    with clock.phase("teacher"):
        with clock.phase("training"):
            now.now += 1
            with clock.phase("compiling"):
                now.now += 2
            now.now += 4
        with clock.phase("writing"):
            now.now += 8
    with clock.phase("training"):
        now.now += 16
    assert spent(clock) == {"teacher": 13, "compiling": 2, "training": 16}


def test_programs_compiled_in_another_phase_count_as_compiling(now):
    clock = Clock(now.now, "training")
    now.now += 5
    clock.compiled(2)
    with clock.phase("compiling"):
        now.now += 3
        clock.compiled(1)  # part of these three seconds
    assert spent(clock) == {"training": 3, "compiling": 5} and clock.programs == 2


def test_phase_ends_with_an_error(now):
    clock = Clock(now.now, "other")
    with pytest.raises(KeyError), clock.phase("reading"):
        now.now += 1
        raise KeyError
    now.now += 1
    assert spent(clock) == {"reading": 1, "other": 1}


def test_other_threads_count_nothing(now):
    clock = Clock(now.now, "training")

    def work():
        with clock.phase("teacher"):
            now.now += 1
        clock.compiled(0.5)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert spent(clock) == {"training": 1}


def test_earlier_commands_add_to_the_whole(now):
    clock = Clock(now.now, "training")
    now.now += 1
    clock.add_earlier(10)
    assert clock.times() | {"phases": None} == {"wall_s": 11, "compile_s": 0, "earlier_s": 10, "phases": None}
    assert "earlier_s" not in Clock(now.now, "other").times()


def test_commands_inside_a_command_share_its_clock():
    with phases.command(phase="importing") as outer:
        assert phases.clock() is outer and outer.current == "importing"
        with phases.command() as inner:
            assert inner is outer
    assert phases.clock() is not outer


def test_jax_reports_what_it_compiles():
    phases.count_compiling()
    phases.count_compiling()  # a second listener would count twice
    with phases.command(phase="training") as clock:
        jax.jit(lambda x: jnp.tanh(x) * 17.25)(jnp.ones(3)).block_until_ready()
        assert 0 < clock.programs < 10
        assert 0 < clock.times()["compile_s"] <= clock.times()["wall_s"]


def test_clock_starts_with_the_process():
    code = (
        "import time; time.sleep(0.3); from ev3_distill.runtime.phases import process_start; "
        "print(time.perf_counter() - process_start())"
    )
    begun = time.perf_counter()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= age <= time.perf_counter() - begun + 0.02  # the system counts hundredths of seconds


class Looks:
    """Ends after a number of looks, between which time passes."""

    def __init__(self, now, count, each=None):
        self.now, self.left, self.each = now, count, each

    def wait(self, seconds):
        self.now.now += seconds
        self.left -= 1
        if self.each:
            self.each()
        return self.left < 0


@pytest.fixture
def lines(capsys):
    def lines_so_far():
        return capsys.readouterr().err.splitlines()

    return lines_so_far


def test_long_phase_says_that_it_still_runs_each_time_after_twice_as_long(now, lines):
    clock = Clock(now.now, "compiling")
    clock.programs = 3
    console.touch()
    console._tell(clock, Looks(now, round(50 / console.LOOK_S)))
    assert lines() == [f"compiling: {seconds} s so far, 3 programs done" for seconds in (5, 15, 35)]


def test_phase_that_shows_something_needs_no_news(now, lines):
    console._tell(Clock(now.now, "training"), Looks(now, 100, each=console.touch))
    assert not lines()


def test_nothing_is_told_of_what_has_no_name(now, lines):
    console.touch()
    console._tell(Clock(now.now, "other"), Looks(now, 100))
    assert not lines()


def test_news_end_with_the_work():
    with console.news(Clock(time.perf_counter(), "training")):
        assert [thread for thread in threading.enumerate() if thread.name == "news of phases"]
    assert not [thread for thread in threading.enumerate() if thread.name == "news of phases"]


def test_commands_in_two_threads_have_clocks_of_their_own():
    clocks = []

    def work():
        with phases.command() as clock:
            clocks.append(clock)

    with phases.command() as clock:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({id(one) for one in [clock, *clocks]}) == 3


def test_resumed_run_counts_the_training_of_earlier_commands(finished, cli, here, tmp_path):
    """The rows of the ledger say how long that was. A last row that is torn is not counted."""
    from ev3_distill.training.run_reader import trained_seconds

    rows = [json.loads(line)["wall_s"] for line in (finished / "ledger.jsonl").read_text().splitlines()]
    teacher = [json.loads(line)["wall_s"] for line in (finished / "teacher/ledger.jsonl").read_text().splitlines()]
    assert trained_seconds(finished) == pytest.approx(max(rows) + max(teacher))
    torn = tmp_path / "ledger.jsonl"
    torn.write_text('{"wall_s": 1.5}\n{"wall_s": 2.')
    assert trained_seconds(tmp_path) == 1.5
