"""Charts of the report, as SVG elements for the page.

Charts contain no text from the user. Names are in the page, where they are escaped and set in the reader's fonts.
"""

import html
import io
import math
import re
from typing import TYPE_CHECKING, Any

from ev3_distill.runtime.ledger import promise_scores
from ev3_distill.runtime.race import proposed_scores, race_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def history(report: dict[str, Any], rows: list[dict[str, Any]], size: tuple[float, float]) -> str:
    """Scores over cost: current student on assess, champion on decide, and the verdicts."""

    def draw(axes: "Axes") -> None:
        cost = [row["cost"] for row in rows]
        champion, current = (_floats(scores) for scores in zip(*map(promise_scores, rows), strict=True))
        if report["teacher"]["accuracy"] is not None:
            axes.axhline(report["teacher"]["accuracy"], color="#777", lw=1.1, ls=(0, (4, 3)), label="teacher, on test")
        dot = "o" if len(rows) == 1 else ""  # a line through one point is invisible
        _mark_final_phase(axes, rows)
        axes.plot(cost, current, marker=dot, color="#8fb4d6", lw=1.2, label="current, on assess")
        axes.plot(cost, champion, marker=dot, color="#1d3f66", lw=1.8, ds="steps-post", label="champion, on decide")
        for verdict, label, values, style in (
            ("adopt", "adopted", current, {"marker": "o", "ms": 2.6, "mew": 0, "color": "#8fb4d6"}),
            ("promote", "promoted", champion, {"marker": "^", "ms": 7, "mec": "#fff", "color": "#1d3f66"}),
            ("roll back", "rolled back", current, {"marker": "x", "ms": 6, "mew": 1.8, "color": "#c0392b"}),
        ):
            marked = [(x, y) for x, y, row in zip(cost, values, rows, strict=True) if row["verdict"] == verdict]
            if marked:
                axes.plot(*zip(*marked, strict=True), ls="none", label=label, zorder=3, **style)  # type: ignore[arg-type]
        shown = [y for y in (*current, champion[-1]) if not math.isnan(y)] or [0.0]
        low, high = min(shown), max(shown)
        axes.set_ylim(bottom=low - 0.03 * (high - low) - 1e-3)  # leaves out an untrained champion, far below
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")
        columns = 6 if size[0] > 6 else 2
        axes.figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=1.6, columnspacing=1.4)

    metric = "agreement" if report["student"]["accuracy"] is None else "accuracy"
    return _svg(f"{metric.capitalize()} over cost", size, draw) if rows else ""


def _mark_final_phase(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    """Shades the part of a run that trains on assess, too."""
    first = next((i for i, row in enumerate(rows) if row.get("final")), None)
    if first is not None:
        axes.axvspan(rows[max(first - 1, 0)]["cost"], rows[-1]["cost"], color="#f0ece2", lw=0, label="final phase")


def race(arms: list[dict[str, Any]], rows: list[dict[str, Any]], size: tuple[float, float]) -> str:
    """Score on assess of each arm in the race over its own steps, and where arms left; empty if there was no race."""
    raced = race_rows(rows)

    def draw(axes: "Axes") -> None:
        cross: Any = {"ls": "none", "marker": "x", "ms": 6, "mew": 1.8}
        left = {name for row in raced for name in row["left"]}
        for arm in arms:
            points = _points_of(arm["name"], raced)
            if points:
                axes.plot(*zip(*points, strict=True), color=arm["color"], lw=1.6, marker="o", ms=2.6, mew=0)
                axes.plot(*points[-1], color=arm["color"], **(cross if arm["name"] in left else {}))
        if left:
            axes.plot([], [], color="#444", label="left the race", **cross)
            axes.figure.legend(loc="outside upper left", frameon=False, handlelength=1.2)
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")

    return _svg("The race: score on assess", size, draw, xlabel="steps of each arm") if raced else ""


def _points_of(name: str, raced: list[Any]) -> list[tuple[int, float]]:
    """(steps of an arm so far, score of its proposal) in each iteration of the race in which it trained."""
    steps, points = 0, []
    for row in raced:
        steps += row["steps"].get(name, 0)
        score = proposed_scores(row).get(name)
        points += [] if score is None else [(steps, score)]
    return points


def spending(arms: list[dict[str, Any]], rows: list[dict[str, Any]], size: tuple[float, float]) -> str:
    """Cumulative steps of each arm over cost."""

    def draw(axes: "Axes") -> None:
        cost = [0.0, *(row["cost"] for row in rows)]
        for arm in arms:
            spent = [0.0]
            for row in rows:
                spent.append(spent[-1] + row["steps"].get(arm["name"], 0))  # a row may leave out an idle arm
            axes.plot(cost, spent, color=arm["color"], lw=1.8)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")

    return _svg("Steps of each arm over cost", size, draw) if rows and len(arms) > 1 else ""


def sizes(report: dict[str, Any], size: tuple[float, float]) -> str:
    """Accuracy on decide against parameters for every student of a search, with the Pareto front of their lower bounds."""
    entries = report["search"]["sizes"]
    best = sorted((entry for entry in entries if entry["on_front"]), key=lambda entry: entry["params"])

    def draw(axes: "Axes") -> None:
        for entry in entries:
            x, y = entry["params"], entry["accuracy"]
            color = "#1d3f66" if entry["on_front"] else "#b9c3cd"
            axes.plot([x, x], [entry["bound"], y], color=color, lw=1.2)
            delivered = entry["number"] == report["search"]["delivered"]
            axes.plot([x], [y], marker="D" if delivered else "o", ms=7 if delivered else 4.5, mew=0, color=color)
        axes.step(
            [entry["params"] for entry in best],
            [entry["bound"] for entry in best],
            where="post",
            color="#8fb4d6",
            lw=1.4,
        )
        axes.set_xscale("log")
        params = next(one["params"] for one in entries if one["number"] == report["search"]["delivered"])
        axes.set_xticks(sorted({params, *(pick(one["params"] for one in entries) for pick in (min, max))}))
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")

    return _svg("Accuracy against parameters", size, draw, xlabel="parameters") if entries else ""


def _floats(values: Any) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _svg(title: str, size: tuple[float, float], draw: Any, *, xlabel: str = "cost, steps of all arms") -> str:
    """An <svg> element that scales with the page, uses the page's font, and has unique ids."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{title} {size}",
        "text.usetex": False,
        "font.family": "DejaVu Sans",  # for measuring; part of matplotlib, and wider than the fonts of the page
        "font.size": 9,
        "axes.edgecolor": "#999",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.7,
        "xtick.color": "#555",
        "ytick.color": "#555",
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(xlabel, color="#555")
        if axes.get_xscale() == "linear":
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5 if size[0] < 6 else 8, integer=True))
        else:
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        return inline(figure, title)


def inline(figure: "Figure", title: str) -> str:
    """A figure as an <svg> element that scales with the page, with its title as the accessible name."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    root, body = text[text.index("<svg") :].split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', root)
    assert view_box is not None
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    return f'<svg role="img" aria-label="{html.escape(title)}" {view_box[0]}>{body}'
