"""The order of a teacher's classes: by name where both sides have names, else as it is."""

from collections.abc import Sequence

import numpy as np

from ev3_distill.errors import InputError


def columns_of(
    given: Sequence[str],
    own: Sequence[str] | None,
    wanted: Sequence[str],
    num_classes: int,
    num_outputs: int | None,
    *,
    source: str,
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Which of the teacher's outputs are the data's classes.

    A teacher may know more classes than the data have: its other outputs are dropped, which makes the softmax of what is
    left its belief given that the class is one of the data's. It may not know fewer. Names that the program itself carries
    and that are just 0 to R-1 are labels rather than names: where the data's names differ, label i is the data's class i.

    Args:
      given: names of the outputs from the options or the file beside the teacher; empty where none.
      own: names that the program itself carries.
      wanted: the data's class names, empty where it has none.
      num_classes: of the data, 0 where it has none.
      num_outputs: R where it is known.
      source: of the teacher.

    Returns:
      The outputs' indices in the data's order [K], None for all as they are; and the R outputs' names, where they have any.

    Raises:
      InputError: a class of the data is missing, or the numbers of names, outputs and classes differ.
    """
    names = tuple(given or own or ())
    if not given and set(wanted) != set(names) and list(names) == [str(i) for i in range(len(names))]:
        names = ()
    if names and num_outputs is not None and len(names) != num_outputs:
        raise InputError(
            f"each output of a teacher needs one class name; {source} has {num_outputs} outputs and {len(names)} names: "
            "give all, in order"
        )
    if not names:
        _check_number(num_outputs, num_classes, source)
        return None, None
    if not wanted:
        return None, names
    if missing := [name for name in wanted if name not in names]:
        raise InputError(
            f"a teacher must know every class of the data; {source} knows {_some(names)}, missing is {_some(missing)}: give "
            "its outputs' names in the data's spelling by --teacher-input.classes, or take another teacher"
        )
    columns = np.array([names.index(name) for name in wanted])
    return (None if columns.tolist() == list(range(len(names))) else columns), names


def _check_number(num_outputs: int | None, num_classes: int, source: str) -> None:
    if num_outputs is not None and num_classes and num_outputs != num_classes:
        raise InputError(
            f"a teacher has one output per class of the data, {num_classes}; {source} has {num_outputs}: name its outputs "
            "in order by --teacher-input.classes where it knows more classes, or take another teacher"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
