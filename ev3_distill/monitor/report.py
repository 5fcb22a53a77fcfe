"""The report of a finished run: report.json and ledger.jsonl -> one HTML page that needs no network, or a few lines.

Cost is in training steps, summed over all arms. Shares are shown as percentages with one decimal; lower bounds are
rounded down, because a page must not promise more than was proven.
"""

import json
import math
import re
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ev3_distill.errors import InputError
from ev3_distill.monitor import charts, html
from ev3_distill.runtime.files import atomic_write
from ev3_distill.tasks.metrics import find_metric

if TYPE_CHECKING:
    from rich.console import RenderableType

MISSING = "\u2013"  # shown where a value is null
PALETTE = ("#20639b", "#d9822b", "#3c8d5a", "#8e5ea2", "#c2446f", "#8c6d4f", "#6b7480", "#b59a1d", "#c0392b", "#2a9d9d")
OPEN = 20  # rows of a table that is shown unfolded, at most


def write_html(run_dir: Path) -> Path:
    """Reads report.json and ledger.jsonl of a run directory and writes report.html beside them, whole or not at all.

    Raises:
      InputError: one of the two files is missing.
    """
    for name in ("report.json", "ledger.jsonl"):
        if not (run_dir / name).is_file():
            raise InputError(f"a report needs {name} of a finished run; got {run_dir}: run or resume compress first")
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    lines = (run_dir / "ledger.jsonl").read_text(encoding="utf-8").split("\n")
    page = render(report, [json.loads(line) for line in lines if line.strip()])
    with atomic_write(run_dir / "report.html") as file:
        file.write(page.encode())
    return run_dir / "report.html"


def render(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page.

    Args:
      report: the content of report.json.
      rows: the ledger, one row per iteration, in order; may be empty.
    """
    environment = html.environment()
    shares = (percent, floor_percent, exact_percent, points, floor_points)
    filters = (*shares, count, ratio, duration, scientific, unbroken)
    environment.filters.update({function.__name__: function for function in filters})
    arms = [{**arm, "colour": PALETTE[i % len(PALETTE)]} for i, arm in enumerate(report["arms"])]
    return environment.get_template("report.html.j2").render(
        report={**report, "arms": arms},
        promise=promise(report),
        reached=[_reached(claim) for claim in report["certificate"]["claims"]],
        exact=all(_is_exact(claim["metric"]) for claim in report["certificate"]["claims"]),
        corrected=corrected(report["certificate"]),
        tables=report["certificate"].get("tables", []),
        unfolded=OPEN,
        bounds={claim["metric"]: claim.get("lower_bound") for claim in report["certificate"]["claims"]},
        verdicts=[verdict(guard) for guard in report.get("guards", [])],
        compression=compression(report),
        tuned={arm["name"]: tuned(arm["name"], rows) for arm in arms},
        tests=[row for row in rows if row["test"] is not None],
        history={"wide": charts.history(report, rows, (9.6, 3.7)), "narrow": charts.history(report, rows, (3.9, 3.3))},
        spending=charts.spending(arms, rows, (4.4, 3.0)),
        search=report.get("search"),
        sizes=charts.sizes(report, (6.4, 3.4)) if report.get("search") else "",
    )


def summary(report: dict[str, Any]) -> "RenderableType":
    """A few lines for the terminal: teacher, student, compression, the promise, cost."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    teacher, student, cost = report["teacher"], report["student"], report["cost"]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", "teacher", "student"):
        table.add_column(heading, overflow="fold", header_style="bold")
    for name, of_teacher, of_student in (
        ("network", teacher["source"], student["network"]),
        ("parameters", count(teacher["params"]), count(student["params"])),
        ("accuracy", percent(teacher["accuracy"]), percent(student["accuracy"])),
        ("agreement", "", percent(student["agreement"])),
        ("compression", "", ratio(compression(report))),
    ):
        table.add_row(name, Text(of_teacher), Text(of_student))
    spent = f"{duration(cost['wall_s'])}, {count(cost['steps'])} steps, {count(cost['examples'])} examples"
    guards = [
        Text(verdict(guard), style="" if guard["certified"] else "bold red") for guard in report.get("guards", [])
    ]
    told = [Text(helped(report["control"]))] if report.get("control") else []
    return Group(table, Text(), Text(f"{promise(report)}.", style="bold"), *guards, *told, Text(f"Cost: {spent}."))


def helped(control: dict[str, float]) -> str:
    """By how much the distilled student is better than the one of labels alone, in one sentence."""
    return (
        f"Distillation changed accuracy by {points(control['gain'])} points against labels alone at the same cost "
        f"({exact_percent(control['confidence'])} interval {points(control['low'])} to {points(control['high'])})."
    )


def promise(report: dict[str, Any]) -> str:
    """The certificate in one sentence."""
    claims = [
        f"{_bound(claim['metric'], claim.get('lower_bound'), claim.get('upper_bound'))} {label(claim['metric'])}"
        for claim in report["certificate"]["claims"]
    ]
    if not claims:
        return "Nothing is promised of this student"
    confidence = exact_percent(report["certificate"]["confidence"])
    told = " and ".join([", ".join(claims[:-1]), claims[-1]] if len(claims) > 1 else claims)
    precision = report["student"].get("deploy", "float32")
    return (
        f"This student{'' if precision == 'float32' else f', in {precision},'} has {told}, with {confidence} confidence"
    )


def tuned(arm: str, rows: list[dict[str, Any]]) -> str:
    """What the hyperparameters of an arm that tunes any were in the end, by its last row of the ledger; else nothing."""
    told: dict[str, Any] = next((row["tuned"][arm] for row in reversed(rows) if arm in row.get("tuned", {})), {})
    numbers = {name: value if isinstance(value, list) else [value] for name, value in told.items()}
    return ", ".join(f"{name} {' : '.join(f'{x:.3g}' for x in values)}" for name, values in numbers.items())


def claim_line(claim: dict[str, Any], confidence: float) -> str:
    """One claim of a certificate, as the terminal shows it."""
    metric, lower, upper = claim["metric"], claim.get("lower_bound"), claim.get("upper_bound")
    told = _bound(metric, lower, upper, digits=2).replace(" %", "%")
    things = "passes" if metric == "latency_ms" else "examples"
    unit = _unit(metric)
    point = f"{claim['point']:.2%}" if unit == "%" else f"{claim['point']:.4g}{unit}"
    return f"{metric}: {point} of {claim['n']} {things}; {told} with {100 * confidence:.10g}% confidence"


def corrected(certificate: dict[str, Any]) -> str:
    """That the split was opened before, or for several students, where it was; else nothing."""
    times, among, told = certificate.get("reopened", 0), certificate.get("among", 1), []
    if among > 1:
        told = [f"was opened for {among} students, any of which could have been delivered"]
    if times:
        told.append(f"had been opened {'once' if times == 1 else f'{times} times'} before")
    return f"The sealed split {' and '.join(told)}; the bounds are corrected for it" if told else ""


def label(metric: str) -> str:
    """What a sentence calls a metric."""
    query = find_metric(metric)
    return query.label if query else metric


def verdict(guard: dict[str, Any]) -> str:
    """Whether a guard is certified, in one line."""
    metric = guard["metric"]
    query = find_metric(metric)
    if query is not None and query.row.source == "size":
        known = f"{count(guard['point'])} {query.row.unit}"
    else:
        higher = query is None or query.row.higher_is_better
        known = f"proven is {_bound(metric, *((guard['bound'], None) if higher else (None, guard['bound'])))}"
    return f"Guard {guard['guard']}: {'certified' if guard['certified'] else 'NOT CERTIFIED'}, {known}"


def _reached(claim: dict[str, Any]) -> str:
    """The point of a claim, in words."""
    metric = claim["metric"]
    unit = _unit(metric)
    shown = percent(claim["point"]) if unit == "%" else f"{claim['point']:.3g}{unit}"
    return f"{shown} {label(metric)} (n\u00a0=\u00a0{count(claim['n'])})"


def _is_exact(metric: str) -> bool:
    """Whether the metric has an exact bound (Clopper and Pearson)."""
    query = find_metric(metric)
    return query is not None and query.row.exact


def _unit(metric: str) -> str:
    """What stands behind the number: % for a fraction, else the unit after a space, or nothing."""
    query = find_metric(metric)
    unit = query.row.unit if query else "%"
    return f" {unit}" if unit not in ("", "%") else unit


def _bound(metric: str, lower: float | None, upper: float | None, *, digits: int = 1) -> str:
    """At least or at most; never more than was proven."""
    word, value, rounding = ("at most", upper, ROUND_CEILING) if lower is None else ("at least", lower, ROUND_FLOOR)
    if value is None or _missing(value):
        return f"{word} {MISSING}"
    unit = _unit(metric)
    if unit != "%":
        return f"{word} {_rounded(value, 3, rounding)}{unit}"
    return f"{word} {_fixed(value, digits, rounding=rounding)} %"


def _rounded(value: float, digits: int, rounding: str) -> str:
    """A number with so many significant digits."""
    exact = Decimal(str(value))
    if not exact or not exact.is_finite():
        return str(value)
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=rounding)
    return f"{rounded:f}".replace("-", "\u2212")


def compression(report: dict[str, Any]) -> float | None:
    """Parameters of the teacher per parameter of the student, where the teacher's are known."""
    teacher, student = report["teacher"]["params"], report["student"]["params"]
    return teacher / student if teacher and student else None


# How numbers are shown. None and nan are shown as MISSING.


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _fixed(value: float, digits: int, *, sign: str = "-", rounding: str | None = None) -> str:
    exact = Decimal(str(value))  # the shortest decimal, so that a bound of 0.289 is not shown as 28.8 %
    rounded = (exact * 100).quantize(Decimal(1).scaleb(-digits), rounding=rounding)
    return f"{abs(rounded) if rounded == 0 else rounded:{sign},f}".replace("-", "\u2212")


def percent(share: float | None) -> str:
    """0.9412 -> 94.1 %."""
    return MISSING if share is None or _missing(share) else f"{_fixed(share, 1)} %"


def floor_percent(share: float | None) -> str:
    """0.9419 -> 94.1 %, never more than was proven."""
    return MISSING if share is None or _missing(share) else f"{_fixed(share, 1, rounding=ROUND_FLOOR)} %"


def ceil_percent(share: float | None) -> str:
    """0.0911 -> 9.2 %, never less than was proven."""
    return MISSING if share is None or _missing(share) else f"{_fixed(share, 1, rounding=ROUND_CEILING)} %"


def exact_percent(share: float) -> str:
    """0.95 -> 95 %, 0.999 -> 99.9 %; ten digits of the share are kept."""
    return f"{(Decimal(str(round(share, 10))) * 100).normalize():f} %"


def points(difference: float | None) -> str:
    """0.0123 -> +1.23 percentage points."""
    return MISSING if difference is None or _missing(difference) else _fixed(difference, 2, sign="+")


def floor_points(difference: float | None) -> str:
    """0.0123 -> +1.23 percentage points, never more than was proven."""
    return (
        MISSING if difference is None or _missing(difference) else _fixed(difference, 2, sign="+", rounding=ROUND_FLOOR)
    )


def count(number: float | None) -> str:
    """12345 -> 12,345."""
    return MISSING if number is None or _missing(number) else f"{number:,.0f}"


def ratio(value: float | None) -> str:
    """12.34 -> 12.3\u00d7."""
    return MISSING if value is None or _missing(value) else f"{value:,.1f}\u00d7"


def duration(seconds: float | None) -> str:
    """75.2 -> 1 min 15 s."""
    if seconds is None or _missing(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def scientific(value: float | None) -> str:
    """0.0123 -> 0.012, 0.0000123 -> 1.2e-5."""
    return MISSING if value is None or _missing(value) else re.sub(r"e-0*", "e\u2212", f"{value:.2g}")


def unbroken(text: str) -> str:
    """Keeps a number and its percent sign on one line."""
    return text.replace(" %", "\u00a0%")
