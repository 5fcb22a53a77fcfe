"""Result folders: `rows.jsonl` (a header with the provenance, then one row a line) and what is rendered from it.

`table.md`, `report.html` and, for a suite that draws one, `plot.svg` depend on the rows alone.
"""

import collections
import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ev3_distill.benchmarks import html_page
from ev3_distill.benchmarks.provenance import machine_text, seeds_text, versions_text
from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import atomic_write

ROWS = "rows.jsonl"
_HEADER = {"suite": str, "size": str, "seeds": int, "command": str, "machine": dict, "versions": dict, "code": str}
_MACHINE = {"cpu", "cores", "accelerator"}


class Results(NamedTuple):
    """The contents of a result folder."""

    suite: ModuleType
    header: dict[str, Any]  # provenance: command, machine, versions, a hash of the code
    rows: list[dict[str, Any]]


def read(directory: Path, suites: Mapping[str, ModuleType]) -> Results:
    """Reads a folder's rows and their header.

    Raises:
      InputError: no such folder, no rows in it, a suite that is not in `suites`, or a damaged line.
    """
    path = directory / ROWS
    if not directory.is_dir():
        raise InputError(f"results are a folder written by bench --out; {directory} is not a folder: name another")
    if not path.is_file():
        raise InputError(f"a result folder holds {ROWS}; {directory} has none: measure with bench SUITE --out")
    lines = path.read_bytes().splitlines(keepends=True)
    header = _header(lines[0] if lines else b"", path)
    if header["suite"] not in suites:
        raise InputError(
            f"a suite is one of {', '.join(suites)}; got '{header['suite']}' in {path}: name other results"
        )
    if len(lines) < 2:
        raise InputError(f"results have at least one row; {path} has none: run {header['command']} --out {directory}")
    suite = suites[header["suite"]]
    rows = [_row(line, number, suite, path) for number, line in enumerate(lines[1:], 2)]
    seen: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, 2):
        key = tuple(row[field] for field in suite.KEY)
        if key in seen:
            raise InputError(
                f"{', '.join(suite.KEY)} identify one row; lines {seen[key]} and {number} of {path} have the same: delete one"
            )
        seen[key] = number
    return Results(suite, header, rows)


def _header(line: bytes, path: Path) -> dict[str, Any]:
    header = _parsed(line)
    valid = header is not None and all(isinstance(header.get(name), kind) for name, kind in _HEADER.items())
    if header is None or not valid or not set(header["machine"]) >= _MACHINE or header["seeds"] < 1:
        raise InputError(
            f"the first line of {ROWS} has {', '.join(_HEADER)}; line 1 of {path} is {_excerpt(line)}: restore it, or "
            "measure again"
        )
    return header


def _row(line: bytes, number: int, suite: ModuleType, path: Path) -> dict[str, Any]:
    row = _parsed(line)
    if row is None or not all(isinstance(row.get(field), str | int | float) for field in suite.KEY):
        raise InputError(
            f"a row is a line of JSON with {', '.join(suite.KEY)}; line {number} of {path} is {_excerpt(line)}: delete it, "
            "and measure that row again with the command in line 1"
        )
    return row


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a complete line; None if the line is torn or holds anything else."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # UnicodeDecodeError too
        return None
    return value if isinstance(value, dict) else None


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace").rstrip("\n")
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


@contextlib.contextmanager
def row_errors(*directories: Path) -> Iterator[None]:
    """Turns a missing or malformed field in the rows of result folders into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"rows have every field that their suite shows; a row in {' or '.join(str(path / ROWS) for path in directories)} "
            f"lacks one ({summary(error)}): restore the file, or measure again"
        ) from error


def table_text(results: Results) -> str:
    """The suite's table as Markdown, and one line of provenance."""
    return _with_provenance(results.suite.table(results.rows), results)


def write(directory: Path, results: Results) -> str:
    """Writes `table.md`, `report.html` and, if the suite draws one, `plot.svg`; returns the text of the first."""
    suite, rows = results.suite, results.rows
    table = suite.table(rows)
    (directory / "table.md").write_text(_with_provenance(table, results))
    if hasattr(suite, "plot"):
        _draw(suite.plot(rows), directory / "plot.svg")
    with atomic_write(directory / "report.html") as file:
        file.write(html(results, table).encode())
    return _with_provenance(table, results)


def other_code_text(results: Results) -> str:
    """How many rows other code than the header's measured, in words; empty if none."""
    codes = collections.Counter(row["code"] for row in results.rows if "code" in row)
    counts = ", ".join(f"{count} by code {code}" for code, count in codes.items())
    return f"of {len(results.rows)} rows, earlier code measured {counts}" if counts else ""


def html(results: Results, table: str) -> str:
    """The HTML page of results with a rendered table."""
    suite, header, rows = results
    # A figure that was saved before has other ids and layout, so it is drawn again.
    figure = suite.plot(rows) if hasattr(suite, "plot") else None
    return html_page.of_results(suite.__doc__ or "", table, figure, header, len(rows))


def _with_provenance(table: str, results: Results) -> str:
    header = results.header
    facts = [seeds_text(header), machine_text(header), versions_text(header), other_code_text(results)]
    return f"{table}\n\n`{header['command']}`, {'; '.join(filter(None, facts))}.\n"


def _draw(figure: Any, path: Path) -> None:
    """Saves a figure so that the same rows give the same bytes."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, format="svg", metadata={"Date": None})
