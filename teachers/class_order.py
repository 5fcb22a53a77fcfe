"""Class order: matches the outputs of a teacher to the classes of the data, by name where both have names."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ev3_distill.data.class_names import are_numbers, nfc
from ev3_distill.errors import InputError

LISTED_NAMES = 10  # most class names that an error lists


class ClassOrder(NamedTuple):
    """Which output of a teacher belongs to which class.

    Attributes:
      columns: outputs in the order of the data's classes [K]; None if no reordering is needed.
      output_names: names of the R outputs, as the data spell them where they have these classes; None if there are none.
      notes: what was matched by another rule than equal names; sentences for the user.
    """

    columns: np.ndarray | None
    output_names: tuple[str, ...] | None
    notes: tuple[str, ...]


def class_columns(
    user_names: Sequence[str],
    model_names: Sequence[str] | None,
    data_names: Sequence[str],
    num_classes: int,
    num_outputs: int | None,
    *,
    source: str,
) -> ClassOrder:
    """Finds the output of a teacher that belongs to each class of the data.

    A teacher may know more classes than the data have. Its other outputs are dropped, so the softmax over the rest is its
    belief given that the class is one of the data's. A teacher may not know fewer classes.

    Names are equal if their normal forms NFC are, or if they are the same number or truth value: 1, 1.0 and True. If the
    model's own names are numbers that the data do not have, and there are as many as classes, they count as labels in
    increasing order, where either the model's are 0, 1, ... or 1, 2, ..., or the data number their classes 0, 1, ...

    Args:
      user_names: names of the outputs from the options or the file beside the teacher; empty if there are none.
      model_names: names stored in the model itself.
      data_names: class names of the data; empty if there are none.
      num_classes: classes of the data, K; 0 if unknown.
      num_outputs: outputs of the model, R; None if unknown.
      source: the teacher, for errors.

    Raises:
      InputError: a class of the data is missing, or the numbers of names, outputs and classes differ.
    """
    given, data_names = tuple(map(nfc, user_names or model_names or ())), tuple(map(nfc, data_names))
    names = _as_data_spell(given, data_names)
    notes: tuple[str, ...] = ()
    if not user_names and set(data_names) != set(names) and are_numbers(names):
        names = ()
    elif not user_names and _are_labels_in_order(names, data_names):
        notes = (
            f"its classes {shortened(given)} are taken as the data's classes {shortened(data_names)}, in this order; if they "
            "are not, give the names of its outputs with --teacher-input.classes",
        )
        names = tuple(data_names)
    if names and num_outputs is not None and len(names) != num_outputs:
        raise InputError(
            f"each output of a teacher needs one class name; {source} has {num_outputs} outputs and {len(names)} names: "
            "give all names, in order"
        )
    if not names:
        _check_count(num_outputs, num_classes, source)
        return ClassOrder(None, None, notes)
    if not data_names:
        return ClassOrder(None, names, notes)
    if missing := [name for name in data_names if name not in names]:
        raise _missing_error(given, names, data_names, missing, source=source)
    columns = np.array([names.index(name) for name in data_names])
    unchanged = columns.tolist() == list(range(len(names)))
    return ClassOrder(None if unchanged else columns, names, notes)


def _missing_error(
    given: Sequence[str], names: Sequence[str], data_names: Sequence[str], missing: Sequence[str], *, source: str
) -> InputError:
    """The error for classes of the data that the teacher does not know, with both lists."""
    way_out = "name its outputs as the data spell their classes with --teacher-input.classes, or use another teacher"
    if are_numbers(data_names) and set(names) < set(data_names):
        way_out = f"give labels=ids to the data where their labels are ids, {way_out}"
    return InputError(
        f"a teacher must know every class of the data; {source} knows {shortened(given)}, the data have "
        f"{shortened(data_names)}, and it lacks {shortened(missing)}: {way_out}"
    )


def _as_data_spell(names: tuple[str, ...], data_names: Sequence[str]) -> tuple[str, ...]:
    """Names as the data spell them; numbers and truth values may be spelled differently."""
    if not data_names or set(data_names) <= set(names):
        return names
    spelled = {_plain(name): name for name in data_names}
    plain = [_plain(name) for name in names]
    if len(spelled) != len(data_names) or len(set(plain)) != len(names):
        return names  # ambiguous
    return tuple(spelled.get(short, short) for short in plain)


def _plain(name: str) -> str:
    """One spelling for each number: 1 for 1.0, True and true."""
    if name.lower() in ("true", "false"):
        return str(int(name.lower() == "true"))
    try:
        number = float(name)
    except ValueError:
        return name
    return str(int(number)) if number.is_integer() else name


def _are_labels_in_order(names: Sequence[str], data_names: Sequence[str]) -> bool:
    """Whether numbered outputs belong to the classes of the data by their rank."""
    if not names or len(names) != len(data_names) or set(names) == set(data_names):
        return False
    if not all(name.removeprefix("-").isdecimal() for name in names):
        return False
    increasing = sorted(map(int, names)) == list(map(int, names))
    return increasing and (list(names) == [str(1 + i) for i in range(len(names))] or are_numbers(data_names))


def _check_count(num_outputs: int | None, num_classes: int, source: str) -> None:
    if num_outputs is not None and num_classes and num_outputs != num_classes:
        raise InputError(
            f"a teacher has one output per class of the data, {num_classes}; {source} has {num_outputs}: if it knows more "
            "classes, name its outputs in order with --teacher-input.classes; otherwise use another teacher. Embeddings and "
            "regressions are tasks that ev3-distill does not offer yet"
        )


def shortened(names: Sequence[str]) -> str:
    """Names as a list, of which only the first ones are written out."""
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more
