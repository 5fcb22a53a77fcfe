"""The ledger's numbers for TensorBoard, by clu's metric writers: a folder for each part of a run, a step for each of training.

They are read from the ledgers while the run writes them, so nothing in the run waits for them. What the folder has already, of
a run that was killed, is not written again.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ev3_distill.errors import InputError, summary, warn
from ev3_distill.runtime.ledger import Tail, open_tails

EVERY_S = 2.0
SHOWN = ("champion_accuracy", "current_accuracy", "length", "gain", "wall_s")


def scalars_of(row: dict[str, Any]) -> dict[str, float]:
    """Of a ledger row, by name; what is not known is left out."""
    found: dict[str, Any] = {name: row[name] for name in SHOWN}
    found |= {f"score/{arm}": score for arm, score in row["scores"].items()}
    found |= {f"steps/{arm}": count for arm, count in row["steps"].items()}
    found |= {f"risk/{goal}": risk for goal, risk in row["risks"].items()}
    found["promoted"] = float(row["verdict"] == "promote")
    for arm, tuned in row.get("tuned", {}).items():
        found |= {f"tuned/{arm}/{name}": x for name, x in tuned.items()}
    return {name: float(x) for name, x in found.items() if isinstance(x, int | float)}


class Scalars:
    """Writes what ledgers tell."""

    def __init__(self, run: Path, out: Path):
        """Of a run, to a folder.

        Raises:
          InputError: the extra is missing, or the folder cannot be written.
        """
        self._run, self._out = run, out
        self._metrics, self._tensorflow = _packages()
        self._tails: dict[str, Tail] = {}
        self._writers: dict[str, Any] = {}
        self._written: dict[str, int] = {}  # the last step
        self._held: dict[
            str, tuple[int, dict[str, float]]
        ] = {}  # a step whose rows may not all be there: the last has two
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--tensorboard needs a folder that it can write; got {out} ({error.strerror}): choose another"
            ) from None

    def write(self) -> None:
        """Writes the rows that have come."""
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
        """Writes the rest."""
        self.write()
        for name, writer in self._writers.items():
            self._release(name)
            writer.close()

    def _take(self, name: str, step: int, found: dict[str, float]) -> None:
        held, before = self._held.get(name, (-1, {}))
        if step <= max(self._written[name], held - 1):
            return
        if step == held:
            found = {**before, **found, "promoted": max(before["promoted"], found["promoted"])}
        else:
            self._release(name)
        self._held[name] = step, found

    def _release(self, name: str) -> None:
        if name in self._held:
            step, found = self._held.pop(name)
            self._writers[name].write_scalars(step, found)
            self._written[name] = step

    def _last_step(self, folder: Path) -> int:
        """The last step that the folder's files hold, -1 where there is none; a torn end is no matter."""
        last = -1
        for path in sorted(folder.glob("events.out.tfevents.*")):
            with contextlib.suppress(self._tensorflow.errors.DataLossError):
                for event in self._tensorflow.compat.v1.train.summary_iterator(str(path)):
                    if event.summary.value:
                        last = max(last, event.step)
        return last


@contextlib.contextmanager
def written_for_tensorboard(run: Path, out: Path) -> Iterator[None]:
    """Writes what a run's ledgers tell while the block runs, and the rest when it ends, however it does."""
    scalars, done = Scalars(run, out), threading.Event()

    def follow() -> None:
        while not done.wait(EVERY_S):
            scalars.write()

    thread = threading.Thread(target=_told, args=(follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _told(scalars.close)


def _told(work: Any) -> None:
    """A folder that is full or gone ends no run."""
    try:
        work()
    except Exception as error:
        warn(f"nothing more is written for TensorBoard: {summary(error)}")


def _packages() -> tuple[Any, Any]:
    try:
        import tensorflow  # by which clu writes
        from clu import metric_writers
    except ImportError as error:
        raise InputError(
            f"--tensorboard needs the packages clu and tensorflow, of which one is not installed ({error}): "
            "pip install 'ev3-distill[tensorboard]'"
        ) from None
    return metric_writers, tensorflow
