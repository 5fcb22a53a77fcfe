"""Whole numbers: weights in int8 where a graph's products meet activations that are rounded, see `ev3_distill/int8.py`."""

import numpy as np

from ev3_distill.export.formats.onnx_graph import Graph, Node
from ev3_distill.students.quantization import LARGEST

LAYOUT = ("Transpose", "Reshape")  # what leaves the entries as they are
AXES = {"Conv": 0, "MatMul": 1}  # of a product's weights: that of its outputs


def whole_numbers(graph: Graph) -> Graph:
    """The graph with the weights of such products in int8 and their biases in int32, each with its scales.

    The weights lie on a grid already, LARGEST steps to the greatest of each output channel, and what a BatchNorm made of them
    still does: so this changes nothing but how they are written. Weights left in float32 are worse than large: onnxruntime
    rounds them itself, all channels by one scale, where the activations beside them are rounded.
    """
    makers = {node.output: node for node in graph.nodes}

    def scale_of(name: str) -> str | None:
        """That of a rounded activation, however it lies."""
        while name in makers and makers[name].operator in LAYOUT:
            name = makers[name].inputs[0]
        return makers[name].inputs[1] if name in makers and makers[name].operator == "DequantizeLinear" else None

    written = Graph()
    written.constants, written._names = graph.constants, graph._names
    for node in graph.nodes:
        weights = graph.constants.get(node.inputs[1]) if node.operator in AXES else None
        met = scale_of(node.inputs[0])
        if weights is None or met is None or (node.operator == "MatMul" and weights.ndim != 2):
            written.nodes.append(node)
            continue
        axis = AXES[node.operator]
        others = tuple(i for i in range(weights.ndim) if i != axis)
        scale = np.abs(weights).max(others) / np.float32(LARGEST)
        scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
        inputs = [node.inputs[0], _dequantised(written, weights, scale, axis, np.int8)]
        if len(node.inputs) > 2:
            of_sums = scale * graph.constants[met]
            inputs.append(_dequantised(written, graph.constants[node.inputs[2]], of_sums, 0, np.int32))
        written.nodes.append(Node(node.operator, tuple(inputs), node.output, node.attributes))
    used = {name for node in written.nodes for name in node.inputs}
    written.constants = {name: array for name, array in written.constants.items() if name in used}
    return written


def _dequantised(graph: Graph, array: np.ndarray, scale: np.ndarray, axis: int, dtype: type[np.signedinteger]) -> str:
    """A constant as whole numbers, and what they stand for."""
    limits = np.iinfo(dtype)
    along = scale.reshape([-1 if i == axis else 1 for i in range(array.ndim)]).astype(np.float64)
    whole = np.clip(np.round(array / along), limits.min, limits.max).astype(dtype)
    zeros = np.zeros(scale.shape, dtype)
    names = (graph.constant(whole), graph.constant(scale.astype(np.float32)), graph.constant(zeros))
    return graph.node("DequantizeLinear", *names, axis=axis)
