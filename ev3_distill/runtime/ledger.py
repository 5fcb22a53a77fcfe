"""The ledger: an append-only file of JSON lines, one row per iteration.

A row states what was tried, what it cost and what was proven.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ev3_distill.certify.bounds import binomial_lower
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import atomic_write
from ev3_distill.types import VERDICTS, Decision, Goal, Promise

PROMISE = "promise"  # name of the objective when no goal steers
BREAKS = "would break a guard"  # why a proven candidate was not promoted
LOWERS = "the guard's own metric fell on decide"
MOVES = ("adopt", "promote", "final phase")  # verdicts of iterations whose selected proposal may be the current student


def row_of(
    decision: Decision, arms: Sequence[str], promise: Promise, goals: Sequence[Goal] = (), *, wall_s: float
) -> dict[str, Any]:
    """The ledger row of a decision.

    Args:
      decision: of one iteration.
      arms: names of the A arms.
      promise: of the run.
      goals: of the run.
      wall_s: seconds since the start of the run, without compilation. The only field that differs between two runs of a seed.
    """
    d: Any = jax.tree.map(np.asarray, decision)
    verdict = VERDICTS[int(d.verdict)]
    selected = arms[int(d.selected)] if d.selected >= 0 else None
    promoted_by = arms[int(d.promoted_arm)] if d.promoted_arm >= 0 else None
    return {
        "iteration": int(d.iteration),
        "cost": int(d.cost),
        "position": int(d.position),
        "steps": {name: int(n) for name, n in zip(arms, d.steps, strict=True)},
        "scores": {name: _number(x) for name, x in zip(arms, d.scores, strict=True)},
        **_race(d, arms, promise),
        "selected": selected,
        "discarded": int(d.discarded),
        "objective": goals[int(d.ruling)].name if d.ruling >= 0 else PROMISE,
        "risks": {goal.name: _number(risk) for goal, risk in zip(goals, d.risks, strict=True)},
        "gain": _number(d.gain) if selected else None,
        "gain_se": _number(d.gain_se) if selected else None,
        "verdict": verdict,
        "arm": promoted_by if verdict == "promote" else selected,
        "test": _test(d.promotion, promise, goals) if d.promotion.tested else None,
        f"champion_{promise.name}": _number(d.champion_score),
        f"current_{promise.name}": _number(d.current_score),
        "length": _number(d.length),
        **({"tuned": tuned} if (tuned := _tuned(d.tuned, arms)) else {}),
        "stuck": bool(d.stuck),
        "met": bool(d.met),
        "final": bool(d.final),
        "wall_s": round(wall_s, 3),
    }


def _race(d: Any, arms: Sequence[str], promise: Promise) -> dict[str, Any]:
    """How the arms that trained compare with the best of them, and which are in the race, left it or were asked.

    In the race all arms in it train. After it the leader trains alone, or beside an arm that was asked.
    """
    trained = [i for i, steps in enumerate(d.steps) if steps > 0]
    raced = trained if d.asked < 0 and len(trained) > 1 else []
    racing = [name for name, races in zip(arms, d.racing, strict=True) if races]
    return {
        f"proposed_{promise.name}": {arms[i]: _number(d.promise_scores[i]) for i in trained},
        "behind": {arms[i]: _number(d.behind[i]) for i in trained},
        "behind_se": {arms[i]: _number(d.behind_se[i]) for i in trained},
        "racing": racing if len(racing) > 1 else [],
        "left": [arms[i] for i in raced if not d.racing[i]],
        "asked": arms[int(d.asked)] if int(d.asked) in trained else None,
    }


def _tuned(shown: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Tuned hyperparameters by arm and name, for arms that tune any."""
    by_arm = zip(arms, shown, strict=True)
    return {arm: {name: np.asarray(x).tolist() for name, x in values.items()} for arm, values in by_arm if values}


def _number(x: Any) -> float | None:
    """None for nan and infinities, which JSON does not have."""
    return float(x) if np.isfinite(x) else None


def _test(test: Any, promise: Promise, goals: Sequence[Goal]) -> dict[str, Any]:
    """The paired test on decide, with a lower bound on the gain at the test's level if wins and losses alone decide it.

    `hypothesis` is what the test proves of the candidate if its p-value is at most `alpha`. The gain is in units of its scores.
    Given the examples on which the two students disagree, the number of wins is binomial. With the Clopper-Pearson lower bound
    theta of its probability, the bound on the gain is (2 theta - 1) (wins + losses) / n. It is positive exactly if the test
    promotes.
    """
    wins, losses, n, alpha = int(test.wins), int(test.losses), int(test.n), float(test.alpha)
    goal = goals[int(test.goal)] if test.goal >= 0 else None
    theta = binomial_lower(wins, wins + losses, alpha)
    hypothesis = f"the {promise.name} is higher than the champion's" if goal is None else goal.hypothesis
    return {
        "objective": PROMISE if goal is None else goal.name,
        "hypothesis": hypothesis.replace("{focus}", str(int(test.focus))),
        "kept": bool(test.breaks or test.lowers),
        "reason": BREAKS if test.breaks else LOWERS if test.lowers else None,
        "wins": wins,
        "losses": losses,
        "n": n,
        "alpha": alpha,
        "p_value": float(test.p_value),
        "gain": (wins - losses) / max(n, 1),  # no pairs: the class has no examples on decide
        "bound": (2 * theta - 1) * (wins + losses) / max(n, 1) if test.counts else None,
    }


def promise_scores(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """(champion's score on decide, current student's score on assess), from fields such as champion_accuracy."""
    champion, current = (
        next(value for name, value in row.items() if name.startswith(student)) for student in ("champion_", "current_")
    )
    return champion, current


class Ledger:
    """Appends rows to a file. If the process is killed, the file has complete rows and at most one torn row."""

    def __init__(self, path: Path):
        self._path = path

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows. They are with the operating system on return, and on disk after `sync`."""
        with self._path.open("ab") as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    def sync(self) -> None:
        """Force the rows to disk. Call it before writing the checkpoint that depends on them."""
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def truncate(self, iterations: int) -> None:
        """Keep the first `iterations` rows, those that the checkpoint includes, and remove the rest.

        Raises:
          InputError: there are fewer rows.
        """
        content = self._path.read_bytes() if self._path.exists() else b""
        lines = content.splitlines(keepends=True)
        keep = b"".join(lines[:iterations])
        if len(lines) < iterations or (keep and not keep.endswith(b"\n")):
            raise InputError(
                f"a resume needs the ledger row of every iteration that the checkpoint includes, {iterations} rows; "
                f"{self._path} has {len(content.splitlines())}, some of them cut or removed: start a new run in another "
                "directory"
            )
        if keep != content:
            with atomic_write(self._path) as file:
                file.write(keep)


class Tail:
    """Reads a ledger while another process appends to it: complete rows only, from the start again after a truncation."""

    def __init__(self, path: Path):
        self._path, self._file, self._offset = path, -1, 0

    def rows(self) -> list[dict[str, Any]]:
        """Rows added since the last call; none if there is no file yet or its last row is incomplete."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._offset:
                    self._file, self._offset = status.st_ino, 0
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


def open_tails(directory: Path, known: dict[str, Tail]) -> dict[str, Tail]:
    """Tails of all ledgers of a run that exist so far, by part of the run: student, teacher, sizes/01.

    Args:
      directory: of the run.
      known: tails from an earlier call, which are kept.
    """
    sizes = sorted((directory / "sizes").glob("*/ledger.jsonl"))
    parts = {str(path.parent.relative_to(directory)): path for path in sizes}
    if not parts:  # a search writes its own ledger from those of its sizes when it ends
        parts = {"student": directory / "ledger.jsonl"}
    inner = {name: directory / name / "ledger.jsonl" for name in ("teacher", "control")}
    parts = {**{name: path for name, path in inner.items() if path.exists()}, **parts}
    return {name: known.get(name) or Tail(path) for name, path in parts.items()}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ledger; none if there is no file yet."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            yield json.loads(line)
