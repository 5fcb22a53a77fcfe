"""Trains a network on a data set under a teacher, from its newest checkpoint if there is one, to certificate and report."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill import students
from ev3_distill.certify.bounds import clopper_pearson_lower, clopper_pearson_upper, mean_lower, mean_upper
from ev3_distill.config import Budget, Compress, RunConfig
from ev3_distill.errors import warn
from ev3_distill.runtime.phases import phase
from ev3_distill.runtime.progress import RunProgress
from ev3_distill.tasks.outputs import Outputs
from ev3_distill.teachers.targets import TeacherTargets
from ev3_distill.training import run_loop
from ev3_distill.training.certify_run import CertificateRequest, certify_run, metrics_to_claim
from ev3_distill.training.evaluate_students import final_steps
from ev3_distill.training.iterate import UNLIMITED, Limits
from ev3_distill.training.memory import eval_batch_size
from ev3_distill.training.race_diagnosis import diagnose_race
from ev3_distill.training.report_content import FinalStudent, final_phase_content, report_content
from ev3_distill.training.run_dir import write_json
from ev3_distill.training.seen_rows import write_seen_rows
from ev3_distill.training.setup import InStepTeacher, TrainingRun, TrainingSetup, make_run, sealed_batches
from ev3_distill.training.trainer import Distillation
from ev3_distill.training.usefulness_checks import alarm_line, warn_if_useless_on_decide
from ev3_distill.types import Batch, State, Variables

ControlGain = Callable[[Iterator[Batch]], dict[str, float]]  # the sealed split in parts -> see `control_gain`


def train(
    directory: Path,
    config: RunConfig,
    setup: TrainingSetup,
    arm_names: Sequence[str],
    targets: TeacherTargets,
    *,
    teacher: Mapping[str, Any] | None,
    in_step: InStepTeacher | None = None,
) -> dict[str, Any]:
    """Runs a whole training: iterates, selects, certifies and reports; returns the content of report.json.

    Args:
      directory: of the run, locked by this process.
      config: of the run.
      setup: what is trained on what.
      arm_names: names of the arms.
      targets: of the teacher.
      teacher: facts for the report; None if the data's own targets alone teach.
      in_step: a JAX teacher that runs inside the training step.
    """
    stop_share, policy = 0.0, "best"
    if isinstance(config, Compress):
        stop_share, policy = float(config.stop_when_met), config.deliver
    run = make_run(config, setup, arm_names, targets, in_step=in_step, stop_share=stop_share)
    seconds, evaluator = Budget.parse(config.budget).seconds, run.distillation.evaluator
    title = "teacher" if teacher is None else "student"
    with phase("training"), RunProgress(title, steps=setup.steps, seconds=seconds) as progress:
        limits = Limits(setup.steps or UNLIMITED, seconds)
        state = iterate_run(directory, config, run, targets, progress, limits=limits)
    origin, variables = evaluator.select(run.pools, state, policy)
    before = evaluator.select_before_final(run.pools, state, policy)

    def scores(student: Variables) -> np.ndarray:
        return np.asarray(evaluator.evaluate(student, run.pools.decide).promise)

    final = FinalStudent(setup.network, variables, origin, state, run.arms, on_decide=scores(before[1]))
    if final_steps(state):
        final = dataclasses.replace(final, facts={"final": final_phase_content(setup, final, before[0])})
    if setup.control is None or not isinstance(config, Compress):
        return conclude(directory, config, setup, final, targets, teacher=teacher)
    control = students.load(setup.control, factory=students.import_factory(config.student))[1]
    if evaluator.outranks(run.pools, control, variables):
        final = dataclasses.replace(final, variables=control, origin="control", on_decide=scores(control))
    gain = functools.partial(control_gain, run.distillation, variables, control, confidence=config.confidence)
    return conclude(directory, config, setup, final, targets, teacher=teacher, gain=gain)


def iterate_run(
    directory: Path,
    config: RunConfig,
    run: TrainingRun,
    targets: TeacherTargets,
    progress: RunProgress,
    *,
    limits: Limits,
    start: run_loop.Start | None = None,
    row_facts: Mapping[str, Any] | None = None,
) -> State:
    """Iterates a run with a progress display; see `run_loop.iterate`. Returns the state at its limits."""
    targets.pause_display = progress.paused
    state = run_loop.iterate(
        directory, run, config, limits=limits, on_row=progress.row, start=start, row_facts=row_facts
    )
    targets.pause_display = contextlib.nullcontext
    return state


def conclude(
    directory: Path,
    config: RunConfig,
    setup: TrainingSetup,
    final: FinalStudent,
    targets: TeacherTargets,
    *,
    teacher: Mapping[str, Any] | None,
    gain: ControlGain | None = None,
    fallback: FinalStudent | None = None,
) -> dict[str, Any]:
    """Saves the final student, certifies it from the sealed split and writes report.json; returns its content.

    Args:
      directory: of the run.
      config: of the run.
      setup: what was trained on what.
      final: the student.
      targets: of the teacher.
      teacher: facts for the report; None if the data's own targets alone teach.
      gain: computes the gain over a control.
      fallback: delivered instead if the sealed split does not prove the guards of `final`.
    """
    dataset, finals = setup.dataset, [final, *([fallback] if fallback else [])]
    warned = warn_if_useless_on_decide(
        directory, config, setup, final.on_decide, targets.unchanged(setup.rows["decide"]) if teacher else None
    )
    with phase("writing"):
        students.save(directory / "student", final.network, final.variables)
    metrics = metrics_to_claim(
        setup.guards, labeled=setup.labeled, teacher=teacher is not None, metrics=setup.task.metrics
    )
    request = CertificateRequest(
        setup.task, metrics, config.confidence, setup.class_names, dataset.group_names, setup.costs
    )
    with phase("certifying"):
        certification = certify_run(
            directory,
            [(one.network, one.variables) for one in finals],
            dataset,
            test=functools.partial(sealed_batches, setup, targets),
            request=request,
            guards=setup.guards,
            teacher=teacher is not None,
            batch_size=eval_batch_size(dataset, setup.memory, config.ev3.eval_batch_size),
        )
    if certification.which:
        final = finals[certification.which]
        students.save(directory / "student", final.network, final.variables)
    with phase("certifying"):
        control = gain(sealed_batches(setup, targets)) if gain else None
    diagnosis = diagnose_race(directory, setup, targets) if teacher else None
    content = report_content(
        directory, config, setup, final, certification, teacher=teacher, control=control, diagnosis=diagnosis
    )
    write_seen_rows(directory, dataset, setup.rows, by_groups=setup.units is not None)
    if content["usefulness"] and content["usefulness"]["alarm"] and not warned:
        warn(alarm_line(content["usefulness"]))
    write_json(directory / "report.json", content)
    return content


def control_gain(
    distillation: Distillation, student: Variables, control: Variables, test: Iterator[Batch], *, confidence: float
) -> dict[str, float]:
    """By how much a student's accuracy is above its control's, paired, with a two-sided interval.

    The gain is P(student right, control wrong) - P(student wrong, control right). Each end of the interval uses Clopper-Pearson
    bounds of the two probabilities, each of the four at a quarter of 1 - confidence.
    """
    ours, theirs, units = [], [], []
    for part in test:
        units.append(np.asarray(part.unit))
        ours.append(np.asarray(distillation.evaluator.evaluate(student, part).promise) > 0)
        theirs.append(np.asarray(distillation.evaluator.evaluate(control, part).promise) > 0)
    right, reference = np.concatenate(ours), np.concatenate(theirs)
    if len(units[0]):
        return _gain_by_unit(right, reference, np.concatenate(units), confidence=confidence)
    n, each = len(right), 1 - (1 - confidence) / 4
    won, lost = int((right & ~reference).sum()), int((reference & ~right).sum())
    low = [clopper_pearson_lower(count, n, confidence=each) for count in (won, lost)]
    high = [clopper_pearson_upper(count, n, confidence=each) for count in (won, lost)]
    return {
        "accuracy": float(reference.mean()),
        "gain": (won - lost) / n,
        "low": low[0] - high[1],
        "high": high[0] - low[1],
        "confidence": confidence,
    }


def _gain_by_unit(
    right: np.ndarray, reference: np.ndarray, units: np.ndarray, *, confidence: float
) -> dict[str, float]:
    """The gain for an example of a new unit: the mean over units of their mean gains, each end of the interval by betting."""
    outputs, each = Outputs(None, None, units=units), (1 + confidence) / 2
    gains = outputs.means_of_units(right.astype(float) - reference)
    return {
        "accuracy": float(outputs.means_of_units(reference.astype(float)).mean()),
        "gain": float(gains.mean()),
        "low": mean_lower(gains, -1.0, 1.0, confidence=each),
        "high": mean_upper(gains, -1.0, 1.0, confidence=each),
        "confidence": confidence,
    }
