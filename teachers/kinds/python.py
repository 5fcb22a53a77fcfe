"""`python:MODULE:FUNCTION`: any callable from a NumPy batch to logits, such as LightGBM, a web client or another framework."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.runtime.user_code import load_callable
from ev3_distill.teachers.loading import digest_of
from ev3_distill.teachers.preprocessing import IDENTITY, read_preprocessing_file
from ev3_distill.teachers.teacher import Model, Outputs, Request, Teacher, build_teacher


def python_teacher(place: str, request: Request) -> Teacher:
    """Loads a function of the user.

    It gets preprocessed inputs, float32 [B, ...], or float64 of data with an offset, with a B that may differ between calls. It
    returns logits [B, R], or a dictionary of `logits` and features [B, ...]. The digest covers the source file of the
    module and the name of the function. It cannot cover what the code reads or imports, such as weights, other modules or a
    server: if these change, rename the function or edit its file.

    Args:
      place: MODULE:FUNCTION; the module is importable or in the working directory.
      request: the data it will run on.

    Raises:
      InputError: it cannot be imported or does not fit the data.
    """
    function = _function(place)
    file = _source_file(place)
    model = Model(
        run=lambda ready: _outputs(function(ready)),
        digest=digest_of(["python", place, b"" if file is None else file.read_bytes()]),
        file_preprocessing=IDENTITY if file is None else read_preprocessing_file(file),
    )
    return build_teacher(model, request)


def _function(place: str) -> Callable[[np.ndarray], Any]:
    module, _, name = place.partition(":")
    if not module or not name:
        raise InputError(
            f"a python teacher is python:MODULE:FUNCTION; got 'python:{place}': name both a module and a function"
        )
    return load_callable(place, rule="a python teacher is an importable MODULE:FUNCTION")


def _source_file(place: str) -> Path | None:
    module = sys.modules[place.partition(":")[0]]
    try:
        return Path(inspect.getfile(module))
    except TypeError:  # a built-in module has no file
        return None


def _outputs(returned: Any) -> Outputs:
    if not isinstance(returned, dict):
        return {"logits": returned}
    if "logits" not in returned:
        raise ValueError(f"the dictionary lacks 'logits'; it has {', '.join(map(str, returned)) or 'nothing'}")
    return {str(name): value for name, value in returned.items()}
