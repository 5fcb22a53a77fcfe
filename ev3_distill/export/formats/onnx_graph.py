"""A graph of ONNX operators in the making: tensors whose axes lie in any order, and constants that never reach the file.

JAX has the channels of an image last, ONNX second. A `Value` therefore tells in which order the tensor of the file has the
axes that the program speaks of, and a transposition of the program costs nothing until an operator asks for an order.
Where all axes of a network's middle lie as its convolutions want them, none is ever transposed.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

BATCH = "batch"  # the free axis
Size = int | None  # of an axis; None where it follows the batch


@dataclasses.dataclass(frozen=True)
class Node:
    """One operator of the file."""

    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array of the program: a tensor of the file, or a constant whose axes lie as the program has them."""

    shape: tuple[Size, ...]  # as the program has it
    tensor: str = ""
    order: tuple[int, ...] = ()  # axis i of the tensor is this axis of the program
    thin: bool = (
        False  # whether axes may be of size 1 where `shape` is larger: they broadcast, and all entries are alike
    )
    constant: np.ndarray | None = None

    @property
    def known(self) -> bool:
        """Whether it is a constant."""
        return self.constant is not None


class Graph:
    """Operators in the order in which they are computed, and their constants."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self._names = 0

    def constant(self, array: np.ndarray) -> str:
        """The name of a new constant tensor."""
        name = self._name("constant")
        self.constants[name] = np.ascontiguousarray(array).reshape(np.shape(array))
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """The name of the output of a new operator on tensors of these names."""
        output = self._name(operator.lower())
        self.nodes.append(Node(operator, inputs, output, attributes))
        return output

    def elementwise(self, operator: str, *values: Value, shape: Sequence[Size], **attributes: Any) -> Value:
        """An operator on each entry, that broadcasts."""
        wide = [value for value in values if value.shape]
        leader = next((value for value in wide if not value.known), None)
        order = tuple(range(len(shape))) if leader is None else leader.order
        tensors = (self.laid(value, order if value.shape else ()) for value in values)
        output = self.node(operator, *tensors, **attributes)
        return Value(tuple(shape), output, order, thin=all(value.thin for value in wide))

    def laid(self, value: Value, order: Sequence[int]) -> str:
        """The name of a tensor with the value's axes in this order."""
        order = tuple(order)
        if value.constant is not None:
            return self.constant(value.constant.transpose(order))
        if value.order == order:
            return value.tensor
        return self.node("Transpose", value.tensor, perm=[value.order.index(axis) for axis in order])

    def plain(self, value: Value) -> str:
        """The name of a tensor as the program has it, whole."""
        value = self.whole(value)
        return self.laid(value, range(len(value.shape)))

    def whole(self, value: Value) -> Value:
        """The value with all axes of their full size."""
        if not value.thin:
            return value
        if value.constant is not None and None not in value.shape:
            sizes = [size for size in value.shape if size is not None]
            return Value(value.shape, constant=np.broadcast_to(value.constant, sizes))
        order = value.order or tuple(range(len(value.shape)))
        tensor = self.node("Expand", self.laid(value, order), self._sizes([value.shape[axis] for axis in order]))
        return Value(value.shape, tensor, order)

    def reshaped(self, tensor: str, shape: Sequence[Size]) -> str:
        """The name of a tensor with the same entries in this shape."""
        sizes = np.array([-1 if size is None else size for size in shape], np.int64)
        return self.node("Reshape", tensor, self.constant(sizes))

    def _sizes(self, shape: Sequence[Size]) -> str:
        """A tensor of these sizes; the batch's own is asked of the input."""
        if None not in shape:
            return self.constant(np.array(shape, np.int64))
        own = self.node("Shape", "inputs", start=0, end=1)
        parts = [own if size is None else self.constant(np.array([size], np.int64)) for size in shape]
        return self.node("Concat", *parts, axis=0)

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}_{self._names}"


def pruned(graph: Graph, output: str) -> Graph:
    """The graph without what does not lead to the output, and with the scales and shifts of its convolutions inside them."""
    graph = _needed(graph, output)
    for operator in ("Mul", "Add", "Mul", "Add"):  # a bias may come before a scale
        _absorb(graph, operator, output)
    return _needed(graph, output)


def _needed(graph: Graph, output: str) -> Graph:
    wanted, kept = {output}, []
    for node in reversed(graph.nodes):
        if node.output in wanted:
            kept.append(node)
            wanted.update(node.inputs)
    small = Graph()
    small.nodes = kept[::-1]
    small.constants = {name: array for name, array in graph.constants.items() if name in wanted}
    small._names = graph._names
    return small


def _absorb(graph: Graph, operator: str, output: str) -> None:
    """Takes a product (or sum) of a convolution with a constant per channel into its kernel (or bias)."""
    uses: dict[str, int] = {output: 1}
    for name in (name for node in graph.nodes for name in node.inputs):
        uses[name] = uses.get(name, 0) + 1
    made = {node.output: i for i, node in enumerate(graph.nodes)}
    for i, node in enumerate(graph.nodes):
        if node.operator != operator:
            continue
        for one, other in (node.inputs, node.inputs[::-1]):
            at = made.get(one)
            if at is None or graph.nodes[at].operator != "Conv" or uses[one] > 1 or other not in graph.constants:
                continue
            channels = _per_channel(graph.constants[other], graph.constants.get(graph.nodes[at].inputs[1]))
            if channels is not None:
                graph.nodes[at] = _with(graph, graph.nodes[at], operator, channels)
                graph.nodes[i] = Node("Identity", (one,), node.output, {})
                break
    _unalias(graph, output)


def _per_channel(factor: np.ndarray, kernel: np.ndarray | None) -> np.ndarray | None:
    """A constant as [O] where it is one number, or one for each output channel of a convolution."""
    if kernel is None or factor.size not in (1, len(kernel)):
        return None
    if factor.size > 1 and (factor.ndim != kernel.ndim or factor.shape[1] != factor.size):
        return None
    return np.broadcast_to(factor.reshape(-1), len(kernel))


def _with(graph: Graph, node: Node, operator: str, channels: np.ndarray) -> Node:
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


def _unalias(graph: Graph, output: str) -> None:
    """Leaves out operators that only give another name, but the output's."""
    names: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        inputs = tuple(names.get(name, name) for name in node.inputs)
        if node.operator == "Identity" and node.output != output:
            names[node.output] = inputs[0]
        else:
            kept.append(Node(node.operator, inputs, node.output, node.attributes))
    graph.nodes = kept


def sizes_of(one: Iterable[int], other: Iterable[int]) -> tuple[Size, ...]:
    """The sizes of an array's axes from two traces of a program, at different batches: None where they differ."""
    return tuple(a if a == b else None for a, b in zip(one, other, strict=True))
