"""Setup of a run: what is trained on what, checked, and built on the device."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill import students
from ev3_distill.arms import arms_named
from ev3_distill.config import Budget, Compress, RunConfig
from ev3_distill.core import Ending
from ev3_distill.data import augment, input_statistics, splits_of, units_of
from ev3_distill.data.batches import held_out, rows_of_final, sampler
from ev3_distill.data.pipeline import ResidentPipeline, Source, Views, WindowPipeline
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError
from ev3_distill.guards import Guard
from ev3_distill.tasks.base import Task, has_target
from ev3_distill.tasks.classification.task import classification
from ev3_distill.tasks.metrics import MetricQuery, find_metric, resolve
from ev3_distill.teachers.targets import BlankTargets, TeacherTargets, chunked
from ev3_distill.training.devices import ONE, Devices
from ev3_distill.training.iterate import UNLIMITED, Pipeline
from ev3_distill.training.memory import eval_batch_size, fits, input_bytes, memory_limit, window_steps
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Batch, Goal, Network, Pools, PyTree, Sample, Variables

CHUNK = 2048  # largest number of test examples on the device at once


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingSetup:
    """What is trained on what, all of it checked.

    Attributes:
      task: what the network's outputs mean.
      dataset: examples on the host.
      network: to train.
      rows: positions in the data set by split.
      augmentation: of training images; None for none.
      steps: the budget, unless it is a wall time.
      memory: limit, bytes.
      teacher_features: shapes of the teacher's features in use, by name, for one example.
      guards: requirements on the student.
      control: directory of the run that trained the same student on labels alone.
      costs: [K, K] of predictions, if a guard needs them.
      devices: of the run.
      copies: numbers of examples that occur in several splits, for the report.
      units: [N] the independent unit of each example, such as a patient; None where each example is one.
    """

    task: Task
    dataset: Dataset
    network: Network
    rows: dict[str, np.ndarray]
    augmentation: augment.Augmentation | None
    steps: int | None
    memory: int
    teacher_features: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    guards: Sequence[Guard] = ()
    control: Path | None = None
    costs: np.ndarray | None = None
    devices: Devices = ONE
    units: np.ndarray | None = None
    copies: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def targets(self) -> PyTree:
        """Targets of all examples, leaves [N, ...]."""
        return self.dataset.labels

    @property
    def labeled(self) -> bool:
        """Whether any example has a target."""
        return bool(has_target(self.targets).any())

    @property
    def class_names(self) -> list[str]:
        """Names of the network's classes, or their numbers; empty for a task without classes."""
        number = self.network.spec.get("num_classes", self.dataset.num_classes)
        return list(self.dataset.class_names or map(str, range(number)))


def make_setup(
    config: RunConfig, network: Network, dataset: Dataset, task: Task, devices: Devices = ONE
) -> TrainingSetup:
    """The setup of a run that trains a network, once everything that depends on the data is checked.

    Raises:
      InputError: the splits, the budget or the augmentation do not fit the data.
    """
    rows = splits_of(config, dataset, task.strata(dataset.labels))
    steps = Budget.parse(config.budget).in_steps(len(rows["explore"]), config.ev3.batch_size)
    if steps is not None and steps >= UNLIMITED:
        raise InputError(f"a budget must be below {UNLIMITED} steps; got '{config.budget}', {steps} steps: give less")
    augmentation = augment.parse(config.augment, dataset.inputs.shape[1:])
    memory, units = memory_limit(config.memory), units_of(config, dataset)
    return TrainingSetup(task, dataset, network, rows, augmentation, steps, memory, devices=devices, units=units)


def classification_setup(
    config: RunConfig, name: str, dataset: Dataset, num_classes: int, devices: Devices = ONE
) -> TrainingSetup:
    """The setup of a run that trains the student of that name to classify, with standardized inputs if configured."""
    network = students.from_name(name, dataset.inputs.shape[1:], num_classes)
    setup = make_setup(config, network, dataset, classification(num_classes), devices)
    statistics = input_statistics(dataset.inputs, setup.rows["explore"]) if config.standardize else None
    if dataset.offset is not None:  # a student says of which inputs it is
        statistics = {**(statistics or {"mean": [0.0], "scale": [1.0]}), "offset": dataset.offset.tolist()}
    return dataclasses.replace(setup, network=students.standardized(network, statistics))


class InStepTeacher(NamedTuple):
    """A JAX teacher that runs inside the training step."""

    network: Network
    variables: Variables


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRun:
    """A setup that is built: the network with its arms, and the data where training reads them."""

    distillation: Distillation
    pools: Pools
    arms: tuple[str, ...]  # names
    pipeline: Pipeline | None  # streams the explore split, if it is not in the pools


def make_run(
    config: RunConfig,
    setup: TrainingSetup,
    arm_names: Sequence[str],
    targets: TeacherTargets,
    *,
    in_step: InStepTeacher | None = None,
    stop_share: float = 0.0,
    continues: bool = False,
) -> TrainingRun:
    """Builds the run of a setup.

    Args:
      config: of the run.
      setup: what is trained on what.
      arm_names: names of the arms.
      targets: of the teacher.
      in_step: a JAX teacher that runs inside the training step.
      stop_share: fraction of the certificate's level at which decide must prove every goal for the run to end early; 0: never.
      continues: whether further runs use what this one leaves of its error budget; then it has no final phase.
    """
    has_final = not continues and _wants_final(config, setup)
    assess, decide = (_split(setup, setup.rows[name], targets, name) for name in ("assess", "decide"))
    seen = None
    if config.ev3.patience:
        rows = setup.rows["explore"]
        rows = rows[has_target(setup.dataset.labels[rows])] if setup.labeled else rows
        among = np.random.default_rng(config.seed).permutation(rows)
        seen = _split(setup, np.sort(among[: len(setup.rows["assess"])]), targets, "explore")
    sample, pipeline = _make_pipeline(config, setup, targets, in_step, has_final=has_final)
    explore: Any = ()
    stream: Pipeline | None = pipeline
    if isinstance(pipeline, ResidentPipeline) and setup.augmentation is None:
        explore, stream = pipeline.whole(), None
    pools = Pools(explore, assess, decide, seen)
    goals, network = _goals(setup), setup.devices.network(setup.network)
    arms = arms_named(
        network.apply,
        arm_names,
        network=network,
        teacher_features=setup.teacher_features,
        mesh=setup.devices.step_mesh,
        losses=setup.task.losses,
    )
    batch_size = eval_batch_size(setup.dataset, setup.memory, config.ev3.eval_batch_size)
    distillation = Distillation(
        network,
        arms,
        config=dataclasses.replace(config.ev3, eval_batch_size=batch_size),
        sample=sample,
        objectives=setup.task.objectives(goals),
        ending=Ending(
            stop_share * (1 - config.confidence) / len(goals) if stop_share and goals else None, continues, has_final
        ),
        devices=setup.devices,
    )
    return TrainingRun(distillation, setup.devices.place(pools), tuple(arm_names), stream)


def _wants_final(config: RunConfig, setup: TrainingSetup) -> bool:
    """Whether a run ends with a phase that trains on assess and decide, too.

    Guards, a control and the champion are compared on decide at the end of a run, and a patience on assess to its end.
    """
    compares = bool(setup.guards) or setup.control is not None or config.ev3.patience > 0
    return config.ev3.final > 0 and not compares and not (isinstance(config, Compress) and config.deliver == "champion")


def _goals(setup: TrainingSetup) -> list[Goal]:
    """The goals of the guards that training can steer toward."""
    goals = []
    for guard in setup.guards:
        query = find_metric(guard.metric, setup.task.metrics)
        if query is not None and query.row.steering is not None:
            make_goal = resolve(query.row.steering)
            query = MetricQuery(query.row, query.name, query.argument, setup.costs, setup.dataset.class_names)
            goals.append(make_goal(query, guard.threshold))
    return goals


def _make_pipeline(
    config: RunConfig,
    setup: TrainingSetup,
    targets: TeacherTargets,
    in_step: InStepTeacher | None,
    *,
    has_final: bool,
) -> tuple[Sample, ResidentPipeline | WindowPipeline]:
    """The function that makes batches, and the pipeline that brings the explore split.

    Raises:
      InputError: a teacher inside the training step cannot serve these arms or data.
    """
    dataset, size, index = setup.dataset, config.ev3.batch_size, setup.rows["explore"]
    views = Views(dataset.inputs, setup.targets, index, setup.augmentation)
    count = _count_views(config, setup, targets)
    all_rows = rows_of_final(setup.rows) if has_final else index
    teacher_bytes = 4 * count * len(all_rows) * sum(math.prod(shape) for shape in setup.teacher_features.values())
    if in_step is not None and setup.teacher_features:
        raise InputError(
            "a teacher inside the training step gives logits alone; got arms that need "
            f"{', '.join(setup.teacher_features)}: omit --teacher-in-step, or those arms"
        )
    resident = fits(dataset, setup.memory, teacher_bytes)
    if in_step is not None and not resident:
        raise InputError(
            f"a teacher inside the training step needs data that fit in memory; {dataset.source} has "
            f"{input_bytes(dataset)} bytes for a memory limit of {setup.memory}: raise --memory, or omit --teacher-in-step"
        )
    apply = None if in_step is None else setup.devices.network(in_step.network).apply
    sample = sampler(batch_size=size, views=count, augmentation=setup.augmentation, teacher=apply)
    teacher_of, facts = targets.for_views(views, count), {"batch_size": size, "seed": config.seed}
    final = None
    if has_final:
        of_all = Views(dataset.inputs, setup.targets, all_rows, setup.augmentation)
        final = Source(of_all, targets.for_views(of_all, count))
    if not resident:
        steps = window_steps(dataset, setup.memory, size)
        return sample, WindowPipeline(views, teacher_of, count=count, steps=steps, final=final, **facts)
    cached = 1 if isinstance(targets, BlankTargets) else count
    variables = () if in_step is None else in_step.variables
    return sample, ResidentPipeline(views, teacher_of, count=cached, teacher=variables, final=final, **facts)


def _count_views(config: RunConfig, setup: TrainingSetup, targets: TeacherTargets) -> int:
    """The number of augmented views; without a teacher that would have to run on them, new ones without end."""
    if setup.augmentation is None:
        return 1
    if isinstance(targets, BlankTargets) or not isinstance(config, Compress):
        return UNLIMITED
    return config.views


def _split(setup: TrainingSetup, rows: np.ndarray, targets: TeacherTargets, name: str) -> Batch:
    """A whole split, or a part of one."""
    return _batch(setup, rows, targets.unchanged(rows, f"teacher, {name} split"), within=rows)


def sealed_batches(setup: TrainingSetup, targets: TeacherTargets) -> Iterator[Batch]:
    """The sealed test split in parts."""
    rows = setup.rows["test"]
    targets.unchanged(rows, "teacher, test split")
    for part in chunked(rows, eval_batch_size(setup.dataset, setup.memory, CHUNK)):
        yield _batch(setup, part, targets.unchanged(part), within=rows)


def _batch(setup: TrainingSetup, rows: np.ndarray, teacher: Mapping[str, np.ndarray], *, within: np.ndarray) -> Batch:
    """Examples as a batch; in data without targets, the teacher's answers stand in for them.

    Args:
      setup: of the run.
      rows: of the batch.
      teacher: its outputs.
      within: rows of the whole split, whose units are numbered from 0.
    """
    own: Any = setup.dataset.labels[rows] if setup.labeled else setup.task.targets_from_teacher(teacher)
    groups = None if setup.dataset.groups is None else setup.dataset.groups[rows]
    units = None if setup.units is None else np.searchsorted(np.unique(setup.units[within]), setup.units[rows])
    groups = groups if units is None else None
    return held_out(setup.dataset.inputs[rows], own, rows, teacher, groups, units=units)
