"""Lines on standard error, above a progress bar if one is shown, and the news that a long phase still runs."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from ev3_distill.runtime.phases import Clock

FIRST_NEWS_S = (
    5.0  # after this long without a line, a phase says that it still runs; then each time after twice as long
)
LOOK_S = 0.5  # between two looks at the clock


class Display(Protocol):
    """A progress bar that is shown."""

    def line(self, text: str) -> None:
        """Prints a line above the bar."""


class _Console:
    """What this process shows."""

    def __init__(self) -> None:
        self.bars: list[Display] = []
        self.last = 0.0  # time.perf_counter of the last line or of the last change of a bar


_CONSOLE = _Console()


def say(title: str, text: str) -> None:
    """Prints "title: text"."""
    touch()
    if _CONSOLE.bars:
        _CONSOLE.bars[-1].line(f"{title}: {text}")
    else:
        print(f"{title}: {text}", file=sys.stderr, flush=True)


def touch() -> None:
    """Notes that something new was shown just now."""
    _CONSOLE.last = time.perf_counter()


@contextlib.contextmanager
def shown(bar: Display) -> Iterator[None]:
    """Lines are printed above this bar for the length of a `with` block."""
    _CONSOLE.bars.append(bar)
    try:
        yield
    finally:
        _CONSOLE.bars.remove(bar)


@contextlib.contextmanager
def news(clock: Clock) -> Iterator[None]:
    """Tells of every phase that takes long and shows nothing, for the length of a `with` block."""
    ends = threading.Event()
    thread = threading.Thread(target=_tell, args=(clock, ends), daemon=True, name="news of phases")
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def _tell(clock: Clock, ends: threading.Event) -> None:
    due, since = FIRST_NEWS_S, clock.since
    while not ends.wait(LOOK_S):
        if since != clock.since:
            due, since = FIRST_NEWS_S, clock.since
        now = time.perf_counter()
        if now - max(since, _CONSOLE.last) >= due and clock.current != "other":
            count = f", {clock.programs} programs done" if clock.current == "compiling" and clock.programs else ""
            say(clock.current, f"{now - since:.0f} s so far{count}")
            due *= 2
