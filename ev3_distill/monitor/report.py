"""The report of a finished run: report.json and ledger.jsonl as one HTML page without network access, or as a few lines.

Cost is in training steps, summed over all arms.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ev3_distill.errors import InputError
from ev3_distill.monitor import charts, html, number_format
from ev3_distill.monitor.number_format import count, duration, percent, ratio
from ev3_distill.monitor.sentences import (
    alarm_of,
    asked_sentence,
    certificate_sentence,
    control_sentence,
    correction_sentence,
    diagnosis_sentences,
    final_sentence,
    guard_line,
    is_exact,
    point_phrase,
    race_outcome,
    tuned_values,
    units_sentence,
)
from ev3_distill.runtime.files import atomic_write
from ev3_distill.runtime.glossary import TERMS
from ev3_distill.runtime.ledger import PROMISE
from ev3_distill.runtime.phases import SHOWN_S

if TYPE_CHECKING:
    from rich.console import RenderableType

PALETTE = ("#20639b", "#d9822b", "#3c8d5a", "#8e5ea2", "#c2446f", "#8c6d4f", "#6b7480", "#b59a1d", "#c0392b", "#2a9d9d")
MAX_OPEN_ROWS = 20  # longer tables are folded
FILTERS = (
    "percent", "floor_percent", "exact_percent", "points", "floor_points", "count", "ratio", "duration", "scientific",
    "unbroken",
)  # fmt: skip


def write_html(run_dir: Path) -> Path:
    """Write report.html, atomically, from report.json and ledger.jsonl of a run directory.

    Raises:
      InputError: one of the two files is missing.
    """
    for name in ("report.json", "ledger.jsonl"):
        if not (run_dir / name).is_file():
            raise InputError(
                f"a report needs {name} of a finished run; {run_dir} does not have it: run compress first, or resume it"
            )
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    lines = (run_dir / "ledger.jsonl").read_text(encoding="utf-8").split("\n")
    page = render(report, [json.loads(line) for line in lines if line.strip()])
    with atomic_write(run_dir / "report.html") as file:
        file.write(page.encode())
    return run_dir / "report.html"


def render(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The HTML page.

    Args:
      report: the content of report.json.
      rows: of the ledger, one per iteration, in order; may be empty.
    """
    environment = html.environment()
    environment.filters.update({name: getattr(number_format, name) for name in FILTERS})
    arms = [{**arm, "color": PALETTE[i % len(PALETTE)]} for i, arm in enumerate(report["arms"])]
    claims = report["certificate"]["claims"]
    return environment.get_template("report.html.j2").render(
        report={**report, "arms": arms},
        promise=certificate_sentence(report),
        alarm=alarm_of(report),
        measured=[point_phrase(claim) for claim in claims],
        exact=all(is_exact(claim["metric"]) for claim in claims) and "units" not in report["certificate"],
        units=units_sentence(report["certificate"]),
        correction=correction_sentence(report["certificate"]),
        tables=report["certificate"].get("tables", []),
        max_open_rows=MAX_OPEN_ROWS,
        bounds={claim["metric"]: claim.get("lower_bound") for claim in claims},
        guards=[guard_line(guard) for guard in report.get("guards", [])],
        compression=compression(report),
        tuned={arm["name"]: tuned_values(arm["name"], rows) for arm in arms},
        tests=[row for row in rows if row["test"] is not None],
        hypotheses=_hypotheses(rows),
        history={"wide": charts.history(report, rows, (9.6, 3.7)), "narrow": charts.history(report, rows, (3.9, 3.3))},
        spending=charts.spending(arms, rows, (4.4, 3.0)),
        diagnosis=diagnosis_sentences(report),
        final=final_sentence(report),
        race=_race(report, arms),
        race_chart=charts.race(arms, rows, (4.4, 3.0)) if report.get("race") else "",
        search=report.get("search"),
        sizes=charts.sizes(report, (6.4, 3.4)) if report.get("search") else "",
        terms=TERMS,
        shown_s=SHOWN_S,
    )


def _race(report: dict[str, Any], arms: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The race as the page shows it: color, outcome and part of the longest one's steps for each arm; None without a race."""
    race, colors = report.get("race"), {arm["name"]: arm["color"] for arm in arms}
    if not race:
        return None
    most = max((arm["steps"] for arm in race["arms"]), default=0)
    shown = [
        {**arm, "color": colors[arm["name"]], "part": arm["steps"] / max(most, 1), "outcome": race_outcome(arm, race)}
        for arm in race["arms"]
    ]
    return {"leader": race["leader"], "arms": shown, "asked": asked_sentence(race)}


def _hypotheses(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What tests about guards prove: (objective, hypothesis), each once; ledgers of older versions have none."""
    tests = [row["test"] for row in rows if row["test"] is not None and row["test"].get("hypothesis")]
    pairs = [(test["objective"], test["hypothesis"]) for test in tests if test["objective"] != PROMISE]
    return list(dict.fromkeys(pairs))


def terminal_summary(report: dict[str, Any]) -> "RenderableType":
    """A few lines for the terminal: teacher, student, compression, certificate, cost."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    teacher, student, cost = report["teacher"], report["student"], report["cost"]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", "teacher", "student"):
        table.add_column(heading, overflow="fold", header_style="bold")
    for name, teacher_value, student_value in (
        ("network", teacher["source"], student["network"]),
        ("parameters", count(teacher["params"]), count(student["params"])),
        ("accuracy", percent(teacher["accuracy"]), percent(student["accuracy"])),
        ("agreement", "", percent(student["agreement"])),
        ("compression", "", ratio(compression(report))),
    ):
        table.add_row(name, Text(teacher_value), Text(student_value))
    spent = f"{duration(cost['wall_s'])}, {count(cost['steps'])} steps, {count(cost['examples'])} examples"
    guards = [
        Text(guard_line(guard), style="" if guard["certified"] else "bold red") for guard in report.get("guards", [])
    ]
    control = [Text(control_sentence(report["control"]))] if report.get("control") else []
    promise = Text(f"{certificate_sentence(report)}.", style="bold")
    alarm = [Text(f"{alarm['message']}.", style="bold red")] if (alarm := alarm_of(report)) else []
    diagnosis = [Text(" ".join(sentences))] if (sentences := diagnosis_sentences(report)) else []
    units = [Text(f"{sentence}.") for sentence in [units_sentence(report["certificate"])] if sentence]
    return Group(table, Text(), promise, *alarm, *units, *guards, *control, *diagnosis, Text(f"Cost: {spent}."))


def compression(report: dict[str, Any]) -> float | None:
    """Parameters of the teacher per parameter of the student; None if the teacher's are unknown."""
    teacher, student = report["teacher"]["params"], report["student"]["params"]
    return teacher / student if teacher and student else None
