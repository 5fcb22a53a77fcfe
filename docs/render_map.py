"""Draws the map of rooms from tests/arrows.toml: a picture and a table for the page on the architecture.

`python docs/render_map.py` writes both, `--check` fails where they are out of date. Standard library only.
"""

import html
import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ARROWS = DOCS.parent / "tests" / "arrows.toml"
TABLE, PICTURE = DOCS / "explanation" / "architecture-map.md", DOCS / "explanation" / "architecture-map.svg"
WIDTH, HEIGHT, GAP_X, GAP_Y = 104, 34, 18, 46  # of a box, and between boxes, in pixels


def floors(imports: dict[str, list[str]]) -> dict[str, int]:
    """The floor of each room: one above the highest room that it imports."""
    levels: dict[str, int] = {}
    for room, lower in imports.items():  # from the lowest room to the highest
        levels[room] = max((levels[other] + 1 for other in lower), default=0)
    return levels


def direct(imports: dict[str, list[str]]) -> list[tuple[str, str]]:
    """The arrows that no chain of other arrows implies (the transitive reduction)."""

    def reaches(start: str, goal: str) -> bool:
        return start == goal or any(reaches(other, goal) for other in imports[start])

    return [
        (room, other)
        for room, lower in imports.items()
        for other in lower
        if not any(reaches(between, other) for between in lower if between != other)
    ]


def picture(imports: dict[str, list[str]]) -> str:
    """An SVG image: floors from bottom to top, with the direct arrows."""
    levels = floors(imports)
    rows = [[room for room in imports if levels[room] == level] for level in range(max(levels.values()) + 1)]
    widest = max(map(len, rows))
    total_x, total_y = widest * (WIDTH + GAP_X) + GAP_X, len(rows) * (HEIGHT + GAP_Y) + GAP_Y
    place = {
        room: (
            (total_x - len(row) * (WIDTH + GAP_X) + GAP_X) / 2 + i * (WIDTH + GAP_X),
            total_y - (level + 1) * (HEIGHT + GAP_Y),
        )
        for level, row in enumerate(rows)
        for i, room in enumerate(row)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_x} {total_y}" font-family="sans-serif" font-size="13">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>',
        f'<rect width="{total_x}" height="{total_y}" fill="#fff"/>',
    ]
    for room, other in direct(imports):
        (x1, y1), (x2, y2) = place[room], place[other]
        points = f'x1="{x1 + WIDTH / 2:.0f}" y1="{y1 + HEIGHT:.0f}" x2="{x2 + WIDTH / 2:.0f}" y2="{y2:.0f}"'
        lines.append(f'<line {points} stroke="#777" marker-end="url(#tip)"/>')
    for room, (x, y) in place.items():
        lines.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="#e8eefc" stroke="#345"/>'
        )
        middle = f'x="{x + WIDTH / 2:.0f}" y="{y + HEIGHT / 2 + 5:.0f}" text-anchor="middle"'
        lines.append(f"<text {middle}>{html.escape(room)}</text>")
    return "\n".join([*lines, "</svg>", ""])


def table(content: dict[str, list[dict[str, str]]], imports: dict[str, list[str]]) -> str:
    """Markdown: each room with what it holds and imports, the picture, and the exceptions to the limits on size."""
    lines = [
        "<!-- Written by docs/render_map.py from tests/arrows.toml. Do not edit. -->",
        "",
        "![Rooms, the lowest at the bottom. An arrow: the upper room imports the lower one.](architecture-map.svg)",
        "",
        "The picture leaves out an arrow that other arrows imply. The table lists all of them.",
        "",
        "| room | what it holds | imports |",
        "| --- | --- | --- |",
        *(
            f"| `{row['name']}` | {row['holds']} | {', '.join(imports[row['name']]) or 'nothing of ours'} |"
            for row in content["room"]
        ),
        "",
    ]
    if content.get("exception"):
        lines += [
            "A module has at most 400 lines, a function at most 60 lines and 8 parameters. The exceptions:",
            "",
            "| place | reason |",
            "| --- | --- |",
            *(f"| `{row['place']}` | {row['reason']} |" for row in content["exception"]),
            "",
        ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Writes the table and the picture, or checks them."""
    content = tomllib.loads(ARROWS.read_text())
    imports = {row["name"]: list(row["imports"]) for row in content["room"]}
    for path, text in ((TABLE, table(content, imports)), (PICTURE, picture(imports))):
        if "--check" not in arguments:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"the map must match tests/arrows.toml; {path.name} does not: run python docs/render_map.py")


if __name__ == "__main__":
    main(sys.argv[1:])
