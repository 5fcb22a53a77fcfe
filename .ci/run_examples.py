"""Runs the examples of the documentation: every sh, python and yaml block of README.md, the tutorials, the how-to
pages, the index of the benchmarks and the page for contributors.

Usage: python .ci/run_examples.py DIRECTORY [PAGE ...]

Each page runs in a fresh copy of the repository, its blocks in order, and the first failure ends the script. Of a yaml block,
which shows a workflow, the `- run:` steps are executed. Two HTML comments on a line of their own change this:

    <!-- examples: after PAGE -->        run this page in the directory that PAGE used, after it
    <!-- examples: skip REASON -->       do not run the next block

Standard library only.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CLOSING = re.compile(r"\b\d+ passed\b.* in ")  # pytest's closing line
LEAST_BLOCKS = 5  # in README.md; fewer means that the fences changed and the pattern below misses them
_PARTS = re.compile(
    r"^<!-- examples: (?P<kind>after|skip) (?P<text>.*?) -->$|^```(?P<language>sh|python|yaml)\n(?P<block>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """One example."""

    language: str
    text: str
    skip: str  # the reason not to run it, or ""


class Page(NamedTuple):
    """The examples of a page, and the page whose directory they share."""

    name: str
    after: str
    blocks: list[Block]


def read_page(name: str) -> Page:
    """Reads a page's examples.

    Args:
      name: path of the page, relative to the repository.
    """
    after, skip, blocks = "", "", []
    for match in _PARTS.finditer((ROOT / name).read_text()):
        if match["kind"] == "after":
            after = match["text"]
        elif match["kind"] == "skip":
            skip = match["text"]
        else:
            blocks.append(Block(match["language"], match["block"], skip))
            skip = ""
    return Page(name, after, blocks)


def all_pages() -> list[str]:
    """README.md first, since it installs the package; then tutorials, how-to pages, and the pages that are named here."""
    folders = [ROOT / "docs" / "tutorials", ROOT / "docs" / "how-to"]
    pages = [path.relative_to(ROOT).as_posix() for folder in folders for path in sorted(folder.glob("*.md"))]
    more = [name for name in ("docs/benchmarks/index.md", "docs/contributing.md") if (ROOT / name).exists()]
    return ["README.md", *pages, *more]


def in_order(names: list[str]) -> Iterator[Page]:
    """Pages with examples, each after the page that it continues."""
    done: set[str] = set()

    def visit(name: str) -> Iterator[Page]:
        if name in done:
            return
        done.add(name)
        page = read_page(name)
        if page.after:
            yield from visit(page.after)
        if page.blocks:
            yield page

    for name in names:
        yield from visit(name)


def copy_repository(directory: Path) -> None:
    """Copies what git tracks; symbolic links stay links."""
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if name and ((ROOT / name).is_file() or (ROOT / name).is_symlink()):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name, follow_symlinks=False)


def run_block(page: str, block: Block, directory: Path, closing_lines: list[str]) -> None:
    """Runs one example and appends pytest's closing line, if there is one; ends the script if the example fails."""
    text = block.text
    if block.language == "yaml":
        text = "\n".join(re.findall(r"^ *- run: (.*)$", text, re.MULTILINE))
    if block.skip:
        print(f"--- {page} ({block.language}), not run: {block.skip}\n", flush=True)
        return
    print(f"--- {page} ({block.language})\n{text.rstrip()}\n---", flush=True)
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    environment = {"EV3_DISTILL_DATA": str(ROOT.parent / "shared" / "data"), **os.environ}
    start = time.monotonic()
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if CLOSING.search(line):
                closing_lines.append(line.strip("= \n"))
    if process.returncode:
        sys.exit(f"{page}: this {block.language} block must succeed; got exit code {process.returncode}: see above")
    print(f"--- {time.monotonic() - start:.0f} s\n", flush=True)


def main(directory: Path, names: list[str]) -> None:
    """Runs the examples of these pages, or of all."""
    directories: dict[str, Path] = {}
    closing_lines: list[str] = []
    pages = list(in_order(names or all_pages()))
    if any(page.name == "README.md" and len(page.blocks) < LEAST_BLOCKS for page in pages):
        sys.exit(f"README.md must show at least {LEAST_BLOCKS} blocks; got fewer: its fences have changed")
    start = time.monotonic()
    for page in pages:
        if page.after in directories:
            place = directories[page.after]
        else:
            place = directory / page.name.removesuffix(".md").replace("/", "-")
            copy_repository(place)
        directories[page.name] = place
        for block in page.blocks:
            run_block(page.name, block, place, closing_lines)
    blocks = sum(len(page.blocks) for page in pages)
    print(f"{blocks} examples of {len(pages)} pages: {time.monotonic() - start:.0f} s", flush=True)
    print(*(f"pytest: {line}" for line in closing_lines), sep="\n", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
