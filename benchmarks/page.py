"""Markdown of a suite as one HTML page that needs no network: of its results, or of what changed between two of them.

No Markdown but this is known: `## ` headings, paragraphs, lists by `- `, tables, `code` and **bold**. All else is text, and
escaped: nothing in a row can become a tag, a link or a picture.
"""

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ev3_distill.monitor import charts, html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Spans = list[tuple[str, str]]  # (tag or "", text)

_SPAN = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*")
_RULE = re.compile(r"\|( *:?-+:? *\|)+")


class Block(NamedTuple):
    """A heading or a paragraph of one text, a list of several; a table of rows, of which the first is its header."""

    kind: Literal["heading", "paragraph", "list", "table"]
    texts: list[Spans]
    rows: list[list[Spans]]
    right: list[bool]  # of a table's columns: whether they are numbers, and stand to the right


def blocks(markdown: str) -> list[Block]:
    """Markdown as blocks."""
    return [_block(part.split("\n")) for part in re.split(r"\n\s*\n", markdown.strip("\n")) if part.strip()]


def spans(text: str) -> Spans:
    """A text as plain, `code` and **bold** parts."""
    found, at = [], 0
    for match in _SPAN.finditer(text):
        found += [("", text[at : match.start()]), ("code", match[1]) if match[1] else ("strong", match[2])]
        at = match.end()
    return [(tag, part) for tag, part in [*found, ("", text[at:])] if part]


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
    """Of a table's line; `\\|` is no border."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def of_results(about: str, table: str, figure: "Figure | None", basis: dict[str, Any], count: int) -> str:
    """The page of a suite's results.

    Args:
      about: the suite's docstring: the question first, then how it is measured.
      table: what the suite tells, Markdown.
      figure: that the suite draws.
      basis: the command, the machine, versions and a hash of the code.
      count: of rows.
    """
    question, *method = blocks(about)
    facts = {
        "Command": basis["command"],
        "Seeds": seeds(basis),
        "Size": basis["size"] + (", which proves nothing" if basis["size"] == "smoke" else ""),
        "Rows": f"{count:,}",
        "Machine": machine(basis),
        "Versions": ", ".join(f"{name} {version}" for name, version in basis["versions"].items()),
        "Code": basis["code"],
    }
    return _render(
        title=f"bench {basis['suite']}",
        lead=question,
        content=blocks(table),
        method=method,
        plot="" if figure is None else _inline(figure, f"{basis['suite']}: the rows of the table above, drawn"),
        facts=facts,
        command=f"{basis['command']} --out {basis['suite']}",
    )


def of_comparison(suite: str, comparison: str, command: str) -> str:
    """The page of what changed between two results of a suite; `comparison` is Markdown, its first paragraph the answer."""
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


def seeds(basis: dict[str, Any]) -> str:
    """Which seeds were asked for."""
    return "seed 0" if basis["seeds"] == 1 else f"seeds 0 to {basis['seeds'] - 1}"


def machine(basis: dict[str, Any]) -> str:
    """What a suite was measured on."""
    on = basis["machine"]
    return f"{on['cpu']}, {on['cores']} cores" + (f", {on['accelerator']}" if on["accelerator"] else "")


def _render(*, plot: str, **content: Any) -> str:
    wide = re.search(r'viewBox="0 0 ([\d.]+)', plot)  # in points, at which its text is as large as the page's
    content |= {"plot": plot, "points": round(float(wide[1])) if wide else 0}
    return html.environment("ev3_distill.benchmarks").get_template("page.html.j2").render(**content)


def _inline(figure: "Figure", title: str) -> str:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        return charts.inline(figure, title)
