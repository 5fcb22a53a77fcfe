"""Arrays of labels: integers, truth values or text become class numbers; an error says what others look like.

An example without a label has -1, or the empty text where labels are text.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ev3_distill.data.class_names import nfc
from ev3_distill.errors import InputError


def check_labels(labels: np.ndarray, name: str, inputs: tuple[str, tuple[int, ...]], path: Path) -> np.ndarray:
    """Checks the shape and type of labels as they were saved.

    Args:
      labels: as saved.
      name: of the array.
      inputs: name and shape of the inputs, N first.
      path: of the file, for messages.

    Returns:
      Labels [N], integers or text.

    Raises:
      InputError: not one class per example, or numbers that are not class numbers.
    """
    x, shape = inputs
    if labels.shape != shape[:1]:
        got, way_out = _describe_shape(labels, name, shape[0])
        raise InputError(
            f"{path}: {x} and {name} must have the same length and {name} must have one class per example; got "
            f"{list(shape)} and {list(labels.shape)}{got}: {way_out}"
        )
    if labels.dtype.kind == "b":
        return labels.astype(np.uint8)
    if labels.dtype.kind == "S":
        return _decoded(labels, name, path)
    if labels.dtype.kind not in "uiU":
        got, way_out = _describe_values(labels, name)
        raise InputError(f"{path}: {name} must be integers or text; got {labels.dtype}{got}: {way_out}")
    return labels


def number_labels(
    parts: Sequence[np.ndarray], names: np.ndarray | None, path: Path
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Numbers text labels: the class names are the distinct texts, sorted, or those given. Integers are kept.

    An empty text is no label.

    Args:
      parts: labels of each part of the data, each integers or text.
      names: class names [K] in the order of the numbers, if the file has any.
      path: of the file, for messages.

    Returns:
      The labels as integers, and the class names if any are known.

    Raises:
      InputError: text beside integers, texts that do not recur, or a text that is not a class name.
    """
    is_text = {labels.dtype.kind == "U" for labels in parts}
    if is_text == {False}:
        return list(parts), names
    if len(is_text) > 1:
        got = " and ".join(str(labels.dtype) for labels in parts)
        raise InputError(f"{path}: labels of train and test must have one type; got {got}: save both as text")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        return list(parts), names  # refused with the class names
    texts = np.concatenate(parts)
    texts = texts[texts != ""]
    if not len(texts):
        return [np.full(len(labels), -1, np.int32) for labels in parts], names
    distinct = np.unique(texts)
    if len(distinct) == len(texts) > 1:
        raise InputError(
            f"{path}: labels must be classes that recur; got {len(texts)} different texts in as many rows, such as "
            f"{str(distinct[0])!r}: save the class of each example"
        )
    known = np.unique(list(map(nfc, distinct.tolist()))) if names is None else names
    number = {nfc(str(name)): i for i, name in enumerate(known)} | {"": -1}
    if unknown := [text for text in distinct.tolist() if nfc(text) not in number]:
        raise InputError(
            f"{path}: every label must be one of class_names; got {unknown[0]!r}"
            f"{f' and {len(unknown) - 1} more' if unknown[1:] else ''}: add it to class_names or fix the labels"
        )
    numbers = [np.array([number[nfc(str(text))] for text in labels], np.int32) for labels in parts]
    return numbers, known


def number_ids(
    parts: Sequence[np.ndarray], names: np.ndarray | None, path: Path
) -> tuple[list[np.ndarray], np.ndarray]:
    """Numbers labels that are ids, such as 17, 37 and 57, in the order of the ids, which become the class names.

    Args:
      parts: labels of each part of the data.
      names: class names of the file, if it has any.
      path: of the file, for messages.

    Raises:
      InputError: the labels are not integers, or the file has class names.
    """
    if names is not None:
        raise InputError(f"{path}: labels=ids takes the ids for names; got class_names besides: omit one of them")
    labels = np.concatenate(parts)
    if labels.dtype.kind not in "ui" or (labels == -1).all():
        got = "none" if labels.dtype.kind in "ui" else str(labels.dtype)
        raise InputError(f"{path}: labels=ids needs labels that are integers; got {got}: omit it")
    ids, numbers = np.unique(labels, return_inverse=True)
    return np.split(numbers, np.cumsum([len(part) for part in parts])[:-1]), ids.astype(str)


def _decoded(labels: np.ndarray, name: str, path: Path) -> np.ndarray:
    try:
        return np.char.decode(labels, "utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: {name} of bytes must be UTF-8 text; got {labels.dtype}: save text") from None


def _describe_shape(labels: np.ndarray, name: str, examples: int) -> tuple[str, str]:
    """What labels of a wrong shape look like, and the way out."""
    if labels.ndim != 2 or labels.shape[0] != examples or labels.dtype.kind not in "buif":
        is_short = labels.ndim == 1 and len(labels) < examples
        return "", "pair them up" + (", with -1 for each example without a label" if is_short else "")
    if labels.shape[1] == 1:
        return "", f"save {name}[:, 0]"
    values = labels.astype(np.float64)
    bits, sums = bool(np.isin(values, (0, 1)).all()), values.sum(axis=1)
    if bits and (sums == 1).all():
        return ", which is one-hot", f"save {name}.argmax(axis=1)"
    if bits:
        return ", zeros and ones", "several classes per example are not supported: save one number per example"
    if (values >= 0).all() and np.allclose(sums, 1, atol=1e-3):
        return ", which are probabilities", (
            f"save {name}.argmax(axis=1); a teacher's probabilities go, as logarithms, into --teacher logits:FILE.npz"
        )
    return "", "save one number per example"


def _describe_values(labels: np.ndarray, name: str) -> tuple[str, str]:
    """What labels of a wrong type look like, and the way out."""
    if labels.dtype.kind != "f":
        return "", "save the number or the name of each example's class"
    if not np.isfinite(labels).all():
        row = int((~np.isfinite(labels)).argmax())
        return f" with {labels[row]} in row {row}", (
            "leave out examples without a class, or save integers with -1 for an example without a label"
        )
    fractional = labels != np.floor(labels)
    if fractional.any():
        row = int(fractional.argmax())
        return f" such as {labels[row]:.6g} in row {row}", (
            "numbers that are not whole are targets of a regression, which is not supported; for classes, save the number "
            "or the name of each example's class"
        )
    return " of whole numbers", (
        f"if they number classes, save {name}.astype('int32'); a quantity to predict is a regression, which is not supported"
    )
