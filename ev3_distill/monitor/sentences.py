"""Sentences about a run's certificate, guards and arms, for the page, the terminal and the model card."""

from decimal import ROUND_CEILING, ROUND_FLOOR
from typing import Any

from ev3_distill.monitor.number_format import (
    MISSING,
    count,
    exact_percent,
    fixed_percent,
    is_missing,
    percent,
    points,
    significant,
)
from ev3_distill.runtime.ledger import PROMISE
from ev3_distill.runtime.race import gap_in_words
from ev3_distill.tasks.metrics import find_metric


def certificate_sentence(report: dict[str, Any]) -> str:
    """The certificate of a report, in one sentence."""
    certificate = report["certificate"]
    claims = [
        f"{_bound(claim['metric'], claim.get('lower_bound'), claim.get('upper_bound'))} {metric_label(claim['metric'])}"
        for claim in certificate["claims"]
    ]
    if not claims:
        return "Nothing is promised of this student"
    confidence = exact_percent(certificate["confidence"])
    text = " and ".join([", ".join(claims[:-1]), claims[-1]] if len(claims) > 1 else claims)
    precision = report["student"].get("deploy", "float32")
    student = "This student" if precision == "float32" else f"This student, in {precision},"
    new = " on new groups" if certificate.get("units") else ""
    return f"{student} has {text}{new}, with {confidence} confidence"


def alarm_of(report: dict[str, Any]) -> dict[str, Any] | None:
    """The entry `usefulness` of the report of a useless student, with `message` and `causes`; None for a useful one.

    Reports of older versions lack the entry.
    """
    found: dict[str, Any] | None = report.get("usefulness")
    return found if found and found["alarm"] else None


def claim_line(claim: dict[str, Any], certificate: dict[str, Any]) -> str:
    """One claim of a certificate, as the terminal shows it."""
    metric, lower, upper = claim["metric"], claim.get("lower_bound"), claim.get("upper_bound")
    things = "passes" if metric == "latency_ms" else certificate.get("units", {}).get("of", "examples")
    unit = _unit(metric)
    point = f"{claim['point']:.2%}" if unit == "%" else f"{claim['point']:.4g}{unit}"
    if lower is None and upper is None:
        return f"{metric}: {point} of {claim['n']} {things}; nothing is certified"
    bound, confidence = _bound(metric, lower, upper, digits=2).replace(" %", "%"), certificate["confidence"]
    return f"{metric}: {point} of {claim['n']} {things}; {bound} with {100 * confidence:.10g}% confidence"


def point_phrase(claim: dict[str, Any]) -> str:
    """The measured value of a claim and the number of examples, such as "94.4 % accuracy (n = 10,000)"."""
    metric = claim["metric"]
    unit = _unit(metric)
    value = percent(claim["point"]) if unit == "%" else f"{claim['point']:.3g}{unit}"
    return f"{value} {metric_label(metric)} (n\u00a0=\u00a0{count(claim['n'])})"


def correction_sentence(certificate: dict[str, Any]) -> str:
    """Why bounds were corrected: the split had been opened before, or for several students. Empty if neither."""
    times, among, reasons = certificate.get("reopened", 0), certificate.get("among", 1), []
    if among > 1:
        reasons = [f"was opened for {among} students, any of which could have been delivered"]
    if times:
        reasons.append(f"had been opened {'once' if times == 1 else f'{times} times'} before")
    return f"The sealed split {' and '.join(reasons)}; the bounds are corrected for it" if reasons else ""


def units_sentence(certificate: dict[str, Any]) -> str:
    """How many independent units the sealed examples are; empty where each example is one."""
    units = certificate.get("units")
    if not units:
        return ""
    return (
        f"The bounds count {count(units['number'])} {units['of']} of {count(units['examples'])} examples; accuracy is that on "
        "an average example of a new group"
    )


def guard_line(guard: dict[str, Any]) -> str:
    """Whether a guard is certified, in one line."""
    metric = guard["metric"]
    query = find_metric(metric)
    if query is not None and query.row.source == "size":
        known = f"{count(guard['point'])} {query.row.unit}"
    else:
        higher = query is None or query.row.higher_is_better
        known = f"proven: {_bound(metric, *((guard['bound'], None) if higher else (None, guard['bound'])))}"
    return f"Guard {guard['guard']}: {'certified' if guard['certified'] else 'NOT CERTIFIED'}, {known}"


def control_sentence(control: dict[str, float]) -> str:
    """By how much the distilled student is better than the one trained with labels only."""
    return (
        f"Distillation changed accuracy by {points(control['gain'])} points against labels alone at the same cost "
        f"({exact_percent(control['confidence'])} interval {points(control['low'])} to {points(control['high'])})."
    )


def diagnosis_sentences(report: dict[str, Any]) -> list[str]:
    """What the race shows about the teacher and the labels; none where it shows nothing, or in reports of older versions."""
    return list((report.get("diagnosis") or {}).get("sentences", []))


def race_outcome(arm: dict[str, Any], race: dict[str, Any]) -> str:
    """How the race ended for an arm, of the entry `race` of a report."""
    left = arm["left"]
    if left is None:
        return "led after the race" if arm["name"] == race["leader"] else "still in the race at the end of the run"
    if left["best"] is None:
        return "left at the end of the race"
    if left["behind"] is None:
        return "left: its student was not finite"
    if left["behind"] == 0:
        return "left at the end of the race, level with the best"
    about = "" if left["objective"] == PROMISE else f", in {left['objective']}"
    return f"left {gap_in_words(left['behind'], left['behind_se'])} behind {left['best']}{about}"


def asked_sentence(race: dict[str, Any]) -> str:
    """Which arms were asked after the race, how often, and how often that helped; empty if none was."""
    parts = []
    for arm in race["asked"]:
        helped = f"helped {_times(arm['helped'])}" if arm["helped"] else "did not help"
        parts.append(f"{arm['name']} {_times(arm['times'])} ({count(arm['steps'])} steps, {helped})")
    return f"Asked later, when nothing had moved: {'; '.join(parts)}" if parts else ""


def final_sentence(report: dict[str, Any]) -> str:
    """What a final phase did, and what decide no longer proves; empty if the run had none."""
    final = report.get("final")
    if not final:
        return ""
    score = next((value for name, value in final.items() if name.startswith("before_")), None)
    before = f"the {final['before']} student before it"
    text = (
        f"In the final phase, the last {count(final['steps'])} steps, the leader also trained on the {count(final['rows'])} "
        "examples of assess and decide, and nothing was decided"
    )
    if final["delivered"]:
        return f"{text}. So decide proves nothing about the delivered student; {before} had {percent(score)} on it"
    return f"{text}. Its student was worse on these examples than {before}, which is delivered"


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def tuned_values(arm: str, rows: list[dict[str, Any]]) -> str:
    """Hyperparameters that an arm tuned, from the last ledger row that has them; empty if it tunes none."""
    values: dict[str, Any] = next((row["tuned"][arm] for row in reversed(rows) if arm in row.get("tuned", {})), {})
    numbers = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return ", ".join(f"{name} {' : '.join(f'{x:.3g}' for x in numbers[name])}" for name in numbers)


def metric_label(metric: str) -> str:
    """What a sentence calls a metric."""
    query = find_metric(metric)
    return query.label if query else metric


def is_exact(metric: str) -> bool:
    """Whether the metric has an exact bound (Clopper and Pearson)."""
    query = find_metric(metric)
    return query is not None and query.row.exact


def _unit(metric: str) -> str:
    """The unit after a number: % for a fraction, another unit with a space before it, or nothing."""
    query = find_metric(metric)
    unit = query.row.unit if query else "%"
    return f" {unit}" if unit not in ("", "%") else unit


def _bound(metric: str, lower: float | None, upper: float | None, *, digits: int = 1) -> str:
    """ "at least" or "at most" a value, rounded so that no more is claimed than was proven."""
    word, value, rounding = ("at most", upper, ROUND_CEILING) if lower is None else ("at least", lower, ROUND_FLOOR)
    if value is None or is_missing(value):
        return f"{word} {MISSING}"
    unit = _unit(metric)
    if unit != "%":
        return f"{word} {significant(value, 3, rounding)}{unit}"
    return f"{word} {fixed_percent(value, digits, rounding=rounding)} %"
