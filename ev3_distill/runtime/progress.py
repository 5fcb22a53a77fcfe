"""Progress on stderr: a bar with rate and remaining time on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from ev3_distill.runtime import console
from ev3_distill.runtime.glossary import explain
from ev3_distill.runtime.ledger import promise_scores
from ev3_distill.runtime.race import race_news, who_trains

PLAIN_EVERY_S = 5.0  # between two plain lines
SHOWN_AFTER_S = 1.0  # a count that takes less time is not shown


class Bar:
    """A progress bar on a terminal. A context manager."""

    def __init__(self, title: str, *, total: float | None, counts: bool = False):
        """Set up a bar, without showing it.

        Args:
          title: in front of the bar.
          total: value at which the bar is full; None for a spinner with the elapsed time.
          counts: whether to show "done/total" in place of a percentage.
        """
        from rich import progress
        from rich.console import Console

        columns: list[progress.ProgressColumn | str] = [progress.TextColumn("{task.description}")]
        if total is None:
            columns = [progress.SpinnerColumn(), *columns, progress.TimeElapsedColumn()]
        else:
            done = progress.MofNCompleteColumn() if counts else progress.TaskProgressColumn()
            rate = progress.TextColumn("{task.fields[rate]}")
            columns += [progress.BarColumn(), done, rate, progress.TimeRemainingColumn()]
        columns.append(progress.TextColumn("{task.fields[note]}"))
        self._progress = progress.Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=total, rate="", note="")
        self._shown = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._progress.start()
        self._shown.enter_context(console.shown(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.close()
        self._progress.stop()

    def update(
        self, done: float | None = None, *, total: float | None = None, rate: str | None = None, note: str | None = None
    ) -> None:
        """Show new values; None leaves a value unchanged."""
        console.touch()
        fields = {name: text for name, text in (("rate", rate), ("note", note)) if text is not None}
        self._progress.update(self._task, completed=done, total=total, **fields)  # type: ignore[arg-type]

    def line(self, text: str) -> None:
        """Print a line of text above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the bar for the length of a `with` block."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()


class RunProgress:
    """Progress of a run, from its ledger rows. A context manager."""

    def __init__(self, title: str, *, steps: int | None, seconds: float | None):
        """Set up the progress of a run with a budget of `steps` training steps, or of `seconds` of wall time."""
        self._title, self._total, self._timed = title, seconds or steps or 1, seconds is not None
        self._start = self._last_line = time.perf_counter()
        self._first: float | None = None  # cost at the first row
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = Bar(self._title, total=self._total).__enter__()
            self._bar.update(rate="compiling")
            self._bar.line(explain("champion", "current"))
        else:
            console.say(self._title, "compiling")
            console.say(self._title, explain("champion", "current"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the bar for the length of a `with` block."""
        with self._bar.paused() if self._bar is not None else contextlib.nullcontext():
            yield

    def row(self, row: dict[str, Any]) -> None:
        """Show a ledger row."""
        now = time.perf_counter()
        if self._first is None:  # what came before was compilation, or the work of an earlier process
            self._first, self._start = row["cost"], now
        pace = (row["cost"] - self._first) / max(now - self._start, 1e-9)
        rate = f"{pace:,.0f} steps/s" if pace else "no rate yet"
        champion, current = ("unknown" if score is None else f"{score:.1%}" for score in promise_scores(row))
        note, news = f"champion {champion}, current {current}", race_news(row)
        if where := who_trains(row):
            note += f", {where}"
        done = row["wall_s"] if self._timed else row["cost"]
        if self._bar is not None:
            self._bar.update(done, rate=rate, note=note)
            if news:
                self._bar.line(news)
        elif news or now - self._last_line >= PLAIN_EVERY_S or row["verdict"] in ("promote", "roll back"):
            self._last_line = now
            left: float | None = self._total - done
            if left is not None and not self._timed:
                left = left / pace if pace else None
            console.say(
                self._title,
                f"{min(done / self._total, 1):.0%}, {row['cost']} steps, {rate}"
                f"{'' if left is None else f', {max(left, 0):.0f} s left'}; {note}; "
                f"{row['verdict']} {row['arm'] or ''}".rstrip()
                + (f"; {news}" if news else ""),
            )


class CountProgress:
    """Progress of a pass over many items. A context manager; silent if the pass is short."""

    def __init__(self, title: str, *, things: str = "rows"):
        """Set up the progress of a pass named `title` over `things`."""
        self._title, self._things = title, things
        self._first: int | None = None  # items done by earlier passes
        self._start = self._last_line = 0.0
        self._shown = False
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` items are done."""
        now = time.perf_counter()
        if self._first is None:
            if done == total:
                return
            self._first, self._start, self._last_line = done, now, now
        if not self._shown:
            if done == total or now - self._start < SHOWN_AFTER_S:
                return
            self._shown = True
            self._show(done, total)
        pace = (done - self._first) / max(now - self._start, 1e-9)
        rate = f"{pace:,.{0 if pace >= 10 else 2}f} {self._things}/s" if pace else "no rate yet"
        if self._bar is not None:
            self._bar.update(done, total=total, rate=rate)
        elif now - self._last_line >= PLAIN_EVERY_S or done == total:
            self._last_line = now
            left = f", {(total - done) / pace:,.0f} s left" if pace and done < total else ""
            console.say(self._title, f"{done / max(total, 1):.0%}, {done:,} of {total:,} {self._things}, {rate}{left}")

    def line(self, text: str) -> None:
        """Print a line of text."""
        console.say(self._title, text)

    def _show(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            self._bar = Bar(self._title, total=total, counts=True).__enter__()
            self._bar.update(done)
        else:
            console.say(self._title, f"{total - (self._first or 0):,} of {total:,} {self._things} to do")
