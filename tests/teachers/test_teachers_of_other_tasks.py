"""Teachers of a task without classes: their main output has the name and the shape that the task declares."""

import dataclasses
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.tasks.classification.task import classification
from ev3_distill.teachers import load_teacher

VALUES = dataclasses.replace(
    classification(0), name="regression", teacher_spec={"values": jax.ShapeDtypeStruct((2,), np.float32)}
)
INPUTS = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def teacher(monkeypatch):
    """Loads functions from inputs to outputs as a teacher of two real values."""

    def load(*functions, kind="", task=VALUES, **options):
        named = {f"f{i}": function for i, function in enumerate(functions)}
        monkeypatch.setitem(sys.modules, "values_by_hand", SimpleNamespace(__file__="values_by_hand.py", **named))
        source = kind + ",".join(f"python:values_by_hand:{name}" for name in named)
        shape = {"input_shape": (3,), "num_classes": 0, "class_names": ()}
        return load_teacher(source, preprocessing=Preprocessing(**options), task=task, **shape)

    monkeypatch.setattr("ev3_distill.teachers.kinds.python._source_file", lambda place: None)
    return load


def first_two(inputs):
    return inputs[:, :2]


def test_main_output_has_the_name_of_the_task(teacher):
    loaded = teacher(first_two)
    outputs = loaded.outputs(INPUTS)
    assert list(outputs) == ["values"] and outputs["values"].dtype == np.float32
    np.testing.assert_array_equal(outputs["values"], INPUTS[:, :2])
    assert (loaded.num_classes, loaded.class_names, loaded.output_names) == (None, None, None)


def test_the_same_function_classifies_by_default(teacher):
    loaded = teacher(first_two, task=None)
    np.testing.assert_array_equal(loaded.outputs(INPUTS)["logits"], INPUTS[:, :2])


@pytest.mark.parametrize("function", [lambda x: x[:, 0], lambda x: x, lambda x: x[:, :2, None], lambda x: x[:2, :2]])
def test_other_shapes_are_refused(teacher, function):
    with pytest.raises(InputError, match=r"a teacher's values must be numbers \[B, 2\]; python:.* gives float32"):
        teacher(function).outputs(INPUTS)


def test_values_must_be_finite(teacher):
    with pytest.raises(InputError, match=r"a teacher's values must be finite.* for example 1 of a batch"):
        teacher(lambda x: np.where(x[:, :2] == 3, np.nan, x[:, :2])).outputs(INPUTS)


def test_class_names_are_refused(teacher):
    with pytest.raises(InputError, match="only the outputs of a classification have class names"):
        teacher(first_two, classes=("a", "b"))


def test_ensembles_average_values_and_not_probabilities(teacher):
    outputs = teacher(first_two, lambda x: 3 * x[:, :2], kind="ensemble:").outputs(INPUTS)
    np.testing.assert_array_equal(outputs["values"], 2 * INPUTS[:, :2])
    with pytest.raises(InputError, match="only classes have probabilities to average"):
        teacher(first_two, first_two, kind="ensemble-prob:")
