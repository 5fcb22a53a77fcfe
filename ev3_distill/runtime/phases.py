"""The wall time of a command by phase, from its start: what a user waits for.

Phases nest: time in an inner phase is not time of the outer one. Work for the teacher counts as
`teacher`, whatever it is, except compiling. Compiling inside a call of JAX counts as `compiling`, too.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

SHOWN_S = 0.05  # phases that took less are not shown
NAMES = ("importing", "reading", "teacher", "compiling", "training", "certifying", "writing", "other")
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX reports each program that it compiles or loads


class Clock:
    """Seconds by phase.

    Attributes:
      current: the phase now.
      since: when it began or was entered again, as `time.perf_counter`.
      programs: compiled so far.
    """

    def __init__(self, start: float, phase: str):
        """Starts in a phase, at a time of `time.perf_counter`."""
        self.current, self.since, self.programs = phase, start, 0
        self._start = start
        self._seconds = dict.fromkeys(NAMES, 0.0)
        self._earlier = 0.0
        self._teacher = False
        self._owner = threading.get_ident()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of a `with` block as that of a phase. Other threads than the clock's own count nothing."""
        if threading.get_ident() != self._owner or (self._teacher and name != "compiling"):
            yield
            return
        before, teacher = self.current, self._teacher
        self.turn_to(name)
        self._teacher = name == "teacher" or teacher
        try:
            yield
        finally:
            self._teacher = teacher
            self.turn_to(before)

    def turn_to(self, name: str) -> None:
        """Counts the time from now on as that of a phase."""
        now = time.perf_counter()
        self._seconds[self.current] += now - self.since
        self.current, self.since = name, now

    def compiled(self, seconds: float) -> None:
        """Counts these last seconds as compiling."""
        self.programs += 1
        if threading.get_ident() == self._owner and self.current != "compiling":
            self._seconds["compiling"] += seconds
            self._seconds[self.current] -= seconds

    def add_earlier(self, seconds: float) -> None:
        """Adds the training time of earlier commands, which a resumed run continues."""
        self._earlier += seconds

    def times(self) -> dict[str, Any]:
        """Seconds until now.

        Returns:
          `wall_s` since the start, `compile_s` of it, all of it by phase (`phases`), and, in a resumed run, the training time
          of earlier commands (`earlier_s`), which `wall_s` includes.
        """
        now = time.perf_counter()
        phases = self._seconds | {self.current: self._seconds[self.current] + now - self.since}
        return {
            "wall_s": round(now - self._start + self._earlier, 3),
            "compile_s": round(phases["compiling"], 3),
            **({"earlier_s": round(self._earlier, 3)} if self._earlier else {}),
            "phases": {name: round(max(seconds, 0.0), 3) for name, seconds in phases.items()},
        }


_NO_COMMAND = Clock(time.perf_counter(), "other")
_CLOCK: ContextVar[Clock] = ContextVar("clock of the command", default=_NO_COMMAND)
_LISTENS: list[bool] = []


def clock() -> Clock:
    """The clock of the present command; commands in several threads have clocks of their own."""
    return _CLOCK.get()


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Counts the time of a `with` block as that of one of NAMES."""
    return clock().phase(name)


@contextlib.contextmanager
def command(start: float | None = None, *, phase: str = "other") -> Iterator[Clock]:
    """A clock for the length of a `with` block; inside another such block, that block's clock.

    Args:
      start: a time of `time.perf_counter`; by default now.
      phase: that it starts in.
    """
    if clock() is not _NO_COMMAND:
        yield clock()
        return
    own = Clock(time.perf_counter() if start is None else start, phase)
    token = _CLOCK.set(own)
    try:
        yield own
    finally:
        _CLOCK.reset(token)


def count_compiling() -> None:
    """Counts the programs that JAX compiles from now on, and their time. Imports JAX."""
    if _LISTENS:
        return
    _LISTENS.append(True)
    import jax

    def listen(event: str, duration_secs: float, **facts: str | int) -> None:
        if event == COMPILED:
            clock().compiled(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)


def process_start() -> float:
    """When this process started, as `time.perf_counter`; now, where the system does not say."""
    now = time.perf_counter()
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - max(age, 0.0)
