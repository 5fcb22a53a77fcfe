"""The ledger's numbers as TensorBoard events, written with clu: one folder per part of a run, steps in training steps.

A thread reads the ledgers while the run writes them, so the run never waits. After a resume, steps that the folder already has
are not written again.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ev3_distill.errors import InputError, summary, warn
from ev3_distill.runtime.ledger import Tail, open_tails
from ev3_distill.runtime.race import proposed_scores

EVERY_S = 2.0  # between two reads of the ledgers
FIELDS = ("length", "gain", "wall_s")


def scalars_of(row: dict[str, Any]) -> dict[str, float]:
    """Scalars of a ledger row by name, without unknown ones."""
    values = {name: x for name, x in row.items() if name in FIELDS or name.startswith(("champion_", "current_"))}
    values |= {f"score/{arm}": score for arm, score in row["scores"].items()}
    values |= {f"proposed/{arm}": score for arm, score in proposed_scores(row).items()}
    values |= {f"behind/{arm}": gap for arm, gap in row.get("behind", {}).items()}
    values |= {f"steps/{arm}": count for arm, count in row["steps"].items()}
    values |= {f"risk/{goal}": risk for goal, risk in row["risks"].items()}
    values["promoted"] = float(row["verdict"] == "promote")
    for arm, tuned in row.get("tuned", {}).items():
        values |= {f"tuned/{arm}/{name}": x for name, x in tuned.items()}
    return {name: float(x) for name, x in values.items() if isinstance(x, int | float)}


class Scalars:
    """Writes the scalars of a run's ledgers."""

    def __init__(self, run: Path, out: Path):
        """Read the ledgers of `run` and write events to `out`.

        Raises:
          InputError: the extra is missing, or the folder cannot be written.
        """
        self._run, self._out = run, out
        self._metrics, self._tensorflow = _packages()
        self._tails: dict[str, Tail] = {}
        self._writers: dict[str, Any] = {}
        self._written: dict[str, int] = {}  # last step written
        self._pending: dict[str, tuple[int, dict[str, float]]] = {}  # the newest step; the last step has two rows
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--tensorboard needs a writable folder; got {out} ({error.strerror}): choose another"
            ) from None

    def write(self) -> None:
        """Write the rows added since the last call."""
        self._tails = open_tails(self._run, self._tails)
        for name, tail in self._tails.items():
            for row in tail.rows():
                if name not in self._writers:
                    self._written[name] = self._last_step(self._out / name)
                    self._writers[name] = self._metrics.SummaryWriter(str(self._out / name))
                self._take(name, row["cost"], scalars_of(row))
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Write the remaining rows and close the files."""
        self.write()
        for name, writer in self._writers.items():
            self._release(name)
            writer.close()

    def _take(self, name: str, step: int, scalars: dict[str, float]) -> None:
        pending, before = self._pending.get(name, (-1, {}))
        if step <= max(self._written[name], pending - 1):
            return
        if step == pending:
            scalars = {**before, **scalars, "promoted": max(before["promoted"], scalars["promoted"])}
        else:
            self._release(name)
        self._pending[name] = step, scalars

    def _release(self, name: str) -> None:
        if name in self._pending:
            step, scalars = self._pending.pop(name)
            self._writers[name].write_scalars(step, scalars)
            self._written[name] = step

    def _last_step(self, folder: Path) -> int:
        """The last step in the folder's files, -1 if there is none. A torn end is ignored."""
        last = -1
        for path in sorted(folder.glob("events.out.tfevents.*")):
            with contextlib.suppress(self._tensorflow.errors.DataLossError):
                for event in self._tensorflow.compat.v1.train.summary_iterator(str(path)):
                    if event.summary.value:
                        last = max(last, event.step)
        return last


@contextlib.contextmanager
def write_tensorboard(run: Path, out: Path) -> Iterator[None]:
    """Write the scalars of a run during a `with` block, and the rest when it ends, with or without an error."""
    scalars, done = Scalars(run, out), threading.Event()

    def follow() -> None:
        while not done.wait(EVERY_S):
            scalars.write()

    thread = threading.Thread(target=_warn_on_failure, args=(follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _warn_on_failure(scalars.close)


def _warn_on_failure(work: Any) -> None:
    """Warn in place of an error: a full or missing folder must not end the run."""
    try:
        work()
    except Exception as error:
        warn(f"no more TensorBoard events are written: {summary(error)}")


def _packages() -> tuple[Any, Any]:
    try:
        import tensorflow  # clu writes with it
        from clu import metric_writers
    except ImportError as error:
        raise InputError(
            f"--tensorboard needs the packages clu and tensorflow; one is missing ({error}): "
            "pip install 'ev3-distill[tensorboard]'"
        ) from None
    return metric_writers, tensorflow
