"""Charts of the report, as SVG elements to be set into the page.

No text of the user's is drawn: names stand in the page, where they are escaped and the reader's fonts know their letters.
"""

import html
import io
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def history(report: dict[str, Any], rows: list[dict[str, Any]], size: tuple[float, float]) -> str:
    """Accuracy over cost: current on assess, champion on decide, and the verdicts."""

    def draw(axes: "Axes") -> None:
        cost = [row["cost"] for row in rows]
        current = _floats(row["current_accuracy"] for row in rows)
        champion = _floats(row["champion_accuracy"] for row in rows)
        if report["teacher"]["accuracy"] is not None:
            axes.axhline(report["teacher"]["accuracy"], color="#777", lw=1.1, ls=(0, (4, 3)), label="teacher, on test")
        dot = "o" if len(rows) == 1 else ""  # a line of one point shows nothing
        axes.plot(cost, current, marker=dot, color="#8fb4d6", lw=1.2, label="current, on assess")
        axes.plot(cost, champion, marker=dot, color="#1d3f66", lw=1.8, ds="steps-post", label="champion, on decide")
        for verdict, label, values, style in (
            ("adopt", "adopted", current, {"marker": "o", "ms": 2.6, "mew": 0, "color": "#8fb4d6"}),
            ("promote", "promoted", champion, {"marker": "^", "ms": 7, "mec": "#fff", "color": "#1d3f66"}),
            ("roll back", "rolled back", current, {"marker": "x", "ms": 6, "mew": 1.8, "color": "#c0392b"}),
        ):
            made = [(x, y) for x, y, row in zip(cost, values, rows, strict=True) if row["verdict"] == verdict]
            if made:
                axes.plot(*zip(*made, strict=True), ls="none", label=label, zorder=3, **style)  # type: ignore[arg-type]
        shown = [y for y in (*current, champion[-1]) if not math.isnan(y)] or [0.0]
        low, high = min(shown), max(shown)
        axes.set_ylim(bottom=low - 0.03 * (high - low) - 1e-3)  # an untrained champion lies far below
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")
        columns = 6 if size[0] > 6 else 2
        axes.figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=1.6, columnspacing=1.4)

    metric = "agreement" if report["student"]["accuracy"] is None else "accuracy"
    return _svg(f"{metric.capitalize()} over cost", size, draw) if rows else ""


def spending(arms: list[dict[str, Any]], rows: list[dict[str, Any]], size: tuple[float, float]) -> str:
    """Cumulative steps of each arm over cost."""

    def draw(axes: "Axes") -> None:
        cost = [0.0, *(row["cost"] for row in rows)]
        for arm in arms:
            spent = [0.0]
            for row in rows:
                spent.append(spent[-1] + row["steps"].get(arm["name"], 0))  # a row may leave out an arm that rested
            axes.plot(cost, spent, color=arm["colour"], lw=1.8)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")

    return _svg("Steps of each arm over cost", size, draw) if rows and len(arms) > 1 else ""


def sizes(report: dict[str, Any], size: tuple[float, float]) -> str:
    """Accuracy on decide against parameters, of every student of a search; the Pareto front of their lower bounds."""
    entries = report["search"]["sizes"]
    best = sorted((entry for entry in entries if entry["on_front"]), key=lambda entry: entry["params"])

    def draw(axes: "Axes") -> None:
        for entry in entries:
            x, y = entry["params"], entry["accuracy"]
            colour = "#1d3f66" if entry["on_front"] else "#b9c3cd"
            axes.plot([x, x], [entry["bound"], y], color=colour, lw=1.2)
            chosen = entry["number"] == report["search"]["delivered"]
            axes.plot([x], [y], marker="D" if chosen else "o", ms=7 if chosen else 4.5, mew=0, color=colour)
        axes.step(
            [entry["params"] for entry in best],
            [entry["bound"] for entry in best],
            where="post",
            color="#8fb4d6",
            lw=1.4,
        )
        axes.set_xscale("log")
        delivered = next(one["params"] for one in entries if one["number"] == report["search"]["delivered"])
        axes.set_xticks(sorted({delivered, *(pick(one["params"] for one in entries) for pick in (min, max))}))
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")

    return _svg("Accuracy against parameters", size, draw, about="parameters") if entries else ""


def _floats(values: Any) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _svg(title: str, size: tuple[float, float], draw: Any, *, about: str = "cost, steps of all arms") -> str:
    """An <svg> element that scales with the page, draws text in the page's font, and shares no id with another."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{title} {size}",
        "text.usetex": False,
        "font.family": "DejaVu Sans",  # to measure with; comes with matplotlib and is wider than what the page uses
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
        axes.set_xlabel(about, color="#555")
        if axes.get_xscale() == "linear":
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5 if size[0] < 6 else 8, integer=True))
        else:
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        return inline(figure, title)


def inline(figure: "Figure", title: str) -> str:
    """A figure as an <svg> element that scales with the page and is called by its title."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    root, body = text[text.index("<svg") :].split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', root)
    assert view_box is not None
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    return f'<svg role="img" aria-label="{html.escape(title)}" {view_box[0]}>{body}'
