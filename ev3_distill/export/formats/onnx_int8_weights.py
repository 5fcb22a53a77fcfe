"""Stores the weights of a network that trained for int8 as int8 constants; see `students/quantization.py`."""

import numpy as np

from ev3_distill.export.formats.onnx_graph import Graph, Node
from ev3_distill.students.quantization import WEIGHT_LEVELS

RESHAPING = ("Transpose", "Reshape")  # operators that leave the entries unchanged
OUTPUT_AXES = {"Conv": 0, "MatMul": 1}  # of each product's weights


def with_int8_weights(graph: Graph) -> Graph:
    """Converts weights to int8 and biases to int32, with scales, in every product whose other input is quantized.

    The weights already lie on a grid of WEIGHT_LEVELS steps up to the maximum of each output channel, and stay on it when a
    BatchNorm is folded in. So only the storage changes, not the values. Leaving these weights in float32 would do harm beyond
    file size: onnxruntime quantizes them itself next to quantized activations, with one scale for all channels.
    """
    producers = {node.output: node for node in graph.nodes}

    def scale_of(name: str) -> str | None:
        """The scale of a quantized activation, through reshaping operators; None if it is not quantized."""
        while name in producers and producers[name].operator in RESHAPING:
            name = producers[name].inputs[0]
        if name in producers and producers[name].operator == "DequantizeLinear":
            return producers[name].inputs[1]
        return None

    result = Graph()
    result.constants, result._names = graph.constants, graph._names
    for node in graph.nodes:
        weights = graph.constants.get(node.inputs[1]) if node.operator in OUTPUT_AXES else None
        input_scale = scale_of(node.inputs[0])
        if weights is None or input_scale is None or (node.operator == "MatMul" and weights.ndim != 2):
            result.nodes.append(node)
            continue
        axis = OUTPUT_AXES[node.operator]
        others = tuple(i for i in range(weights.ndim) if i != axis)
        scale = np.abs(weights).max(others) / np.float32(WEIGHT_LEVELS)
        scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
        inputs = [node.inputs[0], _dequantized(result, weights, scale, axis, np.int8)]
        if len(node.inputs) > 2:
            sum_scale = scale * graph.constants[input_scale]
            inputs.append(_dequantized(result, graph.constants[node.inputs[2]], sum_scale, 0, np.int32))
        result.nodes.append(Node(node.operator, tuple(inputs), node.output, node.attributes))
    used = {name for node in result.nodes for name in node.inputs}
    result.constants = {name: array for name, array in result.constants.items() if name in used}
    return result


def _dequantized(graph: Graph, array: np.ndarray, scale: np.ndarray, axis: int, dtype: type[np.signedinteger]) -> str:
    """Stores a constant as integers and returns the name of its dequantized tensor."""
    limits = np.iinfo(dtype)
    along = scale.reshape([-1 if i == axis else 1 for i in range(array.ndim)]).astype(np.float64)
    integers = np.clip(np.round(array / along), limits.min, limits.max).astype(dtype)
    zeros = np.zeros(scale.shape, dtype)
    names = (graph.constant(integers), graph.constant(scale.astype(np.float32)), graph.constant(zeros))
    return graph.node("DequantizeLinear", *names, axis=axis)
