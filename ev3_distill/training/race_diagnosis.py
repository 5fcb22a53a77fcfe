"""Diagnoses the teacher and the labels: which of them trained the better student in the race, and where they disagree.

Differences come from the ledger's rows of the race, where arms had trained equally long, on assess. Classes come from the
labels and the teacher's outputs on assess. Students are not scored again, so it does not matter what they trained on later.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ev3_distill.arms import learns_from
from ev3_distill.arms.registry import LABELS, TEACHER
from ev3_distill.certify.bounds import binomial_lower
from ev3_distill.runtime.ledger import PROMISE, read_rows
from ev3_distill.runtime.race import race_rows
from ev3_distill.tasks.base import has_target
from ev3_distill.teachers.targets import TeacherTargets
from ev3_distill.training.setup import TrainingSetup

LEAST_STEPS = 100  # of each arm: a lead after fewer shows who starts fast
CLEAR = 2.0  # standard errors between the best arm of labels and the best arm of the teacher
NOTABLE = 0.05  # fraction of labels that disagree with the teacher, proven at LEVEL, from which it is said
LEVEL = 0.05


class Comparison(NamedTuple):
    """The best arm that learns from labels alone against the best arm that learns from the teacher, paired, in the race."""

    arms: dict[str, str]  # names by kind, LABELS and TEACHER
    steps: dict[str, int]  # of each by kind
    gain: float  # of labels over the teacher
    se: float  # its standard error
    at_most: bool  # whether `se` is an upper bound, because a third arm was the best


def compare_in_race(rows: Sequence[Mapping[str, Any]], promise: str) -> Comparison | None:
    """The comparison in the last iteration of the race in which both kinds of arms trained; None if there is none.

    It counts only if both have trained for LEAST_STEPS.

    Args:
      rows: of the ledger. Those in which a guard on another score than the promise ruled do not count.
      promise: name of the promised score.
    """
    raced = race_rows(rows)
    for last in range(len(raced) - 1, -1, -1):
        row = raced[last]
        labels, teacher = _best(row, LABELS), _best(row, TEACHER)
        if row["objective"] not in (PROMISE, promise) or labels is None or teacher is None:
            continue
        arms, behind = {LABELS: labels, TEACHER: teacher}, row["behind"]
        steps = {kind: sum(one["steps"].get(name, 0) for one in raced[: last + 1]) for kind, name in arms.items()}
        if min(steps.values()) < LEAST_STEPS:
            return None
        # Both errors are of differences from the best arm, 0 for that arm. The error of the difference is at most their sum.
        errors = [row["behind_se"][name] or 0.0 for name in (labels, teacher)]
        return Comparison(arms, steps, behind[labels] - behind[teacher], sum(errors), min(errors) > 0)
    return None


def _best(row: Mapping[str, Any], kind: str) -> str | None:
    gaps = {name: gap for name, gap in row["behind"].items() if gap is not None and learns_from(name) == kind}
    return max(gaps, key=gaps.__getitem__) if gaps else None


def diagnose_race(directory: Path, setup: TrainingSetup, targets: TeacherTargets) -> dict[str, Any] | None:
    """The diagnosis of a run with a teacher, for report.json.

    None without labels, and where the race shows no clear difference and the teacher confuses no classes.

    Its entries: `ahead`, `labels` or `teacher`, or null if the race shows no clear difference; then the next four are null,
    too. The arms by these names in `arms`; `steps` of each; `gain` of the one ahead in the promised score, with `gain_se`.
    On `n` labeled examples of assess: `differ`, of how many of them the teacher gives another class; `pairs` of confused
    classes; `moved`, the number of classes that seem to be in another order, of `num_classes`. `sentences` are for people.

    Args:
      directory: of the run, with its ledger.
      setup: what is trained on what.
      targets: of the teacher.
    """
    if not setup.labeled or setup.task.disagreement is None:
        return None
    compared = compare_in_race(list(read_rows(directory / "ledger.jsonl")), setup.task.promise.name)
    if compared is not None and (abs(compared.gain) < CLEAR * compared.se or compared.gain == 0):
        compared = None
    rows = setup.rows["assess"]
    found = setup.task.disagreement(setup.dataset.labels[rows], targets.unchanged(rows))
    if found is None or (compared is None and not found.pairs):
        return None
    scale = len(rows) / found.n  # examples without a label count as wrong for every arm
    labeled = has_target(setup.dataset.labels[setup.rows["explore"]])
    content = {
        **_compared(compared, scale),
        "n": found.n,
        "differ": found.differ,
        "pairs": [_named(pair, setup.class_names) for pair in found.pairs],
        "moved": found.moved,
        "num_classes": found.num_classes,
    }
    if compared is None:
        return {**content, "sentences": [_doubt(content)]}
    sentences = [_headline(content, at_most=compared.at_most), *_reasons(content, int(labeled.sum()), len(labeled))]
    return {**content, "sentences": sentences}


def _compared(compared: Comparison | None, scale: float) -> dict[str, Any]:
    """The entries of the diagnosis that the race gives."""
    if compared is None:
        return dict.fromkeys(("ahead", "arms", "steps", "gain", "gain_se"))
    return {
        "ahead": LABELS if compared.gain > 0 else TEACHER,
        "arms": compared.arms,
        "steps": compared.steps,
        "gain": scale * abs(compared.gain),
        "gain_se": scale * compared.se,
    }


def _doubt(content: Mapping[str, Any]) -> str:
    """Where teacher and labels disagree by class, in a run whose race, if any, shows no clear difference."""
    if content["moved"]:
        return _moved(content)
    counts = "; ".join(map(_pair_in_words, content["pairs"]))
    return f"The teacher disagrees with the labels on some classes: {counts}. The run does not show which of the two is right."


def _moved(content: Mapping[str, Any]) -> str:
    """That the teacher's classes seem to be in another order."""
    counts = "; ".join(map(_pair_in_words, content["pairs"]))
    return (
        f"Your teacher's classes seem to be in another order: for {content['moved']} of {content['num_classes']} "
        f"its usual answer is another class ({counts}). Name its outputs in order with --teacher-input.classes."
    )


def _named(pair: Any, names: Sequence[str]) -> dict[str, Any]:
    return {**pair._asdict(), "label": names[pair.label], "answer": names[pair.answer]}


def _headline(content: Mapping[str, Any], *, at_most: bool) -> str:
    """Which kind of arm was ahead, by how much, after how many steps, and on how much data."""
    names = {
        LABELS: f"labels alone ({content['arms'][LABELS]})",
        TEACHER: f"distillation ({content['arms'][TEACHER]})",
    }
    ahead, behind = (LABELS, TEACHER) if content["ahead"] == LABELS else (TEACHER, LABELS)
    first, second = (f"{content['steps'][kind]:,}" for kind in (ahead, behind))
    steps = f"{first} steps each" if first == second else f"{first} and {second} steps"
    headline = f"{names[ahead]} ended {100 * content['gain']:.1f} points ahead of {names[behind]} after {steps}"
    error = f"{'at most ' if at_most else ''}{_one_digit(100 * content['gain_se'])}"
    return f"{headline[0].upper()}{headline[1:]} (assess, {content['n']:,} examples, standard error {error})."


def _one_digit(number: float) -> str:
    """A standard error in points, with one decimal or, below that, its first digit."""
    return f"{number:.1f}" if number >= 0.05 or not number else f"{number:.{-math.floor(math.log10(number))}f}"


def _reasons(content: Mapping[str, Any], labeled: int, training: int) -> list[str]:
    """What the labels and the teacher's outputs show of the cause; no more than they show.

    Args:
      content: of the diagnosis.
      labeled: training examples with a label.
      training: training examples.
    """
    n, differ, pairs = content["n"], content["differ"], content["pairs"]
    counts = "; ".join(map(_pair_in_words, pairs))
    if content["ahead"] == LABELS:
        if content["moved"]:
            return [_moved(content)]
        if pairs:
            both = ", ".join(f"'{pair['label']}' and '{pair['answer']}'" for pair in pairs)
            return [f"Your teacher confuses {both}: {counts}."]
        agreed = f"{100 * (1 - differ / n):.1f} %"
        return [f"Your teacher agrees with {agreed} of these labels, and no two classes stand out."]
    reasons = []
    if binomial_lower(differ, n, LEVEL) > NOTABLE:
        most = f" Most clearly: {counts}." if pairs else ""
        reasons.append(
            f"{100 * differ / n:.1f} % of these labels disagree with the teacher.{most} The race shows which of the two "
            "helped the student more, not which is right."
        )
    if labeled < training / 2:
        reasons.append(f"Only {labeled:,} of {training:,} training examples have a label.")
    return reasons


def _pair_in_words(pair: Mapping[str, Any]) -> str:
    label, answer = f"'{pair['label']}'", f"'{pair['answer']}'"
    text = f"of {pair['n']:,} examples labeled {label} it calls {pair['times']:,} {answer}"
    if 10 * pair["reverse_times"] < pair["reverse_n"] or not pair["reverse_n"]:
        return text
    return f"{text}, and of {pair['reverse_n']:,} labeled {answer} {pair['reverse_times']:,} {label}"
