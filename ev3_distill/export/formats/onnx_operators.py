"""JAX's primitives as ONNX operators: a table, and a function for each that is more than another name."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ev3_distill.export.formats.onnx_graph import Graph, Size, Value


class Unsupported(Exception):
    """A primitive, or a use of one, that has no operator here; the message names it."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One primitive applied."""

    graph: Graph
    params: Mapping[str, Any]
    shape: tuple[Size, ...]  # of the result
    dtype: np.dtype  # of the result
    given: np.dtype  # of the first argument

    def same(self, value: Value) -> Value:
        """The value itself."""
        return value


Operator = Callable[..., Value]  # (call, *values) -> value


def _elementwise(operator: str, **attributes: Any) -> Operator:
    def emit(call: Call, *values: Value) -> Value:
        return call.graph.elementwise(operator, *values, shape=call.shape, **attributes)

    return emit


def _composed(*operators: str) -> Operator:
    """Unary operators, the first of them first."""

    def emit(call: Call, value: Value) -> Value:
        for operator in operators:
            value = call.graph.elementwise(operator, value, shape=call.shape)
        return value

    return emit


def _number(call: Call, number: float) -> Value:
    return Value((), constant=np.array(number, call.dtype))


def _cast(call: Call, value: Value) -> Value:
    if call.dtype == call.given:
        return value
    return call.graph.elementwise("Cast", value, shape=call.shape, to=call.dtype)


def _greatest(call: Call, *values: Value) -> Value:
    """ReLU where it is one, which other tools know how to fuse and to quantise."""
    kept = [value for value in values if value.constant is None or value.constant.any()]
    operator = "Relu" if len(kept) == 1 and not kept[0].known else "Max"
    return call.graph.elementwise(operator, *(kept if operator == "Relu" else values), shape=call.shape)


def _difference(call: Call, one: Value, other: Value) -> Value:
    """A constant is added, so that a convolution before it can take it in."""
    if other.constant is None or one.known:
        return call.graph.elementwise("Sub", one, other, shape=call.shape)
    negative = dataclasses.replace(other, constant=-other.constant)
    return call.graph.elementwise("Add", one, negative, shape=call.shape)


def _square(call: Call, value: Value) -> Value:
    return call.graph.elementwise("Mul", value, value, shape=call.shape)


def _power(call: Call, value: Value) -> Value:
    """A whole power; the small ones by products, as exact as XLA's."""
    exponent = call.params["y"]
    if exponent not in (2, 3):
        return call.graph.elementwise("Pow", value, _number(call, exponent), shape=call.shape)
    squared = _square(call, value)
    return squared if exponent == 2 else call.graph.elementwise("Mul", squared, value, shape=call.shape)


def _log1p(call: Call, value: Value) -> Value:
    more = call.graph.elementwise("Add", value, _number(call, 1), shape=call.shape)
    return call.graph.elementwise("Log", more, shape=call.shape)


def _expm1(call: Call, value: Value) -> Value:
    grown = call.graph.elementwise("Exp", value, shape=call.shape)
    return call.graph.elementwise("Sub", grown, _number(call, 1), shape=call.shape)


def _erfc(call: Call, value: Value) -> Value:
    found = call.graph.elementwise("Erf", value, shape=call.shape)
    return call.graph.elementwise("Sub", _number(call, 1), found, shape=call.shape)


def _not_equal(call: Call, one: Value, other: Value) -> Value:
    return call.graph.elementwise("Not", _elementwise("Equal")(call, one, other), shape=call.shape)


def _select(call: Call, which: Value, *cases: Value) -> Value:
    if len(cases) != 2 or call.given != np.bool_:
        raise Unsupported("select_n of more than two cases")
    return call.graph.elementwise("Where", which, cases[1], cases[0], shape=call.shape)


def _clamp(call: Call, least: Value, value: Value, most: Value) -> Value:
    above = call.graph.elementwise("Max", value, least, shape=call.shape)
    return call.graph.elementwise("Min", above, most, shape=call.shape)


def _broadcast(call: Call, value: Value) -> Value:
    """Axes of size 1 are put in, and stretch where another operator needs them to."""
    kept = call.params["broadcast_dimensions"]
    new = [axis for axis in range(len(call.shape)) if axis not in kept]
    thin = value.thin or any(call.shape[axis] != 1 for axis in new)
    thin = thin or any(value.shape[i] != call.shape[axis] for i, axis in enumerate(kept))
    if value.constant is not None:
        return Value(call.shape, constant=np.expand_dims(value.constant, new), thin=thin)
    tensor = call.graph.laid(value, range(len(value.shape)))
    if new:
        tensor = call.graph.node("Unsqueeze", tensor, call.graph.constant(np.array(new, np.int64)))
    return Value(call.shape, tensor, tuple(range(len(call.shape))), thin)


def _reshape(call: Call, value: Value) -> Value:
    if call.params.get("dimensions") is not None:
        raise Unsupported("reshape with dimensions")
    tensor = call.graph.reshaped(call.graph.plain(value), call.shape)
    return Value(call.shape, tensor, tuple(range(len(call.shape))))


def _transpose(call: Call, value: Value) -> Value:
    """The tensor stays as it is."""
    permutation = list(call.params["permutation"])
    order = tuple(permutation.index(axis) for axis in value.order)
    return Value(call.shape, value.tensor, order, value.thin)


def _squeeze(call: Call, value: Value) -> Value:
    gone = {axis % len(value.shape) for axis in call.params["dimensions"]}
    axes = np.array([i for i, axis in enumerate(value.order) if axis in gone], np.int64)
    tensor = call.graph.node("Squeeze", value.tensor, call.graph.constant(axes))
    return Value(call.shape, tensor, _without(value.order, gone), value.thin)


def _without(order: Sequence[int], gone: set[int]) -> tuple[int, ...]:
    """The order of the axes that are left."""
    left = sorted(set(order) - gone)
    return tuple(left.index(axis) for axis in order if axis not in gone)


def _reduce(operator: str) -> Operator:
    def emit(call: Call, value: Value) -> Value:
        gone = {int(axis) for axis in call.params["axes"]}
        if any(value.shape[axis] is None for axis in gone):
            raise Unsupported("a reduction over the batch, which makes an answer depend on other examples")
        value = call.graph.whole(value)
        axes = np.array([i for i, axis in enumerate(value.order) if axis in gone], np.int64)
        tensor = call.graph.node(operator, value.tensor, call.graph.constant(axes), keepdims=0)
        return Value(call.shape, tensor, _without(value.order, gone))

    return emit


def _pad(call: Call, value: Value, filling: Value) -> Value:
    sides = [call.params["padding_config"][axis] for axis in value.order]
    if any(between for *_, between in sides) or filling.constant is None:
        raise Unsupported("pad between entries, or with a computed value")
    pads = np.array([low for low, *_ in sides] + [high for _, high, _ in sides], np.int64)
    value = call.graph.whole(value)
    filled = call.graph.constant(filling.constant)
    tensor = call.graph.node("Pad", value.tensor, call.graph.constant(pads), filled, mode="constant")
    return Value(call.shape, tensor, value.order)


def _slice(call: Call, value: Value) -> Value:
    params = call.params
    strides = params["strides"] or (1,) * len(value.shape)
    cut = [axis for axis, size in enumerate(value.shape) if size != call.shape[axis]]
    if any(size is None and axis in cut for axis, size in enumerate(value.shape)):
        raise Unsupported("a slice of the batch")
    return _cut(call, value, [(axis, params["start_indices"][axis], strides[axis]) for axis in cut])


def _cut(call: Call, value: Value, cuts: Sequence[tuple[int, int, int]]) -> Value:
    """Cuts of (axis, first, step) as long as the result."""
    if not cuts:
        return Value(call.shape, value.tensor, value.order, value.thin)
    value = call.graph.whole(value)
    ends = [first + (_sized(call.shape[axis]) - 1) * step + 1 for axis, first, step in cuts]
    columns = [[first for _, first, _ in cuts], ends, [value.order.index(axis) for axis, *_ in cuts]]
    parts = [call.graph.constant(np.array(column, np.int64)) for column in (*columns, [step for *_, step in cuts])]
    return Value(call.shape, call.graph.node("Slice", value.tensor, *parts), value.order)


def _sized(size: Size) -> int:
    if size is None:
        raise Unsupported("a size that follows the batch")
    return size


def _concatenate(call: Call, *values: Value) -> Value:
    order = next((value.order for value in values if not value.known), tuple(range(len(call.shape))))
    tensors = [call.graph.laid(call.graph.whole(value), order) for value in values]
    tensor = call.graph.node("Concat", *tensors, axis=order.index(call.params["dimension"]))
    return Value(call.shape, tensor, order)


def _dot(call: Call, one: Value, other: Value) -> Value:
    """[batch, M, K] times [batch, K, N], where M, K and N may be several axes that are made one."""
    (of_one, of_other), (batch_one, batch_other) = call.params["dimension_numbers"]
    free_one, free_other = _rest(one, of_one, batch_one), _rest(other, of_other, batch_other)
    groups = [free_one] if batch_one else [[axis] for axis in free_one]  # without a batch, MatMul lets them be
    left = _matrix(call, one, batch_one, groups, of_one, last=True)
    right = _matrix(call, other, batch_other, [free_other], of_other, last=False)
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
    """A tensor of the batch axes, the groups of free axes and one contracted axis, which is last or before them."""
    middle = [axis for group in free for axis in group]
    order = [*batch, *middle, *contracted] if last else [*batch, *contracted, *middle]
    tensor = call.graph.laid(call.graph.whole(value), order)
    groups = [*free, contracted] if last else [contracted, *free]
    if all(len(group) == 1 for group in groups):
        return tensor
    shape = [*(value.shape[axis] for axis in batch), *(_merged(value, group) for group in groups)]
    return call.graph.reshaped(tensor, shape)


def _merged(value: Value, axes: Sequence[int]) -> Size:
    """The size of several axes in one."""
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
        call.graph.laid(call.graph.whole(images), numbers.lhs_spec),
        call.graph.laid(call.graph.whole(kernel), numbers.rhs_spec),
        strides=list(params["window_strides"]),
        pads=[*map(int, lows), *map(int, highs)],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    return Value(call.shape, tensor, tuple(numbers.out_spec))


def _pool(operator: str) -> Operator:
    """A reduction in a window of some axes, two of the others being what ONNX takes for batch and channels."""

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
        how: dict[str, Any] = {"count_include_pad": 1} if operator == "AveragePool" else {}
        tensor = call.graph.node(
            operator,
            call.graph.laid(call.graph.whole(value), order),
            kernel_shape=sizes,
            strides=[int(params["window_strides"][axis]) for axis in order[2:]],
            pads=[*map(int, lows), *map(int, highs)],
            **how,
        )
        pooled = Value(call.shape, tensor, tuple(order))
        if operator == "MaxPool":
            return pooled
        return call.graph.elementwise("Mul", pooled, _number(call, float(np.prod(sizes))), shape=call.shape)

    return emit


def _quantise(call: Call, value: Value, scale: Value, zero: Value) -> Value:
    """To bytes and back; what a runtime does between them in whole numbers is its own affair."""
    if scale.constant is None or zero.constant is None:
        raise Unsupported("quantise by a scale that is no constant")
    how = (
        call.graph.constant(np.asarray(scale.constant, np.float32)),
        call.graph.constant(np.asarray(zero.constant, np.uint8)),
    )
    given = value.tensor or call.graph.constant(np.asarray(value.constant))
    tensor = call.graph.node("DequantizeLinear", call.graph.node("QuantizeLinear", given, *how), *how)
    return Value(call.shape, tensor, value.order or tuple(range(len(call.shape))), value.thin)


OPERATORS: dict[str, Operator] = {
    **{name: _elementwise(operator) for name, operator in {
        "add": "Add", "mul": "Mul", "div": "Div", "min": "Min", "pow": "Pow", "neg": "Neg",
        "abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
        "tanh": "Tanh", "erf": "Erf", "logistic": "Sigmoid", "sin": "Sin", "cos": "Cos", "and": "And", "or": "Or",
        "not": "Not", "eq": "Equal", "lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual",
    }.items()},
    "ne": _not_equal,
    "sub": _difference,
    "max": _greatest,
    "rsqrt": _composed("Sqrt", "Reciprocal"),
    "square": _square,
    "integer_pow": _power,
    "log1p": _log1p,
    "expm1": _expm1,
    "erfc": _erfc,
    "select_n": _select,
    "clamp": _clamp,
    "convert_element_type": _cast,
    "stop_gradient": Call.same,
    "copy": Call.same,
    "optimization_barrier": Call.same,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "quantise": _quantise,
    "pad": _pad,
    "slice": _slice,
    "concatenate": _concatenate,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool"),
}  # fmt: skip
