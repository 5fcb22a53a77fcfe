"""The directory of a run: its lock, its files and its format version.

given.json       format version, fingerprint and class names of the data, and what was known of the teacher at the start
config.toml      resolved and complete; a directory with this file is a run
teacher/         the teacher's own run, if the run trains one
control/         the run of a student trained on labels alone, if configured
logits.npz       a copy of recorded teacher logits; the outputs of other teachers are in the cache that runs share
ledger.jsonl     one row per decision
checkpoints/     orbax, the newest few
spent.json       what the tests on decide have spent, in a run whose budget is a wall time
sizes/NN/        in a search: ledger, checkpoints and student of each size
archive.json     results of these students
trials.json      how the search continued from sizes that were stuck
student/         spec and variables of the delivered student
opened.json      openings of the sealed split: when, for which student and claims; written before the split is scored
certificate.json what is certified, and for which population
seen_rows.npz    digests of the examples, by which an evaluation recognizes them
report.json, report.html
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from ev3_distill.config import RunConfig
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import atomic_write

FORMAT = 2  # version of checkpoints and ledgers; a directory without a version is of version 1
FILES = (
    *("archive.json", "certificate.json", "config.toml", "given.json", "ledger.jsonl", "logits.npz", "opened.json"),
    *("report.html", "report.json", "seen_rows.npz", "spent.json", "trials.json"),
)  # written atomically
LOCK_TRIES = 5  # a hundredth of a second apart: `is_locked` locks a directory for an instant
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_occupied(directory: Path) -> None:
    """Raises InputError unless the directory does not exist or is empty, as a new run needs."""
    if directory.exists() and (not directory.is_dir() or any(not _is_leftover(path) for path in directory.iterdir())):
        raise InputError(
            f"a new run needs a directory that does not exist or is empty; {directory} is neither: "
            "choose another --out, or continue the run with --resume"
        )


@contextlib.contextmanager
def lock_run(directory: Path, *, make: bool = False) -> Iterator[None]:
    """Locks a run for this process; the operating system releases the lock however the process ends.

    Args:
      directory: of the run.
      make: whether to create the directory first.

    Raises:
      InputError: another process holds the lock, or the directory cannot be created.
    """
    try:
        if make:
            directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"a run needs a directory that can be created and written; got {directory} ({error.strerror}): choose another"
        ) from None
    try:
        for left in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not left:
                    raise InputError(
                        f"only one process at a time may work in a run; another one works in {directory}: wait for it"
                    ) from None
                time.sleep(0.01)
        for path in filter(_is_partial, directory.iterdir()):
            path.unlink()
        yield
    finally:
        os.close(descriptor)


def is_locked(directory: Path) -> bool:
    """Whether a process works in the run now. For an instant this locks the directory, so call it rarely."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def create(directory: Path, config: RunConfig, inputs: dict[str, Any]) -> None:
    """Makes a locked directory a run.

    Args:
      directory: new or empty.
      config: of the run.
      inputs: facts about the data and the teacher, see `read_inputs`.
    """
    refuse_occupied(directory)
    write_json(directory / "given.json", {"format": FORMAT, **inputs})
    _write(directory / "config.toml", tomli_w.dumps(dataclasses.asdict(config)))


def read_inputs(directory: Path, fingerprint: str, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The inputs that a run started with: `fingerprint` and `class_names` of its data, and `teacher` facts if one was named.

    Args:
      directory: of the run.
      fingerprint: of the data now. It covers the numbers of the classes, and not always their names.
      class_names: of the data now; None: not compared.

    Raises:
      InputError: the data have another fingerprint or other class names now, or the run is unfinished and of another format
        version.
    """
    inputs: dict[str, Any] = read_json(directory / "given.json")
    if inputs["fingerprint"] != fingerprint:
        raise InputError(
            f"a resumed run needs the data that it started with, fingerprint {inputs['fingerprint'][:12]}; got "
            f"{fingerprint[:12]}: restore the old data, or start a new run with --out"
        )
    started_with = inputs.get("class_names")  # missing in older runs
    if class_names is not None and started_with is not None and list(class_names) != started_with:
        pairs = itertools.zip_longest(started_with, class_names)
        old, new = next(pair for pair in pairs if pair[0] != pair[1])
        raise InputError(
            f"a resumed run needs the class names that it started with; got '{new}' where '{old}' was: restore the old "
            "names, or start a new run with --out"
        )
    check_format(directory)
    return inputs


def check_format(directory: Path) -> None:
    """Raises InputError if a run is unfinished and its checkpoints are of another format version."""
    version = read_json(directory / "given.json").get("format", 1)
    if version != FORMAT and not (directory / "report.json").exists():
        raise InputError(
            f"an unfinished run can be resumed only by the format version that started it; {directory} has version "
            f"{version} and this is version {FORMAT}: resume it with the older release, or start a new run with --out"
        )


def _is_leftover(path: Path) -> bool:
    """Whether a process that was killed before the directory became a run may have left this file."""
    return path.name == "given.json" or _is_partial(path)


def _is_partial(path: Path) -> bool:
    """Whether a killed process left this file partially written."""
    return any(path.name.startswith(f".{name}.") for name in FILES) and path.is_file()


@contextlib.contextmanager
def explain_full_disk(directory: Path) -> Iterator[None]:
    """Turns the errors that libraries raise for a full disk into one InputError; what was written before stays."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in FULL_DISK
        if full or any(os.strerror(number) in str(error) for number in FULL_DISK):
            resumable = (directory / "config.toml").exists()
            way_out = f"--resume {directory} (nothing up to the last checkpoint is lost)" if resumable else "try again"
            raise InputError(
                f"a run needs free space on its disk; {directory} is on a full one: free some, then {way_out}"
            ) from error
        raise


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
            f"a run needs a readable {path.name}; {path} is missing or damaged ({error}): name another run"
        ) from None
    return content


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
