"""Renders a suite's Markdown as one self-contained HTML page: its results, or a comparison of two of them.

The supported Markdown: `## ` headings, paragraphs, lists with `- `, tables, `code` and **bold**. Everything else is plain text
and escaped, so that no text in a row can become a tag, a link or an image.
"""

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ev3_distill.benchmarks.provenance import machine_text, seeds_text, versions_text
from ev3_distill.monitor import charts, html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Spans = list[tuple[str, str]]  # (tag or "", text)

_SPAN = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*")
_RULE = re.compile(r"\|( *:?-+:? *\|)+")


class Block(NamedTuple):
    """A heading or paragraph with one text, a list with several, or a table with rows, the first of which is its header."""

    kind: Literal["heading", "paragraph", "list", "table"]
    texts: list[Spans]
    rows: list[list[Spans]]
    right: list[bool]  # per column of a table: right-aligned, for numbers


def blocks(markdown: str) -> list[Block]:
    """Splits Markdown into blocks."""
    return [_block(part.split("\n")) for part in re.split(r"\n\s*\n", markdown.strip("\n")) if part.strip()]


def spans(text: str) -> Spans:
    """Splits a text into plain, `code` and **bold** parts."""
    parts, at = [], 0
    for match in _SPAN.finditer(text):
        parts += [("", text[at : match.start()]), ("code", match[1]) if match[1] else ("strong", match[2])]
        at = match.end()
    return [(tag, part) for tag, part in [*parts, ("", text[at:])] if part]


def _block(lines: list[str]) -> Block:
    if len(lines) > 1 and lines[0].startswith("|") and _RULE.fullmatch(lines[1].strip()):
        right = [cell.endswith(":") for cell in _cells(lines[1])]
        rows = [[spans(cell) for cell in _cells(line)] for line in (lines[0], *lines[2:])]
        return Block("table", [], [(row + [[]] * len(right))[: len(right)] for row in rows], right)
    if lines[0].startswith("- "):
        items = re.split(r"\n- ", "\n".join(lines)[2:])
        return Block("list", [spans(" ".join(item.split())) for item in items], [], [])
    text = " ".join(" ".join(lines).split())
    return (
        Block("heading", [spans(text[3:])], [], [])
        if text.startswith("## ")
        else Block("paragraph", [spans(text)], [], [])
    )


def _cells(line: str) -> list[str]:
    """The cells of a table's line; an escaped `\\|` is part of a cell."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def of_results(about: str, table: str, figure: "Figure | None", header: dict[str, Any], count: int) -> str:
    """The page of a suite's results.

    Args:
      about: the suite's docstring: the question, then the method.
      table: the suite's table, Markdown.
      figure: the suite's figure, if it draws one.
      header: provenance: command, machine, versions and a hash of the code.
      count: number of rows.
    """
    question, *method = blocks(about)
    facts = {
        "Command": header["command"],
        "Seeds": seeds_text(header),
        "Size": header["size"] + (" (a quick check; its figures mean nothing)" if header["size"] == "smoke" else ""),
        "Rows": f"{count:,}",
        "Machine": machine_text(header),
        "Versions": versions_text(header),
        "Code": header["code"],
    }
    return _render(
        title=f"bench {header['suite']}",
        lead=question,
        content=blocks(table),
        method=method,
        plot="" if figure is None else _inline(figure, f"{header['suite']}: plot of the rows above"),
        facts=facts,
        command=f"{header['command']} --out {header['suite']}",
    )


def of_comparison(suite: str, comparison: str, command: str) -> str:
    """The page of a comparison; `comparison` is Markdown whose first paragraph is the answer."""
    lead, *content = blocks(comparison)
    return _render(
        title=f"bench {suite}, compared",
        lead=lead,
        content=content,
        method=[],
        plot="",
        facts={},
        command=command,
    )


def _render(*, plot: str, **content: Any) -> str:
    width = re.search(r'viewBox="0 0 ([\d.]+)', plot)  # points; at this width the plot's text is as large as the page's
    content |= {"plot": plot, "points": round(float(width[1])) if width else 0}
    return html.environment("ev3_distill.benchmarks").get_template("page.html.j2").render(**content)


def _inline(figure: "Figure", title: str) -> str:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        return charts.inline(figure, title)
