"""Conversion of JAX primitives to ONNX operators: the table OPERATORS, and a function for each that is not one to one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ev3_distill.export.formats.onnx_graph import Graph, Size, Value


class Unsupported(Exception):
    """Raised for a primitive, or a use of one, that has no conversion; the message names it."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One application of a primitive."""

    graph: Graph
    params: Mapping[str, Any]
    shape: tuple[Size, ...]  # of the result
    dtype: np.dtype  # of the result
    input_dtype: np.dtype  # of the first argument

    def identity(self, value: Value) -> Value:
        """Returns the value unchanged."""
        return value


Operator = Callable[..., Value]  # (call, *values) -> value


def _elementwise(operator: str, **attributes: Any) -> Operator:
    def emit(call: Call, *values: Value) -> Value:
        return call.graph.elementwise(operator, *values, shape=call.shape, **attributes)

    return emit


def _composed(*operators: str) -> Operator:
    """A chain of unary operators, applied from left to right."""

    def emit(call: Call, value: Value) -> Value:
        for operator in operators:
            value = call.graph.elementwise(operator, value, shape=call.shape)
        return value

    return emit


def _number(call: Call, number: float) -> Value:
    return Value((), constant=np.array(number, call.dtype))


def _cast(call: Call, value: Value) -> Value:
    if call.dtype == call.input_dtype:
        return value
    return call.graph.elementwise("Cast", value, shape=call.shape, to=call.dtype)


def _maximum(call: Call, *values: Value) -> Value:
    """A maximum with zero becomes Relu, which other tools can fuse and quantize."""
    nonzero = [value for value in values if value.constant is None or value.constant.any()]
    operator = "Relu" if len(nonzero) == 1 and not nonzero[0].known else "Max"
    return call.graph.elementwise(operator, *(nonzero if operator == "Relu" else values), shape=call.shape)


def _difference(call: Call, one: Value, other: Value) -> Value:
    """Subtraction of a constant becomes addition, which can be folded into a convolution before it."""
    if other.constant is None or one.known:
        return call.graph.elementwise("Sub", one, other, shape=call.shape)
    negative = dataclasses.replace(other, constant=-other.constant)
    return call.graph.elementwise("Add", one, negative, shape=call.shape)


def _square(call: Call, value: Value) -> Value:
    return call.graph.elementwise("Mul", value, value, shape=call.shape)


def _power(call: Call, value: Value) -> Value:
    """An integer power; squares and cubes are products, as in XLA."""
    exponent = call.params["y"]
    if exponent not in (2, 3):
        return call.graph.elementwise("Pow", value, _number(call, exponent), shape=call.shape)
    squared = _square(call, value)
    return squared if exponent == 2 else call.graph.elementwise("Mul", squared, value, shape=call.shape)


def _log1p(call: Call, value: Value) -> Value:
    shifted = call.graph.elementwise("Add", value, _number(call, 1), shape=call.shape)
    return call.graph.elementwise("Log", shifted, shape=call.shape)


def _expm1(call: Call, value: Value) -> Value:
    exponential = call.graph.elementwise("Exp", value, shape=call.shape)
    return call.graph.elementwise("Sub", exponential, _number(call, 1), shape=call.shape)


def _erfc(call: Call, value: Value) -> Value:
    erf = call.graph.elementwise("Erf", value, shape=call.shape)
    return call.graph.elementwise("Sub", _number(call, 1), erf, shape=call.shape)


def _not_equal(call: Call, one: Value, other: Value) -> Value:
    return call.graph.elementwise("Not", _elementwise("Equal")(call, one, other), shape=call.shape)


def _select(call: Call, which: Value, *cases: Value) -> Value:
    if len(cases) != 2 or call.input_dtype != np.bool_:
        raise Unsupported("select_n with more than two cases")
    return call.graph.elementwise("Where", which, cases[1], cases[0], shape=call.shape)


def _clamp(call: Call, low: Value, value: Value, high: Value) -> Value:
    above = call.graph.elementwise("Max", value, low, shape=call.shape)
    return call.graph.elementwise("Min", above, high, shape=call.shape)


def _broadcast(call: Call, value: Value) -> Value:
    """Inserts axes of size 1. They are expanded only where another operator needs it."""
    axes = call.params["broadcast_dimensions"]  # of the result, for each axis of the value
    new = [axis for axis in range(len(call.shape)) if axis not in axes]
    unexpanded = value.unexpanded or any(call.shape[axis] != 1 for axis in new)
    unexpanded = unexpanded or any(value.shape[i] != call.shape[axis] for i, axis in enumerate(axes))
    if value.constant is not None:
        return Value(call.shape, constant=np.expand_dims(value.constant, new), unexpanded=unexpanded)
    tensor = call.graph.in_order(value, range(len(value.shape)))
    if new:
        tensor = call.graph.node("Unsqueeze", tensor, call.graph.constant(np.array(new, np.int64)))
    return Value(call.shape, tensor, tuple(range(len(call.shape))), unexpanded)


def _reshape(call: Call, value: Value) -> Value:
    if call.params.get("dimensions") is not None:
        raise Unsupported("reshape with dimensions")
    tensor = call.graph.reshaped(call.graph.in_program_order(value), call.shape)
    return Value(call.shape, tensor, tuple(range(len(call.shape))))


def _transpose(call: Call, value: Value) -> Value:
    """Only the recorded order changes; the tensor stays."""
    permutation = list(call.params["permutation"])
    order = tuple(permutation.index(axis) for axis in value.order)
    return Value(call.shape, value.tensor, order, value.unexpanded)


def _squeeze(call: Call, value: Value) -> Value:
    removed = {axis % len(value.shape) for axis in call.params["dimensions"]}
    axes = np.array([i for i, axis in enumerate(value.order) if axis in removed], np.int64)
    tensor = call.graph.node("Squeeze", value.tensor, call.graph.constant(axes))
    return Value(call.shape, tensor, _without(value.order, removed), value.unexpanded)


def _without(order: Sequence[int], removed: set[int]) -> tuple[int, ...]:
    """The order of the remaining axes, renumbered."""
    remaining = sorted(set(order) - removed)
    return tuple(remaining.index(axis) for axis in order if axis not in removed)


def _reduce(operator: str) -> Operator:
    def emit(call: Call, value: Value) -> Value:
        removed = {int(axis) for axis in call.params["axes"]}
        if any(value.shape[axis] is None for axis in removed):
            raise Unsupported("a reduction over the batch, by which one example's output depends on others")
        value = call.graph.expanded(value)
        axes = np.array([i for i, axis in enumerate(value.order) if axis in removed], np.int64)
        tensor = call.graph.node(operator, value.tensor, call.graph.constant(axes), keepdims=0)
        return Value(call.shape, tensor, _without(value.order, removed))

    return emit


def _pad(call: Call, value: Value, fill: Value) -> Value:
    sides = [call.params["padding_config"][axis] for axis in value.order]
    if any(interior for *_, interior in sides) or fill.constant is None:
        raise Unsupported("pad with interior padding, or with a computed value")
    pads = np.array([low for low, *_ in sides] + [high for _, high, _ in sides], np.int64)
    value = call.graph.expanded(value)
    constant = call.graph.constant(fill.constant)
    tensor = call.graph.node("Pad", value.tensor, call.graph.constant(pads), constant, mode="constant")
    return Value(call.shape, tensor, value.order)


def _slice(call: Call, value: Value) -> Value:
    params = call.params
    strides = params["strides"] or (1,) * len(value.shape)
    sliced = [axis for axis, size in enumerate(value.shape) if size != call.shape[axis]]
    if any(size is None and axis in sliced for axis, size in enumerate(value.shape)):
        raise Unsupported("a slice of the batch")
    return _slice_axes(call, value, [(axis, params["start_indices"][axis], strides[axis]) for axis in sliced])


def _slice_axes(call: Call, value: Value, slices: Sequence[tuple[int, int, int]]) -> Value:
    """Slices axes, each by (axis, start, step) with the length of the result."""
    if not slices:
        return Value(call.shape, value.tensor, value.order, value.unexpanded)
    value = call.graph.expanded(value)
    ends = [start + (_fixed(call.shape[axis]) - 1) * step + 1 for axis, start, step in slices]
    columns = [[start for _, start, _ in slices], ends, [value.order.index(axis) for axis, *_ in slices]]
    parts = [call.graph.constant(np.array(column, np.int64)) for column in (*columns, [step for *_, step in slices])]
    return Value(call.shape, call.graph.node("Slice", value.tensor, *parts), value.order)


def _fixed(size: Size) -> int:
    if size is None:
        raise Unsupported("a slice whose size is the batch size")
    return size


def _concatenate(call: Call, *values: Value) -> Value:
    order = next((value.order for value in values if not value.known), tuple(range(len(call.shape))))
    tensors = [call.graph.in_order(call.graph.expanded(value), order) for value in values]
    tensor = call.graph.node("Concat", *tensors, axis=order.index(call.params["dimension"]))
    return Value(call.shape, tensor, order)


def _dot(call: Call, one: Value, other: Value) -> Value:
    """[batch, M, K] times [batch, K, N]; where M, K or N are several axes, they are merged into one."""
    (contracted_one, contracted_other), (batch_one, batch_other) = call.params["dimension_numbers"]
    free_one, free_other = _rest(one, contracted_one, batch_one), _rest(other, contracted_other, batch_other)
    groups = (
        [free_one] if batch_one else [[axis] for axis in free_one]
    )  # without batch axes, MatMul broadcasts over them
    left = _matrix(call, one, batch_one, groups, contracted_one, last=True)
    right = _matrix(call, other, batch_other, [free_other], contracted_other, last=False)
    tensor = call.graph.node("MatMul", left, right)
    if len(free_other) != 1 or any(len(group) != 1 for group in groups):
        tensor = call.graph.reshaped(tensor, call.shape)
    return Value(call.shape, tensor, tuple(range(len(call.shape))))


def _rest(value: Value, contracted: Sequence[int], batch: Sequence[int]) -> list[int]:
    return [axis for axis in range(len(value.shape)) if axis not in (*contracted, *batch)]


def _matrix(
    call: Call,
    value: Value,
    batch: Sequence[int],
    free: Sequence[Sequence[int]],
    contracted: Sequence[int],
    *,
    last: bool,
) -> str:
    """Returns a tensor of the batch axes, the groups of free axes and one contracted axis, last or before the free axes."""
    middle = [axis for group in free for axis in group]
    order = [*batch, *middle, *contracted] if last else [*batch, *contracted, *middle]
    tensor = call.graph.in_order(call.graph.expanded(value), order)
    groups = [*free, contracted] if last else [contracted, *free]
    if all(len(group) == 1 for group in groups):
        return tensor
    shape = [*(value.shape[axis] for axis in batch), *(_merged(value, group) for group in groups)]
    return call.graph.reshaped(tensor, shape)


def _merged(value: Value, axes: Sequence[int]) -> Size:
    """The size of several axes merged into one."""
    sizes = [value.shape[axis] for axis in axes]
    return None if None in sizes else int(np.prod([size for size in sizes if size is not None], dtype=np.int64))


def _convolution(call: Call, images: Value, kernel: Value) -> Value:
    params = call.params
    numbers = params["dimension_numbers"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise Unsupported("conv_general_dilated with a dilated input")
    lows, highs = zip(*params["padding"], strict=True)
    if min(*lows, *highs) < 0:
        raise Unsupported("conv_general_dilated with negative paddings")
    tensor = call.graph.node(
        "Conv",
        call.graph.in_order(call.graph.expanded(images), numbers.lhs_spec),
        call.graph.in_order(call.graph.expanded(kernel), numbers.rhs_spec),
        strides=list(params["window_strides"]),
        pads=[*map(int, lows), *map(int, highs)],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    return Value(call.shape, tensor, tuple(numbers.out_spec))


def _pool(operator: str) -> Operator:
    """A window reduction. Two axes outside the window serve as ONNX's batch and channel axes."""

    def emit(call: Call, value: Value) -> Value:
        params, rank = call.params, len(call.shape)
        window = params["window_dimensions"]
        ones = [axis for axis in range(rank) if window[axis] == 1 and params["window_strides"][axis] == 1]
        order = [*ones[:1], *ones[-1:], *(axis for axis in range(rank) if axis not in (*ones[:1], *ones[-1:]))]
        dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
        if len(ones) < 2 or dilated or any(sum(params["padding"][axis]) for axis in order[:2]):
            raise Unsupported("a window over the batch or all axes, or a dilated one")
        lows, highs = zip(*(params["padding"][axis] for axis in order[2:]), strict=True)
        sizes = [int(window[axis]) for axis in order[2:]]
        options: dict[str, Any] = {"count_include_pad": 1} if operator == "AveragePool" else {}
        tensor = call.graph.node(
            operator,
            call.graph.in_order(call.graph.expanded(value), order),
            kernel_shape=sizes,
            strides=[int(params["window_strides"][axis]) for axis in order[2:]],
            pads=[*map(int, lows), *map(int, highs)],
            **options,
        )
        pooled = Value(call.shape, tensor, tuple(order))
        if operator == "MaxPool":
            return pooled
        return call.graph.elementwise("Mul", pooled, _number(call, float(np.prod(sizes))), shape=call.shape)

    return emit


def _quantize(call: Call, value: Value, scale: Value, zero: Value) -> Value:
    """A pair of QuantizeLinear and DequantizeLinear; a runtime may fuse it with its neighbors into integer arithmetic."""
    if scale.constant is None or zero.constant is None:
        raise Unsupported("quantize with a scale that is not constant")
    grid = (
        call.graph.constant(np.asarray(scale.constant, np.float32)),
        call.graph.constant(np.asarray(zero.constant, np.uint8)),
    )
    source = value.tensor or call.graph.constant(np.asarray(value.constant))
    tensor = call.graph.node("DequantizeLinear", call.graph.node("QuantizeLinear", source, *grid), *grid)
    return Value(call.shape, tensor, value.order or tuple(range(len(call.shape))), value.unexpanded)


OPERATORS: dict[str, Operator] = {
    **{name: _elementwise(operator) for name, operator in {
        "add": "Add", "mul": "Mul", "div": "Div", "min": "Min", "pow": "Pow", "neg": "Neg",
        "abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
        "tanh": "Tanh", "erf": "Erf", "logistic": "Sigmoid", "sin": "Sin", "cos": "Cos", "and": "And", "or": "Or",
        "not": "Not", "eq": "Equal", "lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual",
    }.items()},
    "ne": _not_equal,
    "sub": _difference,
    "max": _maximum,
    "rsqrt": _composed("Sqrt", "Reciprocal"),
    "square": _square,
    "integer_pow": _power,
    "log1p": _log1p,
    "expm1": _expm1,
    "erfc": _erfc,
    "select_n": _select,
    "clamp": _clamp,
    "convert_element_type": _cast,
    "stop_gradient": Call.identity,
    "copy": Call.identity,
    "optimization_barrier": Call.identity,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "quantize": _quantize,
    "pad": _pad,
    "slice": _slice,
    "concatenate": _concatenate,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool"),
}  # fmt: skip
