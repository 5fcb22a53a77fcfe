"""Outputs of an ONNX model: which are logits, which are a softmax of them, and which hold labels or dictionaries."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ev3_distill.errors import InputError
from ev3_distill.teachers.kinds.normalized_outputs import Normalized
from ev3_distill.teachers.output_meaning import OPTION, labels_error

_NORMALIZERS = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
_COPIES = ("Identity", "Cast")


class Origins(NamedTuple):
    """Where the outputs of a graph come from.

    Attributes:
      normalized: outputs that are the softmax or the sigmoid of a tensor, by name.
      mapped: outputs of the operator ZipMap, and the tensors of probabilities that it reads.
    """

    normalized: Mapping[str, Normalized]
    mapped: Mapping[str, str]


def origins_of(path: Path) -> Origins:
    """Origins of the outputs of an ONNX file; nothing is known if the package onnx is not installed."""
    try:
        import onnx
    except ImportError:
        return Origins({}, {})
    graph = onnx.load(str(path), load_external_data=False).graph
    maker = {name: node for node in graph.node for name in node.output}
    normalized, mapped = {}, {}
    for output in graph.output:
        node = maker.get(output.name)
        while node is not None and node.op_type in _COPIES:
            node = maker.get(node.input[0])
        if node is not None and node.op_type in _NORMALIZERS:
            normalized[output.name] = Normalized(_NORMALIZERS[node.op_type], node.input[0])
        if node is not None and node.op_type == "ZipMap":
            mapped[output.name] = node.input[0]
    return Origins(normalized, mapped)


def score_shapes(
    outputs: Sequence[Any],
    shapes: Mapping[str, tuple[int | None, ...] | None],
    names: Sequence[str],
    origins: Origins,
    *,
    source: str,
    num_classes: int,
) -> dict[str, tuple[int | None, ...] | None]:
    """Shapes of the outputs that may hold a score for each class.

    Args:
      outputs: of the session.
      shapes: of its tensors by name.
      names: that the user gave after `#`.
      origins: of the outputs.
      source: the teacher.
      num_classes: of the data; 0 if unknown.

    Raises:
      InputError: there is none, or the user names one that holds dictionaries.
    """
    others = [output.name for output in outputs if not output.type.startswith("tensor(")]
    labels = [
        output.name
        for output in outputs
        if output.name in shapes
        and (output.type == "tensor(string)" or (len(shapes[output.name] or ()) == 1 and "int" in output.type))
    ]
    scores = {name: shape for name, shape in shapes.items() if name not in labels}
    if (names and names[0] in others) or (others and not names and not scores):
        raise _zip_map_error(names[0] if names else others[0], origins, source)
    if not names and not scores and labels:
        raise labels_error(num_classes, source=source)
    return scores


def _zip_map_error(name: str, origins: Origins, source: str) -> InputError:
    way_out = "convert it again with the option zipmap=False of skl2onnx (onnxmltools alike)"
    if tensor := origins.mapped.get(name):
        file = source.partition("#")[0]
        way_out = f"give {file}#{tensor}, the probabilities that it reads, with {OPTION} probabilities; or {way_out}"
    return InputError(
        f"a teacher's logits must be a tensor [B, K]; the output {name} of {source} is a dictionary for each example (ZipMap): "
        f"{way_out}"
    )
