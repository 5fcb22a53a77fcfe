"""A run directory: what a run leaves on disk, so that a kill at any moment loses nothing and a resume is bit-exact.

given.json       the fingerprint of the data and what was known of the teacher at the start
config.toml      resolved and complete; its presence makes a directory a run
teacher/         the teacher's own run, where the run trains one
logits.npz       where the teacher was given as logits: these; what any other says is in the cache that runs share
ledger.jsonl     a row per decision
checkpoints/     orbax, the last few
sizes/NN/        where the run searches for a size: ledger, checkpoints and student of each that it tried
archive.json     what each of these students showed
trials.json      and how a stuck one went on
student/         spec and variables, once finished
opened.json      when the sealed split was opened, for which student and which claims; written before
certificate.json what is promised, and of what population
report.json, report.html
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import tomli_w

from ev3_distill.config import EV3
from ev3_distill.core.flatten_state import Flat
from ev3_distill.errors import InputError
from ev3_distill.runtime.checkpoint import Checkpoints
from ev3_distill.runtime.files import atomic_write
from ev3_distill.runtime.ledger import Ledger, read_rows, row_of
from ev3_distill.training.iterate import UNLIMITED, Pipeline
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Pools, State

FILES = (
    *("archive.json", "certificate.json", "config.toml", "given.json", "ledger.jsonl", "logits.npz", "opened.json"),
    *("report.html", "report.json", "trials.json"),
)  # appear whole
HELD_FOR_AN_INSTANT = 5  # tries, a hundredth of a second apart, for `is_held` may be asked just then
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PACKAGES = ("ev3-distill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


def refuse_occupied(directory: Path) -> None:
    """A new run needs a directory that is new or empty.

    Raises:
      InputError: it is neither.
    """
    if directory.exists() and (not directory.is_dir() or any(not _is_beginning(path) for path in directory.iterdir())):
        raise InputError(
            f"a new run needs a directory that does not exist or is empty; {directory} is neither: "
            "choose another --out, or go on with it by --resume"
        )


@contextlib.contextmanager
def held(directory: Path, *, make: bool = False) -> Iterator[None]:
    """Holds the run for this process; the operating system frees it however the process ends.

    Args:
      directory: of the run.
      make: the directory first.

    Raises:
      InputError: another process works in it, or it cannot be made.
    """
    try:
        if make:
            directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"a run needs a directory that it can make and write; got {directory} ({error.strerror}): choose another"
        ) from None
    try:
        for left in reversed(range(HELD_FOR_AN_INSTANT)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not left:
                    raise InputError(
                        f"one process at a time may work in a run; another works in {directory}: wait for it"
                    ) from None
                time.sleep(0.01)
        for path in filter(_is_stale, directory.iterdir()):
            path.unlink()
        yield
    finally:
        os.close(descriptor)


def is_held(directory: Path) -> bool:
    """Whether a process works in the run now. Who follows a run asks seldom: for that instant nobody else can hold it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def create(directory: Path, config: Any, given: dict[str, Any]) -> None:
    """Makes a held directory a run.

    Args:
      directory: new or empty.
      config: of the run.
      given: facts of what the run was given, see `given_to`.
    """
    refuse_occupied(directory)
    write_json(directory / "given.json", given)
    _write(directory / "config.toml", tomli_w.dumps(dataclasses.asdict(config)))


def given_to(directory: Path, fingerprint: str) -> dict[str, Any]:
    """What the run was given at its start: `fingerprint` of its data, `teacher` facts where one was named.

    Raises:
      InputError: the data have another fingerprint now.
    """
    given: dict[str, Any] = read_json(directory / "given.json")
    if given["fingerprint"] != fingerprint:
        raise InputError(
            f"a resumed run needs the data that it began with, fingerprint {given['fingerprint'][:12]}; got "
            f"{fingerprint[:12]}: put the old data back, or start anew with --out"
        )
    return given


def _is_beginning(path: Path) -> bool:
    """Whether a process that was killed before the directory was a run may have left this file."""
    return path.name == "given.json" or _is_stale(path)


def _is_stale(path: Path) -> bool:
    """Whether a killed process left this file half written."""
    return any(path.name.startswith(f".{name}.") for name in FILES) and path.is_file()


@contextlib.contextmanager
def room_on_disk(directory: Path) -> Iterator[None]:
    """Turns a full disk, however a library tells it, into one clear error; what was written before stays."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        told = str(error)
        full = isinstance(error, OSError) and error.errno in FULL_DISK
        if full or any(os.strerror(number) in told for number in FULL_DISK):
            begun = (directory / "config.toml").exists()
            way_out = (
                f"go on with --resume {directory} (all up to the last checkpoint is kept)" if begun else "try again"
            )
            raise InputError(
                f"a run needs room on its disk; {directory} is on one that is full: free some, then {way_out}"
            ) from error
        raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back Ctrl-C until the block is done, so that ledger and checkpoint never part."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if told:
        raise KeyboardInterrupt


def iterate(
    directory: Path,
    distillation: Distillation,
    pools: Pools,
    arms: Sequence[str],
    *,
    seed: int,
    budget: int | None,
    seconds: float | None,
    checkpoint_s: float,
    tell: Callable[[dict[str, Any]], None],
    warn: Callable[[str], None],
    pipeline: Pipeline | None = None,
    start: Callable[[], State] | None = None,
    pause: int = UNLIMITED,
    about: Mapping[str, Any] | None = None,
) -> State:
    """Runs to the end of the budget, from the newest checkpoint if there is one.

    Args:
      directory: of the run.
      distillation: of the student.
      pools: the data.
      arms: their names.
      seed: of a fresh start.
      budget: training steps, unless the budget is a wall time.
      seconds: the wall time.
      checkpoint_s: seconds between checkpoints.
      tell: gets each ledger row.
      warn: gets a line for each damaged checkpoint.
      pipeline: streams the explore split part by part, in place of `pools.explore`.
      start: makes the state to begin with, in place of a fresh one.
      pause: global step at which to stop for now; the run is then not closed.
      about: what every row tells, too.

    Returns:
      The final state, also saved. An interrupt (Ctrl-C) is saved too and then passes on.
    """
    with contextlib.closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        ledger = Ledger(directory / "ledger.jsonl")
        began = saved = time.perf_counter()
        compiled = distillation.compile_s
        if (found := checkpoints.restore(distillation.shapes(pools))) is not None:
            _, state, warnings = found
            for line in warnings:
                warn(line)
        else:
            if start is None:
                start = functools.partial(
                    distillation.begin_best, pools, seed, budget=budget or UNLIMITED, seconds=seconds, pipeline=pipeline
                )
            state = start()
        ledger.truncate(int(state.clock.iteration))
        past = max((row["wall_s"] for row in read_rows(directory / "ledger.jsonl")), default=0.0)
        reached: Flat | None = None  # the state of the ledger's last row, once there is one from here

        def written() -> State:
            return state if reached is None else distillation.loop.unflatten(reached)

        def save() -> None:
            ledger.sync()
            checkpoints.save(int(written().clock.iteration), written())

        begun = time.perf_counter() - began - (distillation.compile_s - compiled)
        left = None if seconds is None else seconds - past - begun
        objectives = distillation.evaluator.objectives
        try:
            for following, decisions in distillation.loop(
                pools, state, budget=budget or UNLIMITED, seconds=left, pipeline=pipeline, pause=pause
            ):
                with uninterrupted():
                    spent = time.perf_counter() - began - (distillation.compile_s - compiled)
                    rules = objectives.promise, objectives.goals
                    told = [
                        {**(about or {}), **row_of(decision, arms, *rules, wall_s=past + spent)}
                        for decision in decisions
                    ]
                    ledger.append(told)
                    reached = following
                    for row in told:
                        tell(row)
                    if time.perf_counter() - saved >= checkpoint_s:
                        save()
                        saved = time.perf_counter()
        except KeyboardInterrupt:
            with uninterrupted():
                save()
            raise
        save()
        return written()


def report_of(
    directory: Path, state: State, arms: Sequence[str], *, compile_s: float, config: EV3, facts: dict[str, Any]
) -> dict[str, Any]:
    """report.json: what state and ledger tell, and `facts` (teacher, student, certificate, ...), which have the last word.

    Times (wall_s, compile_s) are the only entries in which two runs of one configuration on one machine differ.
    """
    history = list(read_rows(directory / "ledger.jsonl"))
    cost = int(state.clock.cost)
    return {
        "cost": {
            "wall_s": round(history[-1]["wall_s"] + compile_s, 3),
            "compile_s": round(compile_s, 3),
            "steps": cost,
            "drawing": cost - int(state.arms.cost.sum()),
            "examples": cost * config.batch_size,
        },
        "iterations": int(state.clock.iteration),
        "promotions": sum(row["verdict"] == "promote" for row in history),
        "rollbacks": sum(row["verdict"] == "roll back" for row in history),
        "objectives": collections.Counter(row["objective"] for row in history),
        "met": bool(state.met),
        "arms": [
            {
                "name": name,
                "share": int(state.arms.cost[i]) / max(cost, 1),
                "steps": int(state.arms.cost[i]),
                "wins": int(state.arms.wins[i]),
                "promotions": int(state.arms.promotions[i]),
            }
            for i, name in enumerate(arms)
        ],
        "error_budget": {
            "delta": config.delta,
            "left": float(state.budget.left),
            "tests": int(state.budget.tests),
        },
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        **facts,
    }


def write_lines(path: Path, content: Iterable[dict[str, Any]]) -> None:
    """Writes a file of JSON lines atomically."""
    _write(path, "".join(json.dumps(row) + "\n" for row in content))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    _write(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a run.

    Raises:
      InputError: it is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"a run has a {path.name} that can be read; {path} is none ({error}): name another run"
        ) from None
    return content


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
