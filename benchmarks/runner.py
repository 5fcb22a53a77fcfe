"""Runs a suite: collects its rows, resumes those that are there, and shows progress.

In a run of several processes, process 0 alone writes and prints.
"""

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ev3_distill.benchmarks import results_folder
from ev3_distill.benchmarks.provenance import provenance
from ev3_distill.benchmarks.registry import SIZES, SUITES
from ev3_distill.errors import InputError
from ev3_distill.runtime import distributed
from ev3_distill.runtime.files import atomic_write
from ev3_distill.runtime.ledger import Ledger
from ev3_distill.runtime.progress import Bar

_IDENTITY = ("suite", "size", "machine", "versions", "code")  # must agree among the rows of one table


def run_suite(
    suite: str, *, seeds: int, size: str, out: Path | None = None, only: Sequence[str] = (), keep_rows: bool = False
) -> None:
    """Collects a suite's rows and prints their table.

    Args:
      suite: a name in SUITES.
      seeds: number of repetitions, with seeds from 0.
      size: full, or smoke: a quick check whose figures mean nothing.
      out: directory for `rows.jsonl` (a header with the provenance, then one row a line), `table.md`, `report.html` and, for
        a suite that draws one, `plot.svg`. Rows that are already there are kept and not measured again.
      only: names of parts of a suite that can be measured in parts.
      keep_rows: whether rows in `out` that other code measured stay. They are marked, and the table says so.

    Raises:
      InputError: unknown suite, size or part, no seed, or rows in `out` of another provenance.
    """
    if suite not in SUITES:
        raise InputError(f"a suite is one of {', '.join(SUITES)}; got '{suite}': name one of these")
    if size not in SIZES:
        raise InputError(f"a size is one of {', '.join(SIZES)}; got '{size}': name one of these")
    if seeds < 1:
        raise InputError(f"seeds counts repetitions, at least 1; got {seeds}: try 10")
    if only and "only" not in inspect.signature(SUITES[suite].collect).parameters:
        raise InputError(f"--only is for suites with parts, such as robustness; got it for {suite}: omit it")
    header = provenance(suite, seeds=seeds, size=size)
    old = _existing_rows(out, header, keep=keep_rows)
    rows, writes = [*old], distributed.is_first_process()
    missing = _missing_rows(SUITES[suite], old, seeds=seeds, size=size, only=only)
    for row in _with_progress(suite, missing, len(old)):
        rows.append(row)
        if out is not None and writes:
            Ledger(out / "rows.jsonl").append([row])
    if not writes:
        return
    results = results_folder.Results(SUITES[suite], header, rows)
    print(results_folder.table_text(results) if out is None else results_folder.write(out, results), end="")


def _existing_rows(out: Path | None, header: dict[str, Any], *, keep: bool) -> list[dict[str, Any]]:
    """The rows that `out` holds on process 0, sent to all processes: they must skip the same rows, or stop together."""
    if out is None:
        return []
    rows: list[dict[str, Any]] = json.loads(
        distributed.read_on_first(lambda: json.dumps(_reopen(out, header, keep=keep)).encode())
    )
    return rows


def _reopen(out: Path, header: dict[str, Any], *, keep: bool) -> list[dict[str, Any]]:
    """Writes the new header into the file of rows, drops a torn last row, and returns the rows.

    With `keep`, rows that other code measured get its hash as a field `code`.
    """
    path = out / "rows.jsonl"
    lines = [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []
    rows = []
    if lines:
        old = json.loads(lines[0])
        differs = [name for name in _IDENTITY if old.get(name) != header[name] and not (keep and name == "code")]
        if differs or old["seeds"] > header["seeds"]:
            raise InputError(
                f"rows of one table must share {', '.join(_IDENTITY)} and not have fewer seeds; {path} has other "
                f"{', '.join(differs or ['seeds'])}: choose another --out, or delete that file to measure again"
                + (", or --keep-rows to mark these rows and continue" if differs == ["code"] else "")
            )
        rows = [json.loads(line) for line in lines[1:]]
        if old["code"] != header["code"]:
            rows = [{"code": old["code"], **row} for row in rows]
            lines[1:] = [json.dumps(row).encode() + b"\n" for row in rows]
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(b"".join([json.dumps(header).encode() + b"\n", *lines[1:]]))
    return rows


def _missing_rows(
    module: ModuleType, old: list[dict[str, Any]], *, seeds: int, size: str, only: Sequence[str]
) -> Iterator[dict[str, Any]]:
    done = {_key(module, row) for row in old}
    options: dict[str, Any] = {"done": done} if "done" in inspect.signature(module.collect).parameters else {}
    options |= {"only": only} if only else {}
    for row in module.collect(seeds=seeds, size=size, **options):
        if _key(module, row) not in done:
            yield row


def _key(module: ModuleType, row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[field] for field in module.KEY)


def _with_progress(suite: str, rows: Iterator[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """The rows, with progress on stderr: a spinner on a terminal, a line per row elsewhere."""
    key, title = SUITES[suite].KEY, f"bench {suite}"
    if not sys.stderr.isatty():
        print(f"{title}: {count} rows already there" if count else f"{title}: compiling", file=sys.stderr, flush=True)
        for row in rows:
            count += 1
            print(f"{title}: row {count}, {_key_text(row, key)}", file=sys.stderr, flush=True)
            yield row
        return
    with Bar(title, total=None) as bar:
        bar.update(note="compiling")
        for row in rows:
            count += 1
            bar.update(note=f"row {count}, {_key_text(row, key)}")
            yield row


def _key_text(row: dict[str, Any], key: tuple[str, ...]) -> str:
    return ", ".join(f"{field} {row[field]}" for field in key)
