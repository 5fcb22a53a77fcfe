"""Iterates a run under checkpoints: a kill at any moment loses nothing, and a resumed run is bit-exact."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ev3_distill.config import RunConfig
from ev3_distill.errors import warn
from ev3_distill.runtime.checkpoint import Checkpoints
from ev3_distill.runtime.ledger import Ledger, read_rows, row_of
from ev3_distill.runtime.preload import preload
from ev3_distill.training import spent_budget
from ev3_distill.training.iterate import Limits
from ev3_distill.training.setup import TrainingRun
from ev3_distill.types import Decision, State

OnRow = Callable[[dict[str, Any]], None]
Start = Callable[
    [State | None], State
]  # the state of the newest checkpoint, if there is one -> the state to continue from


def iterate(
    directory: Path,
    run: TrainingRun,
    config: RunConfig,
    *,
    limits: Limits,
    on_row: OnRow,
    start: Start | None = None,
    row_facts: Mapping[str, Any] | None = None,
) -> State:
    """Continues a run from its newest checkpoint, if there is one, to its limits.

    Args:
      directory: of the run, locked by this process.
      run: the built run.
      config: of the run.
      limits: its budget, wall time and pause.
      on_row: gets each ledger row.
      start: makes the initial state, instead of the best of several draws, and may amend that of a checkpoint.
      row_facts: added to every ledger row.

    Returns:
      The final state, also saved. An interrupt (Ctrl-C) saves the state and is then raised.
    """
    with contextlib.closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        loop = _Loop(directory, run, checkpoints, row_facts or {})
        return loop.run(config, limits, on_row, start)


class _Loop:
    """The ledger and the checkpoints of one run while it iterates."""

    def __init__(self, directory: Path, run: TrainingRun, checkpoints: Checkpoints, row_facts: Mapping[str, Any]):
        self._run, self._checkpoints, self._row_facts = run, checkpoints, row_facts
        self._directory, self._path = directory, directory / "ledger.jsonl"
        self._ledger = Ledger(self._path)
        self._started, self._compiled = time.perf_counter(), run.distillation.compile_s
        self._past = 0.0  # seconds of earlier processes
        self._repeatable = True  # whether a resumed run repeats the iterations that its checkpoint lacks
        self._state: State  # of the ledger's last row

    def run(self, config: RunConfig, limits: Limits, on_row: OnRow, start: Start | None) -> State:
        """Iterates to the limits; returns the final state."""
        saved, self._repeatable = time.perf_counter(), limits.seconds is None
        restored = self._restore()
        initial = start(restored) if start else restored or self._begin(config.seed, limits)
        self._state = initial if self._repeatable else spent_budget.charge(self._directory, initial)
        self._ledger.truncate(int(self._state.clock.iteration))
        self._past = max((row["wall_s"] for row in read_rows(self._path)), default=0.0)
        left = None if limits.seconds is None else limits.seconds - self._past - self._elapsed()
        preload()
        run = self._run
        iterations = run.distillation.loop(
            run.pools, self._state, budget=limits.budget, seconds=left, pipeline=run.pipeline, pause=limits.pause
        )
        try:
            for state, decisions in iterations:
                with uninterrupted():
                    self._record(state, decisions, on_row)
                    if time.perf_counter() - saved >= config.checkpoint_s:
                        self._save()
                        saved = time.perf_counter()
        except KeyboardInterrupt:
            with uninterrupted():
                self._save()
            raise
        self._save()
        return self._state

    def _begin(self, seed: int, limits: Limits) -> State:
        run = self._run
        return run.distillation.begin_best(
            run.pools, seed, budget=limits.budget, seconds=limits.seconds, pipeline=run.pipeline
        )

    def _restore(self) -> State | None:
        """The state of the newest readable checkpoint."""
        restored = self._checkpoints.restore(self._run.distillation.shapes(self._run.pools))
        if restored is None:
            return None
        _, state, warnings = restored
        for line in warnings:
            warn(line)
        return state

    def _elapsed(self) -> float:
        """Seconds since the start, without compile time."""
        return time.perf_counter() - self._started - (self._run.distillation.compile_s - self._compiled)

    def _record(self, state: State, decisions: list[Decision], on_row: OnRow) -> None:
        """Appends the ledger rows of decisions."""
        objectives, wall_s = self._run.distillation.evaluator.objectives, self._past + self._elapsed()
        written = [
            {
                **self._row_facts,
                **row_of(decision, self._run.arms, objectives.promise, objectives.goals, wall_s=wall_s),
            }
            for decision in decisions
        ]
        self._state = state
        if not self._repeatable and any(bool(decision.promotion.tested) for decision in decisions):
            spent_budget.record(self._directory, state.budget)
        self._ledger.append(written)
        for row in written:
            on_row(row)

    def _save(self) -> None:
        self._ledger.sync()
        self._checkpoints.save(int(self._state.clock.iteration), self._state)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C until the block is done, so that ledger and checkpoint stay consistent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if signals:
        raise KeyboardInterrupt
