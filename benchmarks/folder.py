"""A folder of results: `rows.jsonl`, what the rows stand on and then each row, and what is drawn from it without measuring.

`table.md`, `plot.svg` of a suite that draws one, and `report.html` follow from the rows alone.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ev3_distill.benchmarks import page
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import written_whole

ROWS = "rows.jsonl"
_BASIS = {"suite": str, "size": str, "seeds": int, "command": str, "machine": dict, "versions": dict, "code": str}
_MACHINE = {"cpu", "cores", "accelerator"}


class Results(NamedTuple):
    """What a folder holds."""

    suite: ModuleType
    basis: dict[str, Any]  # the command, the machine, versions, a hash of the code
    rows: list[dict[str, Any]]


def read(directory: Path, suites: Mapping[str, ModuleType]) -> Results:
    """The rows of a folder, with what they stand on.

    Raises:
      InputError: no such folder, no rows in it, a suite that is none of `suites`, or a damaged line.
    """
    path = directory / ROWS
    if not directory.is_dir():
        raise InputError(f"results are a folder that bench --out wrote; {directory} is none: name another")
    if not path.is_file():
        raise InputError(f"results have their rows in {ROWS}; {directory} has none: measure by bench SUITE --out")
    lines = path.read_bytes().splitlines(keepends=True)
    basis = _basis(lines[0] if lines else b"", path)
    if basis["suite"] not in suites:
        raise InputError(f"a suite is one of {', '.join(suites)}; got '{basis['suite']}' in {path}: name other results")
    if len(lines) < 2:
        raise InputError(f"results have at least one row; {path} has none: run {basis['command']} --out {directory}")
    suite = suites[basis["suite"]]
    rows = [_row(line, number, suite, path) for number, line in enumerate(lines[1:], 2)]
    seen: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, 2):
        key = tuple(row[field] for field in suite.KEY)
        if key in seen:
            raise InputError(
                f"{', '.join(suite.KEY)} name one row; lines {seen[key]} and {number} of {path} have the same: cut one"
            )
        seen[key] = number
    return Results(suite, basis, rows)


def _basis(line: bytes, path: Path) -> dict[str, Any]:
    found = _parsed(line)
    sound = found is not None and all(isinstance(found.get(name), kind) for name, kind in _BASIS.items())
    if found is None or not sound or not set(found["machine"]) >= _MACHINE or found["seeds"] < 1:
        raise InputError(
            f"the first line of {ROWS} tells {', '.join(_BASIS)}; line 1 of {path} is {_shown(line)}: restore it, or "
            "measure anew"
        )
    return found


def _row(line: bytes, number: int, suite: ModuleType, path: Path) -> dict[str, Any]:
    row = _parsed(line)
    if row is None or not all(isinstance(row.get(field), str | int | float) for field in suite.KEY):
        raise InputError(
            f"a row is a line of JSON with {', '.join(suite.KEY)}; line {number} of {path} is {_shown(line)}: cut it off, "
            "and measure that row again by the command in line 1"
        )
    return row


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole line's object; none where it is torn or no such thing."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # UnicodeDecodeError too
        return None
    return found if isinstance(found, dict) else None


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").rstrip("\n")
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


@contextlib.contextmanager
def understood(*paths: Path) -> Iterator[None]:
    """Around what reads fields of rows that were not measured just now: one that is missing is the user's to mend."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"rows have all fields that their suite shows; {' or '.join(str(path / ROWS) for path in paths)} has one without "
            f"({type(error).__name__}: {error}): restore the file, or measure anew"
        ) from error


def told(results: Results) -> str:
    """The suite's table, Markdown, and in one line what it stands on."""
    return _with_basis(results.suite.table(results.rows), results.basis)


def write(directory: Path, results: Results) -> str:
    """Writes `table.md`, `plot.svg` of a suite that draws one, and `report.html`; returns the first."""
    suite, basis, rows = results
    table = suite.table(rows)
    (directory / "table.md").write_text(_with_basis(table, basis))
    if hasattr(suite, "plot"):
        _draw(suite.plot(rows), directory / "plot.svg")
    with written_whole(directory / "report.html") as file:
        file.write(html(results, table).encode())
    return _with_basis(table, basis)


def html(results: Results, table: str) -> str:
    """The page of results, whose table is at hand."""
    suite, basis, rows = results
    figure = (
        suite.plot(rows) if hasattr(suite, "plot") else None
    )  # one that was drawn before is laid out anew, with other ids
    return page.of_results(suite.__doc__ or "", table, figure, basis, len(rows))


def _with_basis(table: str, basis: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in basis["versions"].items())
    return f"{table}\n\n`{basis['command']}`, {page.seeds(basis)}; {page.machine(basis)}; {packages}.\n"


def _draw(figure: Any, path: Path) -> None:
    """Writes a figure that is the same for the same rows."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, format="svg", metadata={"Date": None})
