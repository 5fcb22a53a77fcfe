"""Registry of teacher kinds.

`logits:FILE.npz`, recorded logits, is not in it, because it runs no model: see `kinds/recorded.py`.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.tasks.base import Task
from ev3_distill.teachers.kinds.ensemble import mean_of_logits, mean_of_probabilities
from ev3_distill.teachers.kinds.flax import saved_teacher
from ev3_distill.teachers.kinds.onnx import onnx_teacher
from ev3_distill.teachers.kinds.python import python_teacher
from ev3_distill.teachers.kinds.recorded import load_logits, recorded_teacher, save_logits
from ev3_distill.teachers.kinds.sklearn import sklearn_teacher
from ev3_distill.teachers.kinds.torch import torch_teacher
from ev3_distill.teachers.preprocessing import IDENTITY
from ev3_distill.teachers.teacher import BatchError, Request, Teacher
from ev3_distill.types import Network, Variables

__all__ = ["KINDS", "BatchError", "Teacher", "load_logits", "load_recorded", "load_teacher", "save_logits"]

KINDS: dict[str, Callable[[str, Request], Teacher]] = {
    "onnx": onnx_teacher,
    "torch": torch_teacher,
    "flax": saved_teacher,
    "python": python_teacher,
    "sklearn": sklearn_teacher,
    "ensemble": mean_of_logits,
    "ensemble-prob": mean_of_probabilities,
}


def load_teacher(
    text: str,
    *,
    preprocessing: Preprocessing = IDENTITY,
    input_shape: Sequence[int],
    num_classes: int,
    class_names: Sequence[str],
    load_network: Callable[[str], tuple[Network, Variables]] | None = None,
    task: Task | None = None,
    offset: np.ndarray | None = None,
) -> Teacher:
    """Loads a teacher and fits it to the data: preprocessing, layout and class order.

    Args:
      text: KIND:PLACE, see `KINDS`.
      preprocessing: options of the user; each wins over the same field of the file beside the teacher.
      input_shape: shape of one example of the data, channels last.
      num_classes: classes of the data; 0 if unknown.
      class_names: class names of the data, empty if there are none. If the teacher has names too, its logits come in this
        order.
      load_network: reads the directory of a `flax:` teacher, such as `students.load`.
      task: what the teacher's outputs mean. The main output gets the name of the task's first teacher output and must have
        its shape. None: classification.
      offset: what was subtracted from the columns of the data [F]; it is added again, in float64.

    Raises:
      InputError: the kind is unknown, or the teacher cannot be loaded or does not fit the data.
    """
    kind, _, place = text.partition(":")
    if kind not in KINDS or not place:
        raise InputError(
            f"a teacher is KIND:PLACE with a KIND of {', '.join(KINDS)} or logits; got '{text}': for example "
            "onnx:model.onnx, torch:model.pt2, flax:runs/teacher, python:my_module:logits, sklearn:model.skops, "
            "ensemble:onnx:a.onnx,onnx:b.onnx or logits:logits.npz"
        )

    load_member = functools.partial(
        load_teacher,
        preprocessing=preprocessing,
        input_shape=input_shape,
        num_classes=num_classes,
        class_names=class_names,
        load_network=load_network,
        task=task,
        offset=offset,
    )
    request = Request(
        source=text,
        options=preprocessing,
        input_shape=tuple(input_shape),
        num_classes=num_classes,
        class_names=tuple(class_names),
        load_network=load_network,
        load_member=load_member,
        kinds=(*KINDS, "logits"),
        task=task,
        offset=offset,
    )
    return KINDS[kind](place, request)


def load_recorded(
    logits: np.ndarray,
    source: str,
    *,
    preprocessing: Preprocessing = IDENTITY,
    num_classes: int,
    class_names: Sequence[str],
) -> Teacher:
    """Fits recorded outputs [N, R] to the data, as a teacher whose inputs are their rows; otherwise as `load_teacher`."""
    request = Request(source, preprocessing, logits.shape[1:], num_classes, tuple(class_names))
    return recorded_teacher(logits, request)
