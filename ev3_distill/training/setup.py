"""A course: all that training a network takes, checked and on the device. A task says what is trained on what."""

import contextlib
import ctypes
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill import config, students
from ev3_distill.arms import arms_named
from ev3_distill.data import augment
from ev3_distill.data.batches import held_out, sampler
from ev3_distill.data.pipeline import ResidentPipeline, Views, WindowPipeline
from ev3_distill.data.sources import Dataset
from ev3_distill.data.splits import split_rows
from ev3_distill.errors import InputError
from ev3_distill.guards import Guard
from ev3_distill.tasks.classification.steering import goal
from ev3_distill.tasks.classification.task import classification
from ev3_distill.tasks.metrics import steers
from ev3_distill.teachers.targets import BlankTargets, TeacherTargets, chunked
from ev3_distill.training.devices import ONE, Devices
from ev3_distill.training.iterate import UNLIMITED, Pipeline
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Batch, Network, Pools, Variables

WINDOW_SHARE = 128  # of the memory limit; three windows are in memory at once: trained on, made, and read ahead
WINDOW_STEPS = 256  # at most
M_MMAP_THRESHOLD, GIVEN_BACK = -3, 4 * 2**20  # of malloc.h; bytes
EVALUATED_SHARE = 512  # of the memory limit; a network's activations in one forward pass are many times its inputs
CHUNK = 2048  # test examples on the device at once, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is trained on what, all of it checked."""

    dataset: Dataset
    network: Network
    rows: dict[str, np.ndarray]  # positions by split
    augmentation: augment.Augmentation | None
    steps: int | None  # of the budget, unless it is a wall time
    memory: int  # bytes
    teacher_features: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict
    )  # those in use, of one example
    guards: Sequence[Guard] = ()
    control: Path | None = None  # the run that trained the same student by labels alone
    costs: np.ndarray | None = None  # [K, K], where a guard asks for them
    devices: Devices = ONE  # that share the work

    @property
    def labelled(self) -> bool:
        """Whether any example has a label."""
        return bool((self.dataset.labels >= 0).any())


def limit_of(memory: str) -> int:
    """The memory limit in bytes: the one named, or half of this machine's."""
    named = config.parse_bytes(memory)
    return named or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def give_back(memory: str) -> None:
    """Where a limit is named, freed memory goes back to the system at once; glibc would keep all blocks under 32 MB."""
    if memory and sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another libc
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, GIVEN_BACK)


def checked(
    chosen: config.Compress | config.Teach, name: str, dataset: Dataset, num_classes: int, devices: Devices = ONE
) -> Task:
    """The task of training the network of that name, once all that the data decide was checked."""
    network = students.from_name(name, dataset.inputs.shape[1:], num_classes)
    rows = split_rows(dataset.labels, dataset.test_rows, seed=chosen.seed, fractions=chosen.splits)
    steps = config.Budget.parse(chosen.budget).in_steps(len(rows["explore"]), chosen.ev3.batch_size)
    if steps is not None and steps >= UNLIMITED:
        raise InputError(f"a budget is below {UNLIMITED} steps; got '{chosen.budget}', {steps} steps: give less")
    augmentation = augment.parse(chosen.augment, dataset.inputs.shape[1:])
    return Task(dataset, network, rows, augmentation, steps, limit_of(chosen.memory), devices=devices)


@dataclasses.dataclass(frozen=True, eq=False)
class Course:
    """A task in the making: the network with its arms, and the data where training finds them."""

    distillation: Distillation
    pools: Pools
    arms: tuple[str, ...]  # names
    pipeline: Pipeline | None  # streams the explore split, if it is not in the pools


def course_of(
    chosen: Any,
    task: Task,
    arm_names: Sequence[str],
    targets: TeacherTargets,
    *,
    in_step: tuple[Network, Variables] | None = None,
    stops: float = 0.0,
) -> Course:
    """The course of a task under a teacher.

    Args:
      chosen: config.Compress or config.Teach.
      task: what is trained on what.
      arm_names: of the arms.
      targets: of the teacher.
      in_step: a JAX teacher that runs inside the training step.
      stops: share of the certificate's level at which decide must prove every goal for the run to end early; 0: never.
    """
    assess, decide = (_held(task, task.rows[name], targets, name) for name in ("assess", "decide"))
    seen = None
    if chosen.ev3.patience:
        among = np.random.default_rng(chosen.seed).permutation(task.rows["explore"])
        seen = _held(task, np.sort(among[: len(task.rows["assess"])]), targets, "explore")
    sample, supply, pools = _supplied(chosen, task, targets, Pools((), assess, decide, seen), in_step)
    names = task.dataset.class_names
    goals = [
        goal(guard.metric, guard.threshold, costs=task.costs, class_names=names)
        for guard in task.guards
        if steers(guard.metric)
    ]
    at_once = evaluated_at_once(task.dataset, task.memory, chosen.ev3.eval_batch_size)
    network = task.devices.network(task.network)
    distillation = Distillation(
        network,
        arms_named(
            network.apply,
            arm_names,
            network=network,
            teacher_features=task.teacher_features,
            mesh=task.devices.step_mesh,
        ),
        config=dataclasses.replace(chosen.ev3, eval_batch_size=at_once),
        sample=sample,
        objectives=classification().objectives(goals),
        stop_level=stops * (1 - chosen.confidence) / len(goals) if stops and goals else None,
        devices=task.devices,
    )
    return Course(distillation, task.devices.place(pools), tuple(arm_names), supply)


def _supplied(
    chosen: Any, task: Task, targets: TeacherTargets, pools: Pools, in_step: tuple[Network, Variables] | None
) -> tuple[Any, Pipeline | None, Pools]:
    """How batches are made, who brings the explore split, and the pools: with it where it is on the device as a whole."""
    dataset, size, index = task.dataset, chosen.ev3.batch_size, task.rows["explore"]
    views = Views(dataset.inputs, dataset.labels, index, task.augmentation)
    asked = not isinstance(targets, BlankTargets)  # what nobody is asked of needs no end of views
    count = 1 if task.augmentation is None else chosen.views if asked else UNLIMITED
    facts = {"batch_size": size, "seed": chosen.seed}
    apply = None if in_step is None else task.devices.network(in_step[0]).apply
    sample = sampler(batch_size=size, views=count, augmentation=task.augmentation, teacher=apply)
    teacher_of = targets.for_views(views, count)
    learnt = 4 * count * len(index) * sum(math.prod(shape) for shape in task.teacher_features.values())
    if in_step is not None and task.teacher_features:
        raise InputError(
            f"a teacher inside the step gives logits alone; got arms that ask for {', '.join(task.teacher_features)}: leave "
            "out --teacher-in-step, or those arms"
        )
    if not fits(dataset, task.memory, learnt):
        if in_step is not None:
            raise InputError(
                f"a teacher inside the step needs data that fit; {dataset.source} has {bytes_in(dataset)} bytes for a "
                f"memory limit of {task.memory}: raise --memory, or leave out --teacher-in-step"
            )
        steps = min(max(task.memory // WINDOW_SHARE // (size * bytes_of_example(dataset)), 1), WINDOW_STEPS)
        return sample, WindowPipeline(views, teacher_of, count=count, steps=steps, **facts), pools
    variables = () if in_step is None else in_step[1]
    supply = ResidentPipeline(views, teacher_of, count=count if asked else 1, teacher=variables, **facts)
    if task.augmentation is None:
        return sample, None, pools._replace(explore=supply.whole())
    return sample, supply, pools


def bytes_of_example(dataset: Dataset) -> int:
    """Of one input."""
    return math.prod(dataset.inputs.shape[1:]) * dataset.inputs.dtype.itemsize


def bytes_in(dataset: Dataset) -> int:
    """Of all its inputs."""
    return len(dataset.labels) * bytes_of_example(dataset)


def fits(dataset: Dataset, memory: int, learnt: int = 0) -> bool:
    """Whether a data set may be whole on the host and on the device, and leaves half of the limit to all else.

    Args:
      dataset: in memory or on disk.
      memory: the limit, bytes.
      learnt: bytes of the teacher's features on it.
    """
    return isinstance(dataset.inputs, np.ndarray) and bytes_in(dataset) + learnt <= share_of(memory)


def evaluated_at_once(dataset: Dataset, memory: int, most: int) -> int:
    """Examples of one forward pass in evaluation: `most`, or as many as the memory limit leaves room for, 8 at least."""
    return min(most, max(8, memory // EVALUATED_SHARE // (4 * math.prod(dataset.inputs.shape[1:]))))


def share_of(memory: int) -> int:
    """Bytes that a data set's inputs may have to be kept in memory."""
    return memory // 4


def _held(task: Task, rows: np.ndarray, targets: TeacherTargets, name: str) -> Batch:
    """Examples of a split, whole; without labels the teacher's choice stands in for them, and accuracy is agreement."""
    return _batch(task, rows, targets.unchanged(rows, f"teacher, {name} split"))


def test_of(task: Task, targets: TeacherTargets) -> Iterator[Batch]:
    """The sealed split, opened part by part."""
    rows = task.rows["test"]
    targets.unchanged(rows, "teacher, test split")
    for part in chunked(rows, evaluated_at_once(task.dataset, task.memory, CHUNK)):
        yield _batch(task, part, targets.unchanged(part))


def _batch(task: Task, rows: np.ndarray, teacher: Mapping[str, np.ndarray]) -> Batch:
    labels = task.dataset.labels[rows] if task.labelled else teacher["logits"].argmax(axis=1)
    groups = None if task.dataset.groups is None else task.dataset.groups[rows]
    return held_out(task.dataset.inputs[rows], labels, rows, teacher, groups)
