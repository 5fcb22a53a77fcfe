"""Progress of a run: a bar with rate and time left on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

PLAIN_EVERY_S = 5.0


class Progress:
    """Shows ledger rows as they come. A context manager."""

    def __init__(self, title: str, *, steps: int | None, seconds: float | None):
        """A run's budget is `steps`, or `seconds` of wall time."""
        self._title, self._total, self._timed = title, seconds or steps or 1, seconds is not None
        self._began = self._told = time.perf_counter()
        self._first: float | None = None
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[told]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, rate="compiling", told="")
        else:
            print(f"{self._title}: compiling", file=sys.stderr, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the terminal to something else for a while."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def row(self, row: dict[str, Any]) -> None:
        """Takes a ledger row."""
        now = time.perf_counter()
        if self._first is None:  # what came before was compiling, or done by an earlier process: no pace to tell yet
            self._first, self._began = row["cost"], now
        pace = (row["cost"] - self._first) / max(now - self._began, 1e-9)
        rate = f"{pace:,.0f} steps/s" if pace else "no rate yet"
        told = f"champion {row['champion_accuracy']:.1%}, current {row['current_accuracy']:.1%}"
        done = row["wall_s"] if self._timed else row["cost"]
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=rate, told=told)
        elif now - self._told >= PLAIN_EVERY_S or row["verdict"] in ("promote", "roll back"):
            self._told = now
            left = self._total - done
            if not self._timed:
                left = left / pace if pace else None
            print(
                f"{self._title}: {min(done / self._total, 1):.0%}, {row['cost']} steps, {rate}"
                f"{'' if left is None else f', {max(left, 0):.0f} s left'}; {told}; "
                f"{row['verdict']} {row['arm'] or ''}".rstrip(),
                file=sys.stderr,
                flush=True,
            )
