"""ONNX: converts a traced program to a model that any ONNX runtime loads.

JAX traces the program for two batch sizes; an axis whose size differs between the traces is the free batch axis. Each primitive
becomes the operators that `onnx_operators.py` lists. Whatever depends on constants alone is computed during the conversion.

Why not jax2onnx: it pins an older orbax-checkpoint than ours, adds some twenty packages, and lacks the convolution primitives
of `students/layers/conv.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.export.formats.onnx_graph import BATCH, Graph, Node, Value, common_sizes, simplified
from ev3_distill.export.formats.onnx_int8_weights import with_int8_weights
from ev3_distill.export.formats.onnx_operators import OPERATORS, Call, Unsupported
from ev3_distill.runtime.jaxpr import Operation, Program, flatten

INPUTS = "inputs"
OPSET, IR = 18, 9  # onnxruntime 1.15 and later
TRACED_BATCHES = (2, 3)


def package() -> Any:
    """Imports the package onnx.

    Raises:
      InputError: it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise InputError(
            "writing ONNX needs the package onnx, which is not installed: pip install 'ev3-distill[onnx]'"
        ) from None
    return onnx


def serialize(
    forward: Callable[[jax.Array], jax.Array],
    example: jax.ShapeDtypeStruct,
    *,
    name: str,
    output: str,
    metadata: Mapping[str, str],
) -> bytes:
    """Writes an ONNX model with one input `inputs` and one output, both with a free batch axis.

    Args:
      forward: pure function of inputs [B, ...] to outputs [B, K].
      example: shape and dtype of one example, without the batch axis.
      name: of the network, for error messages.
      output: name of the model's output.
      metadata: entries of the file's metadata, by name.

    Raises:
      InputError: the package onnx is missing, or the program uses a primitive without a conversion.
    """
    onnx = package()
    one, other = (
        jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((size, *example.shape), example.dtype)) for size in TRACED_BATCHES
    )
    graph = Graph()
    inputs = Value((None, *example.shape), INPUTS, tuple(range(1 + len(example.shape))))
    try:
        result = _convert(graph, flatten(one), flatten(other), inputs)
    except Unsupported as error:
        raise InputError(
            f"an ONNX file holds only operations that the exporter can convert; the network {name} uses {error}: use --format "
            "stablehlo or flax instead"
        ) from None
    graph.nodes.append(Node("Identity", (graph.in_program_order(result),), output, {}))
    shape = [BATCH, *result.shape[1:]]
    return _model(onnx, with_int8_weights(simplified(graph, output)), example, shape, output=output, metadata=metadata)


def _convert(graph: Graph, one: Program, other: Program, inputs: Value) -> Value:
    """Adds a program to the graph, from its two traces, and returns its output."""
    if [operation.name for operation in one.operations] != [operation.name for operation in other.operations]:
        raise Unsupported("operations that depend on the batch size")
    values = {number: _constant(array) for number, array in one.constants.items()} | {one.inputs[0]: inputs}
    needed, live = set(one.outputs), []
    for operation, twin in zip(reversed(one.operations), reversed(other.operations), strict=True):
        if needed.intersection(operation.outputs):
            live.append((operation, twin))
            needed.update(operation.inputs)
    for operation, twin in reversed(live):
        sizes = [
            common_sizes(one.avals[a].shape, other.avals[b].shape)
            for a, b in zip(operation.outputs, twin.outputs, strict=True)
        ]
        results = _convert_operation(graph, one, operation, sizes, [values[number] for number in operation.inputs])
        values.update(zip(operation.outputs, results, strict=True))
    return values[one.outputs[0]]


def _convert_operation(
    graph: Graph,
    program: Program,
    operation: Operation,
    shapes: Sequence[tuple[int | None, ...]],
    values: Sequence[Value],
) -> list[Value]:
    """Adds one primitive to the graph, or computes it where all of its inputs are constants."""
    if all(value.known for value in values):
        if all(None not in shape for shape in (*shapes, *(value.shape for value in values))):
            return [_constant(array) for array in operation.apply([graph.expanded(value).constant for value in values])]
        if operation.name != "broadcast_in_dim":
            values = [_tensor(graph, value) for value in values]
    dtypes = [program.avals[number].dtype for number in (*operation.inputs[:1], *operation.outputs)]
    if operation.name == "split":
        return _split(graph, operation, values[0], shapes, dtypes[0])
    if operation.name not in OPERATORS or len(shapes) != 1:
        raise Unsupported(f"the primitive {operation.name}")
    return [OPERATORS[operation.name](Call(graph, operation.params, shapes[0], dtypes[-1], dtypes[0]), *values)]


def _split(
    graph: Graph, operation: Operation, value: Value, shapes: Sequence[tuple[int | None, ...]], dtype: np.dtype
) -> list[Value]:
    """Converts `split`: each part becomes a slice."""
    axis, starts, parts = operation.params["axis"], [0], []
    for size in operation.params["sizes"]:
        starts.append(starts[-1] + size)
    for start, shape in zip(starts[:-1], shapes, strict=True):
        params = {"start_indices": [start if i == axis else 0 for i in range(len(shape))], "strides": None}
        parts.append(OPERATORS["slice"](Call(graph, params, shape, dtype, dtype), value))
    return parts


def _constant(array: Any) -> Value:
    keys = isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    return Value(tuple(np.shape(array)), constant=array if keys else np.asarray(array))


def _tensor(graph: Graph, value: Value) -> Value:
    """Writes a constant to the file."""
    assert value.constant is not None
    return Value(value.shape, graph.constant(value.constant), tuple(range(len(value.shape))), value.unexpanded)


def _model(
    onnx: Any,
    graph: Graph,
    example: jax.ShapeDtypeStruct,
    shape: Sequence[Any],
    *,
    output: str,
    metadata: Mapping[str, str],
) -> bytes:
    """Serializes a finished graph."""

    def type_of(dtype: Any) -> int:
        return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    nodes = []
    for node in graph.nodes:
        attributes = {name: type_of(of) if node.operator == "Cast" else of for name, of in node.attributes.items()}
        nodes.append(onnx.helper.make_node(node.operator, list(node.inputs), [node.output], node.output, **attributes))
    inputs = onnx.helper.make_tensor_value_info(INPUTS, type_of(example.dtype), [BATCH, *example.shape])
    outputs = onnx.helper.make_tensor_value_info(output, type_of(np.float32), list(shape))
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
    program = onnx.helper.make_graph(nodes, "student", [inputs], [outputs], constants)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(program, opset_imports=opsets, ir_version=IR, producer_name="ev3-distill")
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
