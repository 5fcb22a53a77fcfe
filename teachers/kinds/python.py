"""`python:MODULE:FUNCTION`, any callable from a NumPy batch to logits: LightGBM, a web client, a model of another framework."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.runtime.user_code import load_callable
from ev3_distill.teachers.loading import digest_of
from ev3_distill.teachers.preprocessing import IDENTITY, read_beside
from ev3_distill.teachers.teacher import Model, Outputs, Request, Teacher, teacher_of


def python_teacher(place: str, request: Request) -> Teacher:
    """A function of the user's own as a teacher.

    It is called with prepared inputs, float32 [B, ...], of which B may differ from call to call, and returns logits [B, R],
    or a dictionary of `logits` and features [B, ...]. Its digest covers the source file of its module and its names. It
    cannot cover what that code reads or imports (weights, other modules, a server): rename the function or touch its file
    where those change.

    Args:
      place: MODULE:FUNCTION, the module importable or in the working directory.
      request: what it is for.

    Raises:
      InputError: it cannot be imported or does not fit the data.
    """
    function = _function(place)
    file = _file_of(function, place)
    model = Model(
        run=lambda ready: _outputs(function(ready)),
        digest=digest_of(["python", place, b"" if file is None else file.read_bytes()]),
        beside=IDENTITY if file is None else read_beside(file),
    )
    return teacher_of(model, request)


def _function(place: str) -> Callable[[np.ndarray], Any]:
    module, _, name = place.partition(":")
    if not module or not name:
        raise InputError(f"a python teacher is python:MODULE:FUNCTION; got 'python:{place}': name both")
    return load_callable(place, rule="a python teacher is an importable MODULE:FUNCTION")


def _file_of(function: Any, place: str) -> Path | None:
    module = sys.modules[place.partition(":")[0]]
    try:
        return Path(inspect.getfile(module))
    except TypeError:  # a built-in module has none
        return None


def _outputs(returned: Any) -> Outputs:
    if not isinstance(returned, dict):
        return {"logits": returned}
    if "logits" not in returned:
        raise ValueError(f"a dictionary without 'logits': it has {', '.join(map(str, returned)) or 'nothing'}")
    return {str(name): value for name, value in returned.items()}
