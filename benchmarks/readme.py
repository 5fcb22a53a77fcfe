"""Puts measured tables into README.md, so that no figure in it is typed: `python -m ev3_distill.benchmarks.readme [--check]`.

Between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` stands the content of benchmarks/results/NAME/table.md.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ev3_distill.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
_MARKER = re.compile(r"^<!-- (/?)bench:(\S+) -->$", re.MULTILINE)


def render(text: str, results: Path) -> str:
    """The text with each marked part replaced by its table.

    Raises:
      InputError: a marker without its partner, or no table of that name.
    """
    markers = list(_MARKER.finditer(text))
    pairs = list(zip(markers[::2], markers[1::2], strict=False))
    if len(markers) % 2 or any(a[1] or not b[1] or a[2] != b[2] for a, b in pairs):
        raise InputError(
            "bench markers come in pairs, <!-- bench:NAME --> and <!-- /bench:NAME -->, one pair after the other; got "
            f"{', '.join(marker[0] for marker in markers)}: mend them"
        )
    for opening, closing in reversed(pairs):
        text = text[: opening.end()] + f"\n{_table(opening[2], results)}\n" + text[closing.start() :]
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Renders, or with `--check` only tells whether that would change anything: exit code 1 then, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m ev3_distill.benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the text is not up to date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    try:
        before = _read(options.readme)
        after = render(before, options.results)
    except InputError as error:
        print(f"ev3_distill.benchmarks.readme: error: {error}", file=sys.stderr)
        return 2
    if not options.check:
        options.readme.write_text(after)
        return 0
    if before != after:
        print(
            f"{options.readme} differs from {options.results}: run python -m ev3_distill.benchmarks.readme",
            file=sys.stderr,
        )
    return int(before != after)


def _table(name: str, results: Path) -> str:
    return _read(results / name / "table.md").strip()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InputError(f"{path} must be a readable file; got '{error.strerror}': measure it first") from None


if __name__ == "__main__":
    raise SystemExit(main())
