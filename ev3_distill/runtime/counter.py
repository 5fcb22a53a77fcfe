"""A counter of what a long pass has done: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_EVERY_S = 5.0
SHOWN_AFTER_S = 1.0  # a pass that takes less is not shown


class Counter:
    """Shows how far a pass over many things is. A context manager; silent if there is little to do."""

    def __init__(self, title: str, *, things: str = "rows"):
        """A pass named `title` over `things`."""
        self._title, self._things = title, things
        self._first: int | None = None  # done by earlier passes: no pace to tell from
        self._began = self._told = 0.0
        self._shown = False
        self._bar: Any = None

    def __enter__(self) -> "Counter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, done: int, total: int) -> None:
        """Takes how many are done, of how many."""
        now = time.perf_counter()
        if self._first is None:
            if done == total:
                return
            self._first, self._began, self._told = done, now, now
        if not self._shown:
            if done == total or now - self._began < SHOWN_AFTER_S:
                return
            self._shown = True
            self._begin(done, total)
        pace = (done - self._first) / max(now - self._began, 1e-9)
        rate = f"{pace:,.{0 if pace >= 10 else 2}f} {self._things}/s" if pace else "no rate yet"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, rate=rate)
        elif now - self._told >= PLAIN_EVERY_S or done == total:
            self._told = now
            left = f", {(total - done) / pace:,.0f} s left" if pace and done < total else ""
            self._line(f"{done / max(total, 1):.0%}, {done:,} of {total:,} {self._things}, {rate}{left}")

    def line(self, text: str) -> None:
        """Shows a line of text besides."""
        if self._bar is not None:
            self._bar.console.print(f"{self._title}: {text}", markup=False, highlight=False)
        else:
            self._line(text)

    def _line(self, text: str) -> None:
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)

    def _begin(self, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            self._line(f"{total - (self._first or 0):,} of {total:,} {self._things} to do")
            return
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(self._title, total=total, completed=done, rate="")
