"""Follow a run of another process by reading its files: a panel on a terminal, plain lines elsewhere."""

import collections
import shlex
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from ev3_distill.config import Budget
from ev3_distill.core.adapt import SHARE
from ev3_distill.errors import InputError
from ev3_distill.runtime.glossary import explain
from ev3_distill.runtime.ledger import PROMISE, Tail, open_tails, promise_scores
from ev3_distill.runtime.race import race_news, who_trains
from ev3_distill.training.run_dir import is_locked

READ_EVERY_S = 0.5
PLAIN_EVERY_S = 5.0  # between two plain lines without news
QUIET_S = 2.0  # without a new row, after which the lock of the run is checked
MAX_PROMOTIONS = 5  # shown in the panel
LEGEND = explain("champion", "current", "arm", "error budget")


class Part:
    """One ledger of a run as it grows: a teacher, the student, or a size of a search."""

    def __init__(self, name: str, *, budget: str, delta: float):
        parsed = Budget.parse(budget)
        self.name, self.last = name, dict[str, Any]()
        self.steps = collections.Counter[str]()  # of each arm
        self.promotions: dict[int, str] = {}  # by iteration
        self.left = self._delta = delta  # of the error budget
        self._steps, self._seconds = parsed.steps, parsed.seconds

    def add(self, row: dict[str, Any]) -> str | None:
        """Add a ledger row. Rows repeated after a resume are ignored.

        Returns:
          A line to show for a promotion, a rollback, or an arm that left the race.
        """
        if self.last and row["iteration"] <= self.last["iteration"]:
            return None
        # An iteration without training closes a run and spends the rest of its error budget, except in a search.
        closing = bool(self.last) and row["cost"] == self.last["cost"] and "size" not in row
        self.last = row
        self.steps.update(row["steps"])
        if closing:
            self.left = 0.0
        elif row["test"]:
            self.left = row["test"]["alpha"] / SHARE * (SHARE if row["verdict"] == "promote" else 1 - SHARE)
        news = race_news(row)
        if row["verdict"] not in ("promote", "roll back"):
            return f"{row['cost']:,} steps: {news}" if news else None
        line = f"{row['cost']:,} steps: {row['verdict']} {row['arm'] or ''}".rstrip()
        if row["objective"] != PROMISE:
            line += f", for {row['objective']}"
        line += f", {_percent(promise_scores(row)[0])} on decide"
        if row["verdict"] == "promote":
            self.promotions[row["iteration"]] = line
        return f"{line}; {news}" if news else line

    def fraction_done(self) -> float | None:
        """Fraction of the budget that is spent; None for a budget in epochs, whose steps are in no file."""
        if self._seconds:
            return min(self.last["wall_s"] / self._seconds, 1)
        return min(self.last["cost"] / self._steps, 1) if self._steps else None

    def lines(self) -> list[str]:
        """The state of this part, in a few lines."""
        row, done, spent = self.last, self.fraction_done(), sum(self.steps.values())
        champion, current = promise_scores(row)
        percentage = "" if done is None else f"{done:.0%}, "
        arms = ", ".join(f"{name} {count / spent:.0%}" for name, count in self.steps.most_common()) if spent else "none"
        return [
            f"{self.name}: {percentage}{row['cost']:,} steps, iteration {row['iteration']}",
            f"champion {_percent(champion)} on decide, current {_percent(current)} on assess",
            f"arms: {arms}{f'; {now}' if (now := who_trains(row)) else ''}",
            f"error budget left: {self.left:.3g} of {self._delta:g}; {len(self.promotions)} promotions",
        ]


def follow(directory: Path) -> bool:
    """Show a run until it is finished or its process has ended.

    Args:
      directory: of the run; it is only read.

    Returns:
      Whether the run is finished.

    Raises:
      InputError: there is no run.
    """
    if not (directory / "config.toml").is_file():
        raise InputError(
            f"report --live follows a run; {directory} has no config.toml: use the directory given to compress --out"
        )
    config = tomllib.loads((directory / "config.toml").read_text())
    followed = _Followed(directory, config)
    with _Panel() if sys.stdout.isatty() else _Lines() as display:
        last_news = time.monotonic()
        while True:
            finished = (directory / "report.json").exists()  # before reading: then the rows read are all rows
            ended = not finished and time.monotonic() - last_news > QUIET_S and not is_locked(directory)
            news = followed.read()
            if news:
                last_news = time.monotonic()
            display.show(followed, news)
            if finished or (ended and not news):
                break
            time.sleep(READ_EVERY_S)
    if not finished:
        command = "compress" if "student" in config else "teach"
        print(
            f"No process works in {directory}; resume it with: ev3-distill {command} --resume {shlex.quote(str(directory))}"
        )
    return finished


class _Followed:
    """All ledgers of a run."""

    def __init__(self, directory: Path, config: dict[str, Any]):
        self.directory, self._config = directory, config
        self._tails: dict[str, Tail] = {}
        self.parts: dict[str, Part] = {}
        self.active: Part | None = None

    def read(self) -> list[tuple[Part, str | None]]:
        """The rows added since the last call: their part, and a line for those that have one."""
        self._tails = open_tails(self.directory, self._tails)
        news = []
        for name, tail in self._tails.items():
            for row in tail.rows():
                if name not in self.parts:
                    self.parts[name] = self._part(name)
                self.active = self.parts[name]
                news.append((self.active, self.active.add(row)))
        return news

    def _part(self, name: str) -> Part:
        budget = self._config["teacher_budget"] if name == "teacher" else self._config["budget"]
        return Part(name, budget=budget, delta=self._config["ev3"]["delta"])


class _Lines:
    """Plain lines: each promotion and rollback, and the state every few seconds."""

    def __init__(self) -> None:
        self._last_line = -PLAIN_EVERY_S

    def __enter__(self) -> "_Lines":
        print(LEGEND, flush=True)
        return self

    def __exit__(self, *of_error: object) -> None:
        pass

    def show(self, followed: _Followed, news: list[tuple[Part, str | None]]) -> None:
        if followed.active is None and self._last_line < 0:
            self._last_line = 0.0
            print(f"{followed.directory}: compiling", flush=True)
        for part, line in news:
            if line:
                print(f"{part.name}: {line}", flush=True)
        now = time.monotonic()
        if followed.active is not None and news and now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            print("; ".join(followed.active.lines()), flush=True)


class _Panel:
    """A panel that is redrawn."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(auto_refresh=False)

    def __enter__(self) -> "_Panel":
        self._live.start()
        return self

    def __exit__(self, *of_error: object) -> None:
        self._live.stop()

    def show(self, followed: _Followed, news: list[tuple[Part, str | None]]) -> None:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        part = followed.active
        lines = ["compiling"] if part is None else part.lines()
        recent = [] if part is None else list(part.promotions.values())[-MAX_PROMOTIONS:]
        content: list[Any] = [Text(line) for line in lines]
        if part is not None and (done := part.fraction_done()) is not None:
            content.insert(1, ProgressBar(total=1, completed=done, width=40))
        content += [Text(line, style="green") for line in recent]
        content.append(Text(LEGEND, style="dim"))
        self._live.update(Panel(Group(*content), title=Text(str(followed.directory))), refresh=True)


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{fraction:.1%}"
