"""A graph of ONNX operators under construction, with lazy transposition and lazy broadcasting.

JAX puts the channels of an image last, ONNX second. A `Value` therefore records the axis order of its tensor in the file, and a
transposition in the program adds no operator until some operator needs a particular order. If every axis inside a network
already lies as its convolutions need it, the file has no transposition there at all.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

BATCH = "batch"  # name of the free axis
Size = int | None  # of an axis; None for the batch size


@dataclasses.dataclass(frozen=True)
class Node:
    """One operator of the file."""

    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array of the program: a tensor of the file, or a constant with the program's axis order."""

    shape: tuple[Size, ...]  # in the program
    tensor: str = ""
    order: tuple[int, ...] = ()  # axis i of the tensor is axis order[i] of the program's array
    unexpanded: bool = False  # whether axes may still have size 1 where `shape` is larger: broadcasting is pending
    constant: np.ndarray | None = None

    @property
    def known(self) -> bool:
        """Whether the value is a constant."""
        return self.constant is not None


class Graph:
    """Operators in the order of their computation, and constants."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self._names = 0

    def constant(self, array: np.ndarray) -> str:
        """Adds a constant tensor and returns its name."""
        name = self._name("constant")
        self.constants[name] = np.ascontiguousarray(array).reshape(np.shape(array))
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operator on tensors of these names and returns the name of its output."""
        output = self._name(operator.lower())
        self.nodes.append(Node(operator, inputs, output, attributes))
        return output

    def elementwise(self, operator: str, *values: Value, shape: Sequence[Size], **attributes: Any) -> Value:
        """Adds an elementwise operator that broadcasts."""
        arrays = [value for value in values if value.shape]
        leader = next((value for value in arrays if not value.known), None)
        order = tuple(range(len(shape))) if leader is None else leader.order
        tensors = (self.in_order(value, order if value.shape else ()) for value in values)
        output = self.node(operator, *tensors, **attributes)
        return Value(tuple(shape), output, order, unexpanded=all(value.unexpanded for value in arrays))

    def in_order(self, value: Value, order: Sequence[int]) -> str:
        """Returns the name of a tensor with the value's axes in this order."""
        order = tuple(order)
        if value.constant is not None:
            return self.constant(value.constant.transpose(order))
        if value.order == order:
            return value.tensor
        return self.node("Transpose", value.tensor, perm=[value.order.index(axis) for axis in order])

    def in_program_order(self, value: Value) -> str:
        """Returns the name of a fully expanded tensor with the program's axis order."""
        value = self.expanded(value)
        return self.in_order(value, range(len(value.shape)))

    def expanded(self, value: Value) -> Value:
        """Applies pending broadcasting: every axis gets its full size."""
        if not value.unexpanded:
            return value
        if value.constant is not None and None not in value.shape:
            sizes = [size for size in value.shape if size is not None]
            return Value(value.shape, constant=np.broadcast_to(value.constant, sizes))
        order = value.order or tuple(range(len(value.shape)))
        tensor = self.node("Expand", self.in_order(value, order), self._sizes([value.shape[axis] for axis in order]))
        return Value(value.shape, tensor, order)

    def reshaped(self, tensor: str, shape: Sequence[Size]) -> str:
        """Reshapes a tensor and returns the name of the result."""
        sizes = np.array([-1 if size is None else size for size in shape], np.int64)
        return self.node("Reshape", tensor, self.constant(sizes))

    def _sizes(self, shape: Sequence[Size]) -> str:
        """Returns a tensor of these sizes; the batch size is read from the model's input."""
        if None not in shape:
            return self.constant(np.array(shape, np.int64))
        batch = self.node("Shape", "inputs", start=0, end=1)
        parts = [batch if size is None else self.constant(np.array([size], np.int64)) for size in shape]
        return self.node("Concat", *parts, axis=0)

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}_{self._names}"


def simplified(graph: Graph, output: str) -> Graph:
    """Removes unused operators and folds per-channel scales and shifts into the convolutions before them."""
    graph = _pruned(graph, output)
    for operator in ("Mul", "Add", "Mul", "Add"):  # twice, because a bias may come before a scale
        _fold(graph, operator, output)
    return _pruned(graph, output)


def _pruned(graph: Graph, output: str) -> Graph:
    needed, nodes = {output}, []
    for node in reversed(graph.nodes):
        if node.output in needed:
            nodes.append(node)
            needed.update(node.inputs)
    small = Graph()
    small.nodes = nodes[::-1]
    small.constants = {name: array for name, array in graph.constants.items() if name in needed}
    small._names = graph._names
    return small


def _fold(graph: Graph, operator: str, output: str) -> None:
    """Folds a product (or sum) of a convolution and a constant per channel into the kernel (or bias)."""
    uses: dict[str, int] = {output: 1}
    for name in (name for node in graph.nodes for name in node.inputs):
        uses[name] = uses.get(name, 0) + 1
    producers = {node.output: i for i, node in enumerate(graph.nodes)}
    for i, node in enumerate(graph.nodes):
        if node.operator != operator:
            continue
        for one, other in (node.inputs, node.inputs[::-1]):
            at = producers.get(one)
            if at is None or graph.nodes[at].operator != "Conv" or uses[one] > 1 or other not in graph.constants:
                continue
            channels = _per_channel(graph.constants[other], graph.constants.get(graph.nodes[at].inputs[1]))
            if channels is not None:
                graph.nodes[at] = _folded(graph, graph.nodes[at], operator, channels)
                graph.nodes[i] = Node("Identity", (one,), node.output, {})
                break
    _remove_identities(graph, output)


def _per_channel(factor: np.ndarray, kernel: np.ndarray | None) -> np.ndarray | None:
    """A constant as [O] if it is a scalar or has one entry per output channel of a convolution; otherwise None."""
    if kernel is None or factor.size not in (1, len(kernel)):
        return None
    if factor.size > 1 and (factor.ndim != kernel.ndim or factor.shape[1] != factor.size):
        return None
    return np.broadcast_to(factor.reshape(-1), len(kernel))


def _folded(graph: Graph, node: Node, operator: str, channels: np.ndarray) -> Node:
    inputs = list(node.inputs)
    bias = graph.constants[inputs[2]] if len(inputs) > 2 else np.zeros(len(channels), channels.dtype)
    if operator == "Mul":
        kernel = graph.constants[inputs[1]]
        inputs[1] = graph.constant(kernel * channels.reshape(-1, *[1] * (kernel.ndim - 1)))
        bias = bias * channels
    else:
        bias = bias + channels
    inputs[2:] = [graph.constant(bias)]
    return Node(node.operator, tuple(inputs), node.output, node.attributes)


def _remove_identities(graph: Graph, output: str) -> None:
    """Removes identity operators, except the one that names the output."""
    names: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        inputs = tuple(names.get(name, name) for name in node.inputs)
        if node.operator == "Identity" and node.output != output:
            names[node.output] = inputs[0]
        else:
            nodes.append(Node(node.operator, inputs, node.output, node.attributes))
    graph.nodes = nodes


def common_sizes(one: Iterable[int], other: Iterable[int]) -> tuple[Size, ...]:
    """The axis sizes of an array, from traces at two batch sizes: None where they differ."""
    return tuple(a if a == b else None for a, b in zip(one, other, strict=True))
