"""Training: a network on a data set under a teacher, from its newest checkpoint if there is one, to certificate and report."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill import config, students
from ev3_distill.certify.bounds import clopper_pearson_lower, clopper_pearson_upper
from ev3_distill.data.splits import SPLITS
from ev3_distill.errors import warn
from ev3_distill.monitor import report
from ev3_distill.runtime.progress import RunProgress
from ev3_distill.students import count_params
from ev3_distill.tasks.classification.task import classification
from ev3_distill.teachers.targets import TeacherTargets
from ev3_distill.training import run_dir
from ev3_distill.training.certify_run import CertificateRequest, certify_run, metrics_to_claim
from ev3_distill.training.iterate import UNLIMITED
from ev3_distill.training.setup import Course, Task, course_of, evaluated_at_once, test_of
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Batch, Network, State, Variables


@dataclasses.dataclass(frozen=True, eq=False)
class Final:
    """What a run delivers, and how it came to it."""

    network: Network
    variables: Variables
    which: str  # of the students that it had: champion, current, ...
    state: State  # the run's last
    arms: Sequence[str]
    compile_s: float
    name: str = ""  # of the network, where it is not the one that was asked for
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # more of them for the report


def train(
    directory: Path,
    chosen: Any,
    task: Task,
    arm_names: Sequence[str],
    targets: TeacherTargets,
    *,
    teacher: dict[str, Any] | None,
    in_step: tuple[Network, Variables] | None = None,
) -> dict[str, Any]:
    """The run itself: iterate, deliver, certify, report; returns the content of report.json.

    Args:
      directory: of the run, held by this process.
      chosen: config.Compress or config.Teach.
      task: what is trained on what.
      arm_names: of the arms.
      targets: of the teacher.
      teacher: facts for the report; None where labels alone teach.
      in_step: a JAX teacher that runs inside the training step.
    """
    stops = float(getattr(chosen, "stop_when_met", False))
    course = course_of(chosen, task, arm_names, targets, in_step=in_step, stops=stops)
    distillation, seconds = course.distillation, config.Budget.parse(chosen.budget).seconds
    title = "teacher" if teacher is None else "student"
    with RunProgress(title, steps=task.steps, seconds=seconds) as progress:
        state = iterated(directory, chosen, course, targets, progress, budget=task.steps, seconds=seconds)
    which, distilled = distillation.evaluator.select(course.pools, state, getattr(chosen, "deliver", "best"))
    final = Final(task.network, distilled, which, state, course.arms, distillation.compile_s)
    if task.control is None:
        return concluded(directory, chosen, task, final, targets, teacher=teacher)
    control = students.load(task.control, factory=students.import_factory(chosen.student))[1]
    if distillation.evaluator.outranks(course.pools, control, distilled):
        final = dataclasses.replace(final, variables=control, which="control")
    helped = functools.partial(_helped, distillation, distilled, control, confidence=chosen.confidence)
    return concluded(directory, chosen, task, final, targets, teacher=teacher, helped=helped)


def iterated(
    directory: Path,
    chosen: Any,
    course: Course,
    targets: TeacherTargets,
    progress: RunProgress,
    *,
    budget: int | None,
    seconds: float | None = None,
    start: Callable[[], State] | None = None,
    pause: int = UNLIMITED,
    about: Mapping[str, Any] | None = None,
) -> State:
    """The state at the end of a course, or where it pauses; see `run.iterate`."""
    targets.pause_display = progress.paused
    state = run_dir.iterate(
        directory,
        course.distillation,
        course.pools,
        course.arms,
        pipeline=course.pipeline,
        seed=chosen.seed,
        budget=budget,
        seconds=seconds,
        checkpoint_s=chosen.checkpoint_s,
        tell=progress.row,
        warn=warn,
        start=start,
        pause=pause,
        about=about,
    )
    targets.pause_display = contextlib.nullcontext
    return state


def concluded(
    directory: Path,
    chosen: Any,
    task: Task,
    final: Final,
    targets: TeacherTargets,
    *,
    teacher: dict[str, Any] | None,
    helped: Callable[[Iterator[Batch]], dict[str, float]] | None = None,
    surer: Final | None = None,
) -> dict[str, Any]:
    """Saves the final student, certifies it from the sealed split and reports; returns the content of report.json.

    Where that split does not prove the guards of it, and there is a surer one, that one is delivered.
    """
    dataset, finals = task.dataset, [final, *([surer] if surer else [])]
    students.save(directory / "student", final.network, final.variables)
    classes = list(dataset.class_names or map(str, range(task.network.spec["num_classes"])))
    meaning = classification(len(classes))
    metrics = metrics_to_claim(task.guards, labeled=task.labelled, teacher=teacher is not None, metrics=meaning.metrics)
    which, certificate, guards, of_teacher = certify_run(
        directory,
        [(one.network, one.variables) for one in finals],
        dataset,
        test=functools.partial(test_of, task, targets),
        request=CertificateRequest(meaning, metrics, chosen.confidence, classes, dataset.group_names, task.costs),
        guards=task.guards,
        teacher=teacher is not None,
        batch_size=evaluated_at_once(dataset, task.memory, chosen.ev3.eval_batch_size),
    )
    if which:
        final = finals[which]
        students.save(directory / "student", final.network, final.variables)
    points = {claim.metric: claim.point for claim in certificate.claims}
    facts = {
        "teacher": {"source": "labels", "params": None, "accuracy": None}
        if teacher is None
        else {**teacher, "accuracy": of_teacher},
        "student": {
            "network": final.name or (chosen.network if teacher is None else chosen.student),
            "params": count_params(final.variables),
            "deploy": final.network.spec.get("deploy", "float32"),
            "accuracy": points.get("accuracy"),
            "agreement": points.get("agreement"),
            "delivered": final.which,
        },
        "certificate": certificate.as_dict(),
        "control": helped(test_of(task, targets)) if helped else None,
        "guards": guards,
        "devices": str(task.devices),
        "seed": chosen.seed,
        "budget": chosen.budget,
        "splits": {name: len(task.rows[name]) for name in SPLITS},
        "data": {
            "source": dataset.source,
            "fingerprint": dataset.fingerprint,
            "classes": classes,
            "input_shape": list(dataset.inputs.shape[1:]),
            "dtype": dataset.inputs.dtype.name,
            "augmentation": "none" if task.augmentation is None else task.augmentation.describe(),
        },
        "command": f"ev3-distill {'teach' if teacher is None else 'compress'} --config config.toml",
        **final.facts,
    }
    content = run_dir.report_of(
        directory, final.state, final.arms, compile_s=final.compile_s, config=chosen.ev3, facts=facts
    )
    run_dir.write_json(directory / "report.json", content)
    report.write_html(directory)
    return content


def _helped(
    distillation: Distillation, student: Variables, control: Variables, test: Iterator[Batch], *, confidence: float
) -> dict[str, float]:
    """By how much a student's accuracy is above its control's, paired, with a two-sided interval.

    The gain is P(student right, control wrong) - P(student wrong, control right); each end of the interval takes the
    Clopper-Pearson bounds of the two shares, every one of the four at a quarter of 1 - confidence.
    """
    ours, theirs = [], []
    for part in test:
        ours.append(np.asarray(distillation.evaluator.evaluate(student, part).promise) > 0)
        theirs.append(np.asarray(distillation.evaluator.evaluate(control, part).promise) > 0)
    right, reference = np.concatenate(ours), np.concatenate(theirs)
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
