"""ONNX: a traced program as a model that any ONNX runtime loads.

The program is traced by JAX at two batches, and what differs between them is the free axis. Its primitives become operators of
`operators.py`; what follows from constants alone is computed here. jax2onnx, which does the like, asks for an orbax-checkpoint
older than ours and brings some twenty packages along, and it knows no primitive of `students/conv.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.export.formats.onnx_graph import BATCH, Graph, Node, Value, pruned, sizes_of
from ev3_distill.export.formats.onnx_operators import OPERATORS, Call, Unsupported
from ev3_distill.export.formats.onnx_static_quantization import whole_numbers
from ev3_distill.runtime.jaxpr import CALLS, called, is_variable

INPUTS = "inputs"
OPSET, IR = 18, 9  # onnxruntime 1.15 and later
BATCHES = (2, 3)  # that programs are traced at
Environment = dict[Any, Value]


def package() -> Any:
    """The package onnx.

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


def model_of(
    forward: Callable[[jax.Array], jax.Array],
    example: jax.ShapeDtypeStruct,
    *,
    name: str,
    output: str,
    about: Mapping[str, str],
) -> bytes:
    """An ONNX model with one input `inputs` and one output, both with a free batch axis.

    Args:
      forward: of inputs [B, ...] to outputs [B, K], pure.
      example: one example, without the batch axis.
      name: of the network, for errors.
      output: its name.
      about: what the file says of itself, by name.

    Raises:
      InputError: the package onnx is missing, or the program has what is not known here.
    """
    onnx = package()
    one, other = (
        jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((size, *example.shape), example.dtype)) for size in BATCHES
    )
    graph = Graph()
    inputs = Value((None, *example.shape), INPUTS, tuple(range(1 + len(example.shape))))
    try:
        (result,) = _inlined(graph, one, other, [inputs])
    except Unsupported as error:
        raise InputError(
            f"an ONNX file is of operators that are known here; the network {name} asks for {error}, which has none: export "
            "it by --format stablehlo or flax, which can"
        ) from None
    graph.nodes.append(Node("Identity", (graph.plain(result),), output, {}))
    shape = [BATCH, *result.shape[1:]]
    return _written(onnx, whole_numbers(pruned(graph, output)), example, shape, output=output, about=about)


def _inlined(graph: Graph, one: Any, other: Any, arguments: Sequence[Value]) -> list[Value]:
    """The results of a closed program, from its two traces."""
    known: Environment = {}
    for variable, constant in zip(one.jaxpr.constvars, one.consts, strict=True):
        known[variable] = _constant(constant)
    known.update(zip(one.jaxpr.invars, arguments, strict=True))
    if [e.primitive.name for e in one.jaxpr.eqns] != [e.primitive.name for e in other.jaxpr.eqns]:
        raise Unsupported("a program that is another one for another batch")
    wanted = {variable for variable in one.jaxpr.outvars if is_variable(variable)}
    live = []
    for pair in reversed(list(zip(one.jaxpr.eqns, other.jaxpr.eqns, strict=True))):
        if wanted.intersection(pair[0].outvars):
            live.append(pair)
            wanted.update(variable for variable in pair[0].invars if is_variable(variable))
    for equation, twin in reversed(live):
        values = [_read(known, variable) for variable in equation.invars]
        known.update(zip(equation.outvars, _applied(graph, equation, twin, values), strict=True))
    return [_read(known, variable) for variable in one.jaxpr.outvars]


def _applied(graph: Graph, equation: Any, twin: Any, values: Sequence[Value]) -> list[Value]:
    name = equation.primitive.name
    if name in CALLS:
        inner, other = (called(e) for e in (equation, twin))
        return _inlined(graph, inner, other, values)
    shapes = [sizes_of(a.aval.shape, b.aval.shape) for a, b in zip(equation.outvars, twin.outvars, strict=True)]
    if all(value.known for value in values):
        if all(None not in shape for shape in (*shapes, *(value.shape for value in values))):
            return _computed(graph, equation, values)
        if name != "broadcast_in_dim":
            values = [_tensor(graph, value) for value in values]
    if name == "split":
        return _split(graph, equation, values[0], shapes)
    if name not in OPERATORS or len(shapes) != 1:
        raise Unsupported(f"the primitive {name}")
    (made,) = equation.outvars
    given = equation.invars[0].aval.dtype if equation.invars else made.aval.dtype
    return [OPERATORS[name](Call(graph, equation.params, shapes[0], made.aval.dtype, given), *values)]


def _computed(graph: Graph, equation: Any, values: Sequence[Value]) -> list[Value]:
    """What follows from constants alone."""
    arrays = [graph.whole(value).constant for value in values]
    results = equation.primitive.bind(*arrays, **equation.params)
    return [_constant(array) for array in (results if equation.primitive.multiple_results else [results])]


def _split(graph: Graph, equation: Any, value: Value, shapes: Sequence[tuple[int | None, ...]]) -> list[Value]:
    """Each part is a slice."""
    axis, dtype, starts, parts = equation.params["axis"], equation.invars[0].aval.dtype, [0], []
    for size in equation.params["sizes"]:
        starts.append(starts[-1] + size)
    for first, shape in zip(starts[:-1], shapes, strict=True):
        begin = [first if i == axis else 0 for i in range(len(shape))]
        params = {"start_indices": begin, "strides": None}
        parts.append(OPERATORS["slice"](Call(graph, params, shape, dtype, dtype), value))
    return parts


def _read(known: Environment, variable: Any) -> Value:
    return known[variable] if is_variable(variable) else _constant(variable.val)


def _constant(array: Any) -> Value:
    keys = isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    return Value(tuple(np.shape(array)), constant=array if keys else np.asarray(array))


def _tensor(graph: Graph, value: Value) -> Value:
    """A constant as a tensor of the file."""
    assert value.constant is not None
    return Value(value.shape, graph.constant(value.constant), tuple(range(len(value.shape))), value.thin)


def _written(
    onnx: Any,
    graph: Graph,
    example: jax.ShapeDtypeStruct,
    shape: Sequence[Any],
    *,
    output: str,
    about: Mapping[str, str],
) -> bytes:
    def type_of(dtype: Any) -> int:
        return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    nodes = []
    for node in graph.nodes:
        attributes = {name: type_of(of) if node.operator == "Cast" else of for name, of in node.attributes.items()}
        nodes.append(onnx.helper.make_node(node.operator, list(node.inputs), [node.output], node.output, **attributes))
    taken = onnx.helper.make_tensor_value_info(INPUTS, type_of(example.dtype), [BATCH, *example.shape])
    given = onnx.helper.make_tensor_value_info(output, type_of(np.float32), list(shape))
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
    program = onnx.helper.make_graph(nodes, "student", [taken], [given], constants)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(program, opset_imports=opsets, ir_version=IR, producer_name="ev3-distill")
    onnx.helper.set_model_props(model, dict(about))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
