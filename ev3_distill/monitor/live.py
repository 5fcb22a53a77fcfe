"""Following a run that another process works in, by reading its files: on a terminal a panel, elsewhere plain lines."""

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
from ev3_distill.runtime.ledger import PROMISE, Tail, open_tails
from ev3_distill.training.run_dir import is_held

EVERY_S = 0.5
PLAIN_EVERY_S = 5.0
QUIET_S = 2.0  # without a row, after which it is asked whether the process lives
SHOWN = 5  # promotions


class Part:
    """One ledger of a run as it grows: a teacher, the student, or a size of a search."""

    def __init__(self, name: str, *, budget: str, delta: float):
        parsed = Budget.parse(budget)
        self.name, self.last = name, dict[str, Any]()
        self.steps = collections.Counter[str]()  # of each arm
        self.promotions: dict[int, str] = {}  # by iteration
        self.left = self._delta = delta  # of the error budget
        self._steps, self._seconds = parsed.steps, parsed.seconds

    def take(self, row: dict[str, Any]) -> str | None:
        """Takes a row; gives a line where it is a promotion or a rollback. Those that come again are left out."""
        if self.last and row["iteration"] <= self.last["iteration"]:
            return None
        closing = bool(self.last) and row["cost"] == self.last["cost"]  # trains no more, and takes what is left
        self.last = row
        self.steps.update(row["steps"])
        if closing:
            self.left = 0.0
        elif row["test"]:
            self.left = row["test"]["alpha"] / SHARE * (SHARE if row["verdict"] == "promote" else 1 - SHARE)
        if row["verdict"] not in ("promote", "roll back"):
            return None
        told = f"{row['cost']:,} steps: {row['verdict']} {row['arm'] or ''}".rstrip()
        if row["objective"] != PROMISE:
            told += f", for {row['objective']}"
        told += f", {_percent(row['champion_accuracy'])} on decide"
        if row["verdict"] == "promote":
            self.promotions[row["iteration"]] = told
        return told

    def share(self) -> float | None:
        """Of the budget that is spent; None where it is in epochs, whose steps no file tells."""
        if self._seconds:
            return min(self.last["wall_s"] / self._seconds, 1)
        return min(self.last["cost"] / self._steps, 1) if self._steps else None

    def lines(self) -> list[str]:
        """What there is to tell."""
        row, share, spent = self.last, self.share(), sum(self.steps.values())
        of = "" if share is None else f"{share:.0%}, "
        arms = ", ".join(f"{name} {count / spent:.0%}" for name, count in self.steps.most_common()) if spent else "none"
        return [
            f"{self.name}: {of}{row['cost']:,} steps, iteration {row['iteration']}",
            f"champion {_percent(row['champion_accuracy'])} on decide, current {_percent(row['current_accuracy'])} on assess",
            f"arms: {arms}",
            f"error budget left: {self.left:.3g} of {self._delta:g}; {len(self.promotions)} promotions",
        ]


def follow(directory: Path) -> bool:
    """Shows a run until it is finished, or its process is gone.

    Args:
      directory: of the run, which is only read.

    Returns:
      Whether it is finished.

    Raises:
      InputError: there is no run.
    """
    if not (directory / "config.toml").is_file():
        raise InputError(
            f"report --live follows a run; {directory} has no config.toml: name its directory, as compress --out gave it"
        )
    chosen = tomllib.loads((directory / "config.toml").read_text())
    followed = _Followed(directory, chosen)
    with _Panel() if sys.stdout.isatty() else _Lines() as shown:
        news = time.monotonic()
        while True:
            ended = (directory / "report.json").exists()  # asked first: what is read then is all that there is
            gone = not ended and time.monotonic() - news > QUIET_S and not is_held(directory)
            told = followed.read()
            if told:
                news = time.monotonic()
            shown.show(followed, told)
            if ended or (gone and not told):
                break
            time.sleep(EVERY_S)
    if not ended:
        name = "compress" if "student" in chosen else "teach"
        print(f"No process works in {directory}; go on with: ev3-distill {name} --resume {shlex.quote(str(directory))}")
    return ended


class _Followed:
    """All ledgers of a run."""

    def __init__(self, directory: Path, chosen: dict[str, Any]):
        self.directory, self._chosen = directory, chosen
        self._tails: dict[str, Tail] = {}
        self.parts: dict[str, Part] = {}
        self.now: Part | None = None

    def read(self) -> list[tuple[Part, str | None]]:
        """What came since the last call: a line for each row that has something to say."""
        self._tails = open_tails(self.directory, self._tails)
        told = []
        for name, tail in self._tails.items():
            for row in tail.rows():
                if name not in self.parts:
                    self.parts[name] = self._part(name)
                self.now = self.parts[name]
                told.append((self.now, self.now.take(row)))
        return told

    def _part(self, name: str) -> Part:
        budget = self._chosen["teacher_budget"] if name == "teacher" else self._chosen["budget"]
        return Part(name, budget=budget, delta=self._chosen["ev3"]["delta"])


class _Lines:
    """Plain lines: each promotion and rollback, and now and then how far the run is."""

    def __init__(self) -> None:
        self._told = -PLAIN_EVERY_S

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *of_error: object) -> None:
        pass

    def show(self, followed: _Followed, told: list[tuple[Part, str | None]]) -> None:
        if followed.now is None and self._told < 0:
            self._told = 0.0
            print(f"{followed.directory}: compiling", flush=True)
        for part, line in told:
            if line:
                print(f"{part.name}: {line}", flush=True)
        now = time.monotonic()
        if followed.now is not None and told and now - self._told >= PLAIN_EVERY_S:
            self._told = now
            print("; ".join(followed.now.lines()), flush=True)


class _Panel:
    """A panel that is drawn again and again."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(auto_refresh=False)

    def __enter__(self) -> "_Panel":
        self._live.start()
        return self

    def __exit__(self, *of_error: object) -> None:
        self._live.stop()

    def show(self, followed: _Followed, told: list[tuple[Part, str | None]]) -> None:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        part = followed.now
        lines = ["compiling"] if part is None else part.lines()
        recent = [] if part is None else list(part.promotions.values())[-SHOWN:]
        inside: list[Any] = [Text(line) for line in lines]
        if part is not None and (share := part.share()) is not None:
            inside.insert(1, ProgressBar(total=1, completed=share, width=40))
        inside += [Text(line, style="green") for line in recent]
        self._live.update(Panel(Group(*inside), title=Text(str(followed.directory))), refresh=True)


def _percent(share: float | None) -> str:
    return "not known" if share is None else f"{share:.1%}"
