"""Renders result folders again without measuring, and compares two of them."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ev3_distill.benchmarks import comparison, html_page, results_folder
from ev3_distill.benchmarks.registry import SUITES
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import atomic_write


def render_results(directories: Sequence[Path]) -> None:
    """Writes table, plot and page of result folders again from their rows, and prints the tables.

    Raises:
      InputError: a folder without valid rows.
    """
    folders = [(directory, results_folder.read(directory, SUITES)) for directory in directories]
    for directory, results in folders:
        with results_folder.row_errors(directory):
            print(results_folder.write(directory, results))


def compare_results(before: Path, after: Path, *, out: Path | None = None) -> None:
    """Prints what changed beyond noise between two result folders of one suite.

    Args:
      before: a folder that `run_suite` wrote.
      after: another.
      out: an HTML page to write.

    Raises:
      InputError: a folder without valid rows, folders of different suites or sizes, or a page that cannot be written.
    """
    sides = results_folder.read(before, SUITES), results_folder.read(after, SUITES)
    with results_folder.row_errors(before, after):
        text = comparison.table(*sides, (str(before), str(after)))
    print(text)
    if out is not None:
        command = shlex.join(["ev3-distill", "bench", "--compare", str(before), str(after)])
        try:
            with atomic_write(out) as file:
                file.write(html_page.of_comparison(sides[0].header["suite"], text, command).encode())
        except OSError as error:
            raise InputError(
                f"--out is a file to write the page to; got {out} ({error.strerror}): name another"
            ) from None
