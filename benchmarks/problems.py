"""Learning problems of the suites: a data set and the logits of its teacher."""

from collections.abc import Callable

import numpy as np

from ev3_distill import students
from ev3_distill.arms import arms_named
from ev3_distill.benchmarks.datasets import NORMALIZED, cifar10_files, required_source
from ev3_distill.config import Fractions
from ev3_distill.data import batches
from ev3_distill.data.sources import Dataset, load_data
from ev3_distill.teachers import Teacher, load_teacher
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.training.trainer import Distillation

FRACTIONS = Fractions(most=10**9)  # no cap on the held-out splits: larger ones show smaller differences

TeacherLogits = Callable[[int], np.ndarray]  # seed -> logits [N, K]


def problem(name: str, teacher_steps: int) -> tuple[Dataset, TeacherLogits]:
    """A data set and its teacher's logits.

    Args:
      name: digits, mnist or cifar10.
      teacher_steps: training steps of a teacher that learns from labels alone; CIFAR-10 has the pretrained one.

    Raises:
      InputError: the data are missing.
    """
    if name == "cifar10":
        dataset, teacher = pretrained()
        logits = teacher.outputs(np.asarray(dataset.inputs))["logits"]
        return dataset, lambda seed: logits
    dataset = load_data(required_source(name))
    return dataset, trained_teacher(dataset, teacher_steps)


def pretrained() -> tuple[Dataset, Teacher]:
    """The CIFAR-10 images and the pretrained ResNet-56."""
    archive, onnx = cifar10_files()
    dataset = load_data(f"folder:{archive}")
    return dataset, load_teacher(
        f"onnx:{onnx}",
        preprocessing=NORMALIZED,
        input_shape=dataset.inputs.shape[1:],
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
    )


def trained_teacher(dataset: Dataset, steps: int) -> TeacherLogits:
    """The logits of an MLP that labels alone train on a seed's explore split."""
    blank = np.zeros((len(dataset.labels), dataset.num_classes), np.float32)
    network = students.from_name("mlp:hidden=256-256", dataset.inputs.shape[1:], dataset.num_classes)
    distillation = Distillation(network, arms_named(network.apply, ("ce-slow",)))

    def logits(seed: int) -> np.ndarray:
        pools, _ = batches.split(dataset, blank, seed=seed, fractions=FRACTIONS)
        return forward(network, distillation.complete(pools, seed, budget=steps).current.variables)(
            np.asarray(dataset.inputs)
        )

    return logits
