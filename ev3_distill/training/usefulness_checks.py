"""Tells a useless student: on decide before the sealed split is opened, and on the sealed split for the report."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.certify.usefulness import CONSTANT, ONE_CLASS, TEACHER, Usefulness
from ev3_distill.config import RunConfig
from ev3_distill.data import input_statistics
from ev3_distill.errors import warn
from ev3_distill.guards import Guard
from ev3_distill.runtime.ledger import read_rows
from ev3_distill.training.certify_run import Certification
from ev3_distill.training.setup import TrainingSetup

QUALITY = ("accuracy", "agreement", "balanced_accuracy", "drop(accuracy)", "macro_f1", "worst_class_accuracy")
AGREES = 0.9  # agreement with the teacher above which a student's faults are its teacher's
RISE = 0.01  # of accuracy on assess, in the last third of the steps: training was not finished
FAR = 30.0  # ratio of scales of raw inputs, or their magnitude, that a student learns badly from


def warn_if_useless_on_decide(
    directory: Path, config: RunConfig, setup: TrainingSetup, scores: Any, teacher: Mapping[str, Any] | None
) -> bool:
    """Warns if the final student is useless on decide, before its sealed split is opened; returns whether it is.

    Args:
      directory: of the run.
      config: of the run.
      setup: of the run.
      scores: [N] the student's promise scores on decide; None if they are unknown.
      teacher: the teacher's outputs on decide by name, if there is one.
    """
    compare = setup.task.usefulness
    found = None
    if compare is not None and scores is not None:
        found = compare(setup.dataset.labels[setup.rows["decide"]], teacher, scores=scores)
    if not _raises_alarm(found, accepted=_accepts_quality(setup.guards)):
        return False
    assert found is not None
    causes = likely_causes(found, config, setup, read_rows(directory / "ledger.jsonl"))
    warn(alarm_line({"message": alarm_sentence(found, setup.class_names, "decide"), "causes": causes}))
    return True


def usefulness_content(
    directory: Path, config: RunConfig, setup: TrainingSetup, certification: Certification
) -> dict[str, Any] | None:
    """The comparison on the sealed split, for report.json; None if the task has none.

    Of grouped data it takes one example of each independent unit. `alarm` is empty for a useful student; else `message` says
    what is wrong, and `causes` what is likely to have caused it.
    """
    compare, outputs = setup.task.usefulness, certification.outputs.one_per_unit()
    found = None if compare is None else compare(outputs.targets, outputs.teacher, outputs=outputs.student)
    if found is None:
        return None
    content = {**found._asdict(), "message": "", "causes": []}
    if not _raises_alarm(found, accepted=_accepts_quality(setup.guards, certification.guards)):
        return {**content, "alarm": ""}
    causes = likely_causes(found, config, setup, read_rows(directory / "ledger.jsonl"))
    return {**content, "message": alarm_sentence(found, setup.class_names, "the sealed split"), "causes": causes}


def alarm_line(content: Mapping[str, Any]) -> str:
    """An alarm's `message` and `causes` in one line."""
    return f"{content['message']}. Likely cause: {'; '.join(content['causes'])}"


def _raises_alarm(found: Usefulness | None, *, accepted: bool) -> bool:
    """Whether a comparison raises an alarm; `accepted`: guards say that the user accepts less than the teacher has."""
    return found is not None and found.alarm != "" and not (accepted and found.alarm == TEACHER)


def _accepts_quality(guards: Iterable[Guard], outcomes: Sequence[Mapping[str, Any]] | None = None) -> bool:
    """Whether a guard on the quality of the whole student is given or, with outcomes, certified."""
    certified = None if outcomes is None else {one["metric"] for one in outcomes if one["certified"]}
    return any(guard.metric in QUALITY and (certified is None or guard.metric in certified) for guard in guards)


def alarm_sentence(found: Usefulness, class_names: Sequence[str], split: str) -> str:
    """What is wrong with a useless student, in one sentence without a period.

    Args:
      found: a comparison that raises an alarm.
      class_names: of the K classes.
      split: on which it was made.
    """
    name = f"'{class_names[found.majority]}'"
    accuracy, constant = f"{found.accuracy:.1%}", f"{found.constant:.1%}"
    if found.alarm == ONE_CLASS:
        return f"The student is useless: it predicts '{class_names[found.predicted]}' for all {found.n:,} examples of {split}"
    is_right = "is right" if found.labeled else "gives its teacher's answer"
    if found.alarm == CONSTANT:
        return f"The student is useless: it {is_right} on {accuracy} of {split}, always answering {name} on {constant}"
    teacher = f", the teacher on {found.teacher:.1%}" if found.labeled else ""
    return (
        f"The student is far below its teacher: it {is_right} on {accuracy} of {split}{teacher}, and always answering {name} "
        f"on {constant}"
    )


def likely_causes(
    found: Usefulness, config: RunConfig, setup: TrainingSetup, history: Iterable[Mapping[str, Any]]
) -> list[str]:
    """What is likely to have gone wrong, with the way out; at least one sentence without a period.

    Args:
      found: a comparison that raises an alarm.
      config: of the run.
      setup: of the run.
      history: rows of the ledger.
    """
    causes = []
    if found.teacher_useless:
        causes.append(
            f"the teacher is no better, with {found.teacher:.1%}: check its inputs (--teacher-input) and the order of its "
            "classes (--teacher-input.classes)"
        )
    elif found.labeled and found.agreement is not None and found.agreement >= AGREES:
        causes.append(
            f"the student agrees with its teacher on {found.agreement:.1%}, so its faults are the teacher's: give a better one"
        )
    if not config.standardize and _badly_scaled(setup):
        causes.append("columns of the inputs have very different scales, or large ones: omit --no-standardize")
    if _rising(list(history), setup.task.promise.name):
        causes.append(f"the budget of {config.budget} is too small, the student was still improving: raise --budget")
    return causes or [
        "the inputs may say little about the classes, or the student is too small: compare a teacher's accuracy, try a larger "
        "--student or --budget"
    ]


def _badly_scaled(setup: TrainingSetup) -> bool:
    statistics = input_statistics(setup.dataset.inputs, setup.rows["explore"])
    if statistics is None:
        return False
    mean, scale = (np.abs(np.asarray(statistics[name])) for name in ("mean", "scale"))
    return bool(max((mean + scale).max(), scale.max() / scale.min()) > FAR)


def _rising(history: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether the current student's score on assess rose in the last third of the steps, or there were few iterations.

    Iterations of a final phase, in which students learn from assess, do not count.
    """
    history = [row for row in history if not row.get("final")]
    if len(history) < 3:
        return True
    before = list(itertools.takewhile(lambda row: row["cost"] <= history[-1]["cost"] * 2 / 3, history)) or history[:1]
    earlier, last = (rows[-1].get(f"current_{name}") for rows in (before, history))
    return earlier is not None and last is not None and bool(last - earlier >= RISE)
