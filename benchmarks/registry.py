"""Benchmarks of the tool itself: suites of rows, what to print of them, and what changed since.

A suite is a module with `collect(*, seeds, size) -> Iterator[row]`, `KEY`, the fields that name a row, and `table(rows) ->
str`, Markdown. Where `collect` also takes `done`, keys of rows to leave out, it saves their cost when rows are resumed. It may
have `plot(rows)`, a figure; and what a comparison goes by: `REPEATS`, the fields of KEY that number repetitions, where they are
not `seed` alone; `TIMED`, fields that follow the machine; and `measures(row)`, where a row's numbers are not what it measured.
"""

import hashlib
import inspect
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from ev3_distill.benchmarks import (
    compare,
    coverage,
    evolution,
    folder,
    growth,
    guards,
    hypergrad,
    int8,
    memory,
    noise,
    page,
    portfolio,
    protonet,
    pytorch,
    quality,
    rescue,
    rotation,
    safety,
    search,
    speed,
    sweeps,
    throughput,
    tuning,
)
from ev3_distill.errors import InputError
from ev3_distill.runtime import distributed
from ev3_distill.runtime.files import written_whole
from ev3_distill.runtime.ledger import Ledger

__all__ = ["SIZES", "SUITES", "changes", "provenance", "render", "run"]

SUITES: dict[str, ModuleType] = {
    "coverage": coverage,
    "evolution": evolution,
    "growth": growth,
    "guards": guards,
    "hypergrad": hypergrad,
    "int8": int8,
    "memory": memory,
    "noise": noise,
    "portfolio": portfolio,
    "protonet": protonet,
    "pytorch": pytorch,
    "quality": quality,
    "rescue": rescue,
    "rotation": rotation,
    "safety": safety,
    "search": search,
    "speed": speed,
    "sweeps": sweeps,
    "throughput": throughput,
    "tuning": tuning,
}
SIZES = ("full", "smoke")

_PACKAGES = ("jax", "flax", "optax", "numpy")
_SAME = ("suite", "size", "machine", "versions", "code")  # of rows that may share a table


def run(suite: str, *, seeds: int, size: str, out: Path | None = None) -> None:
    """Collects a suite's rows and prints their table; where processes share the work, process 0 alone writes and prints.

    Args:
      suite: a name of SUITES.
      seeds: repetitions, with the seeds from 0.
      size: full, or smoke, which proves nothing.
      out: directory for `rows.jsonl` (what the rows stand on, then each row as it comes), `table.md`, `report.html`, and
        `plot.svg` of a suite that draws one. Rows that are there already are kept, not measured again.

    Raises:
      InputError: no such suite or size, no seed, or rows in `out` that stand on something else.
    """
    if suite not in SUITES:
        raise InputError(f"a suite is one of {', '.join(SUITES)}; got '{suite}': name one of these")
    if size not in SIZES:
        raise InputError(f"a size is one of {', '.join(SIZES)}; got '{size}': name one of these")
    if seeds < 1:
        raise InputError(f"seeds counts repetitions, at least 1; got {seeds}: try 10")
    basis = provenance(suite, seeds=seeds, size=size)
    old = _at_hand(out, basis)
    rows, writes = [*old], distributed.first()
    for row in _shown(suite, _collect(SUITES[suite], old, seeds=seeds, size=size), len(old)):
        rows.append(row)
        if out is not None and writes:
            Ledger(out / "rows.jsonl").append([row])
    if not writes:
        return
    results = folder.Results(SUITES[suite], basis, rows)
    print(folder.told(results) if out is None else folder.write(out, results), end="")


def render(directories: Sequence[Path]) -> None:
    """Writes anew what follows from the rows of folders, without measuring, and prints their tables.

    Raises:
      InputError: a folder without sound rows.
    """
    found = [(directory, folder.read(directory, SUITES)) for directory in directories]
    for directory, results in found:
        with folder.understood(directory):
            print(folder.write(directory, results))


def changes(before: Path, after: Path, *, out: Path | None = None) -> None:
    """Prints what changed beyond noise between two folders of one suite.

    Args:
      before: a folder that `run` wrote.
      after: another.
      out: an HTML page to write.

    Raises:
      InputError: a folder without sound rows, or of another suite or size; or a page that cannot be written.
    """
    sides = folder.read(before, SUITES), folder.read(after, SUITES)
    with folder.understood(before, after):
        told = compare.table(*sides, (str(before), str(after)))
    print(told)
    if out is not None:
        command = shlex.join(["ev3-distill", "bench", "--compare", str(before), str(after)])
        try:
            with written_whole(out) as file:
                file.write(page.of_comparison(sides[0].basis["suite"], told, command).encode())
        except OSError as error:
            raise InputError(
                f"--out is a file to write the page to; got {out} ({error.strerror}): name another"
            ) from None


def provenance(suite: str, *, seeds: int, size: str) -> dict[str, Any]:
    """What rows stand on: the command, the machine (not its name), versions, and a hash of the code."""
    command = f"ev3-distill bench {suite} --seeds {seeds}" + (f" --size {size}" if size != "full" else "")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}
    return {
        "suite": suite,
        "size": size,
        "seeds": seeds,
        "command": command,
        "machine": _machine(),
        "versions": versions,
        "code": _code(),
    }


def _machine() -> dict[str, Any]:
    import jax

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = jax.devices()[0]
    accelerator = None if device.platform == "cpu" else device.device_kind
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "accelerator": accelerator}


def _code() -> str:
    """A hash of every module that a figure may depend on."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for package in ("benchmarks", "ev3_distill", "students", "teachers"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _at_hand(out: Path | None, basis: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that `out` holds where process 0 runs: all processes must leave out the same ones, or stop together."""
    if out is None:
        return []
    rows: list[dict[str, Any]] = json.loads(distributed.from_first(lambda: json.dumps(_reopen(out, basis)).encode()))
    return rows


def _reopen(out: Path, basis: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that `out` holds, after its file was given the new basis. A torn last row is cut."""
    path = out / "rows.jsonl"
    lines = [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []
    rows = []
    if lines:
        found = json.loads(lines[0])
        differs = [name for name in _SAME if found.get(name) != basis[name]]
        if differs or found["seeds"] > basis["seeds"]:
            raise InputError(
                f"rows of one table must share {', '.join(_SAME)} and not count fewer seeds; {path} has other "
                f"{', '.join(differs or ['seeds'])}: choose another --out, or delete that file to measure anew"
            )
        rows = [json.loads(line) for line in lines[1:]]
    out.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join([json.dumps(basis).encode() + b"\n", *lines[1:]]))
    os.replace(temporary, path)
    return rows


def _collect(module: ModuleType, old: list[dict[str, Any]], *, seeds: int, size: str) -> Iterator[dict[str, Any]]:
    done = {tuple(row[field] for field in module.KEY) for row in old}
    resumes = {"done": done} if "done" in inspect.signature(module.collect).parameters else {}
    for row in module.collect(seeds=seeds, size=size, **resumes):
        if tuple(row[field] for field in module.KEY) not in done:
            yield row


def _shown(suite: str, rows: Iterator[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """The rows, with progress on stderr: a bar on a terminal, a line per row elsewhere."""
    key, title = SUITES[suite].KEY, f"bench {suite}"
    if not sys.stderr.isatty():
        print(f"{title}: {count} rows at hand" if count else f"{title}: compiling", file=sys.stderr, flush=True)
        for row in rows:
            count += 1
            print(f"{title}: row {count}, {_named(row, key)}", file=sys.stderr, flush=True)
            yield row
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{title}: compiling", total=None)
        for row in rows:
            count += 1
            bar.update(task, description=f"{title}: row {count}, {_named(row, key)}")
            yield row


def _named(row: dict[str, Any], key: tuple[str, ...]) -> str:
    return ", ".join(f"{field} {row[field]}" for field in key)
