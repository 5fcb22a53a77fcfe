"""Class order: matches the outputs of a teacher to the classes of the data, by name where both have names."""

from collections.abc import Sequence

import numpy as np

from ev3_distill.errors import InputError

LISTED_NAMES = 10  # most class names that an error lists


def class_columns(
    user_names: Sequence[str],
    model_names: Sequence[str] | None,
    data_names: Sequence[str],
    num_classes: int,
    num_outputs: int | None,
    *,
    source: str,
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Finds the output of a teacher that belongs to each class of the data.

    A teacher may know more classes than the data have. Its other outputs are dropped, so the softmax over the rest is its
    belief given that the class is one of the data's. A teacher may not know fewer classes. If the model's own names are just
    0 to R-1 and differ from the data's names, they count as labels: output i is then class i of the data.

    Args:
      user_names: names of the outputs from the options or the file beside the teacher; empty if there are none.
      model_names: names stored in the model itself.
      data_names: class names of the data; empty if there are none.
      num_classes: classes of the data, K; 0 if unknown.
      num_outputs: outputs of the model, R; None if unknown.
      source: the teacher, for errors.

    Returns:
      Indices of the outputs in the order of the data's classes [K], or None if no reordering is needed; and the names of the
      R outputs, or None.

    Raises:
      InputError: a class of the data is missing, or the numbers of names, outputs and classes differ.
    """
    names = tuple(user_names or model_names or ())
    if not user_names and set(data_names) != set(names) and list(names) == [str(i) for i in range(len(names))]:
        names = ()
    if names and num_outputs is not None and len(names) != num_outputs:
        raise InputError(
            f"each output of a teacher needs one class name; {source} has {num_outputs} outputs and {len(names)} names: "
            "give all names, in order"
        )
    if not names:
        _check_count(num_outputs, num_classes, source)
        return None, None
    if not data_names:
        return None, names
    if missing := [name for name in data_names if name not in names]:
        raise InputError(
            f"a teacher must know every class of the data; {source} knows {_shortened(names)} and lacks "
            f"{_shortened(missing)}: name its outputs as the data spell their classes with --teacher-input.classes, or use "
            "another teacher"
        )
    columns = np.array([names.index(name) for name in data_names])
    return (None if columns.tolist() == list(range(len(names))) else columns), names


def _check_count(num_outputs: int | None, num_classes: int, source: str) -> None:
    if num_outputs is not None and num_classes and num_outputs != num_classes:
        raise InputError(
            f"a teacher has one output per class of the data, {num_classes}; {source} has {num_outputs}: if it knows more "
            "classes, name its outputs in order with --teacher-input.classes; otherwise use another teacher"
        )


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more
