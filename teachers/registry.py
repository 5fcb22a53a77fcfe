"""Teachers: one file per kind. What distillation needs of them are logits [N, K] on every example of a data set.

`logits:FILE.npz`, a teacher that has run already, is no member of the zoo: see `teachers.recorded`.
"""

from collections.abc import Callable, Sequence

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.teachers.kinds.ensemble import mean_of_logits, mean_of_probabilities
from ev3_distill.teachers.kinds.flax import saved_teacher
from ev3_distill.teachers.kinds.onnx import onnx_teacher
from ev3_distill.teachers.kinds.python import python_teacher
from ev3_distill.teachers.kinds.recorded import load_logits, save_logits
from ev3_distill.teachers.kinds.sklearn import sklearn_teacher
from ev3_distill.teachers.kinds.torch import torch_teacher
from ev3_distill.teachers.preprocessing import IDENTITY
from ev3_distill.teachers.teacher import BatchError, Request, Teacher
from ev3_distill.types import Network, Variables

__all__ = ["KINDS", "BatchError", "Teacher", "load_logits", "load_teacher", "save_logits"]

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
    networks: Callable[[str], tuple[Network, Variables]] | None = None,
) -> Teacher:
    """The teacher that a user names, fitted to data.

    Args:
      text: KIND:PLACE, see `KINDS`.
      preprocessing: the user's options; they win over the file beside the teacher, field by field.
      input_shape: of one example of the data, channels last.
      num_classes: of the data, 0 where they have none.
      class_names: of the data, empty where they have none; the teacher's logits come in this order where it has names too.
      networks: reads the directory of a flax: teacher, as `students.load` does.

    Raises:
      InputError: no such kind, or the teacher cannot be loaded or does not fit the data.
    """
    kind, _, place = text.partition(":")
    if kind not in KINDS or not place:
        raise InputError(
            f"a teacher is KIND:PLACE with a KIND of {', '.join(KINDS)} or logits; got '{text}': for example "
            "onnx:model.onnx, torch:model.pt2, flax:runs/teacher, python:my_module:logits, sklearn:model.skops, "
            "ensemble:onnx:a.onnx,onnx:b.onnx or logits:logits.npz"
        )

    def load(source: str) -> Teacher:
        return load_teacher(
            source,
            preprocessing=preprocessing,
            input_shape=input_shape,
            num_classes=num_classes,
            class_names=class_names,
            networks=networks,
        )

    names = tuple(class_names)
    request = Request(text, preprocessing, tuple(input_shape), num_classes, names, networks, load, (*KINDS, "logits"))
    return KINDS[kind](place, request)
