"""Quantization-aware training in int8, simulated in float32.

Evaluation computes what the deployed int8 network computes. In every product with weights (matrix product or convolution), the
weights have 7 bits and one scale per output channel; with 8 bits, sums of two products overflow 16 bits on x86 processors
without VNNI. The other factor has 8 bits, one scale and one zero point. The product's output is quantized too, after its
BatchNorm or bias and its ReLU, so that a runtime can keep all of it in int8. The logits are not quantized.

Each quantized array is rounded to the nearest multiple of its scale. `export/formats` writes the same network as an ONNX file
whose operators compute in int8. The two agree up to rounding: where the order of a sum decides on which side of a half it
falls, the next integer results. At first that happens for one entry in 100,000. Each layer multiplies such differences by about
ten, up to a fifth of the entries in the last layers of a ResNet-8, by one step each.

Training takes one of two forms. `apply` trains in float32. `straight` rounds the weights and passes gradients straight through
the rounding (Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR
2018; arXiv:1712.05877). Arms use it in the last part of the budget (`arms/`). Both give biased gradients, but assess and decide
score the quantized student. Neither form quantizes activations. Their ranges, minimum and maximum over some batches, are part
of the statistics; `fit` computes them for each proposed student, because the average of a trajectory has other ranges than its
iterates.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ev3_distill.runtime.jaxpr import Operation, Program, flatten
from ev3_distill.types import Network, Variables

NETWORK_STATS, RANGES = "network", "ranges"  # keys of the statistics: the network's own, and the activation ranges
WEIGHT_LEVELS = 64  # largest magnitude of a quantized weight
ACTIVATION_LEVELS = 255  # largest quantized activation
PRODUCTS = ("conv_general_dilated", "dot_general")
RESHAPING = ("reshape", "transpose", "squeeze", "copy", "stop_gradient")  # primitives that leave the entries unchanged
AFFINE = ("add", "sub", "mul", "div")

TraceContext = Callable[[], contextlib.AbstractContextManager[None]]


class _Plan(NamedTuple):
    """What is quantized in a traced forward pass."""

    program: Program
    sites: dict[int, int]  # array number -> index of its range
    weights: dict[int, tuple[int, tuple[int, ...]]]  # operation -> (which input is the weights, their output axes)
    leaves: dict[int, tuple[int, ...]]  # index of a parameter that is used as weights directly -> its output axes


def as_int8(network: Network, *, trace_context: TraceContext = contextlib.nullcontext) -> Network:
    """Quantizes a network to int8; the activation ranges become part of its statistics.

    Args:
      network: a float32 network whose spec has `input_shape`.
      trace_context: context manager in which the forward pass is traced, for families with more than one form of it.
    """
    quantized = _Int8Network(network, trace_context)
    return Network(
        quantized.init,
        quantized.apply,
        {**network.spec, "deploy": "int8"},
        None if network.features is None else quantized.features,
        quantized.straight,
        quantized.fit,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Int8Network:
    """The functions of a quantized `Network`."""

    network: Network
    trace_context: TraceContext

    def init(self, key: jax.Array) -> Variables:
        """Initializes variables, with empty ranges."""
        variables = self.network.init(key)
        inputs = jax.ShapeDtypeStruct((2, *self.network.spec["input_shape"]), jnp.float32)
        count = len(self._plan(jax.eval_shape(self.network.init, key), inputs).sites)
        ranges = {"low": jnp.zeros(count), "high": jnp.zeros(count)}
        return Variables(variables.params, {NETWORK_STATS: variables.stats, RANGES: ranges})

    def fit(self, variables: Variables, inputs: jax.Array) -> Variables:
        """Sets the activation ranges to those of these inputs [B, ...]."""
        own = _network_variables(variables)
        extremes: dict[int, tuple[jax.Array, jax.Array]] = {}

        def record(site: int, array: jax.Array) -> jax.Array:
            extremes[site] = array.min(), array.max()
            return array

        _run(self._plan(own, inputs), own, inputs, record)
        low, high = (jnp.stack([extremes[site][i] for site in range(len(extremes))]) for i in (0, 1))
        return Variables(variables.params, {**variables.stats, RANGES: {"low": low, "high": high}})

    def apply(
        self, variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Variables]:
        """Quantized forward pass; in training, the float32 one."""
        if not train:
            return self._evaluate(variables, inputs)
        outputs: tuple[jax.Array, Variables] = _train(
            self.network.apply, variables, _network_variables(variables), inputs, key
        )
        return outputs

    def straight(
        self,
        variables: Variables,
        inputs: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        share: jax.typing.ArrayLike = 1.0,
    ) -> tuple[jax.Array, Variables]:
        """Quantized forward pass; in training, one whose weights moved this share of the way to the rounded ones."""
        if not train:
            return self._evaluate(variables, inputs)
        own = _network_variables(variables)
        rounded = _straight_through(self._plan(own, inputs), own, share)
        outputs: tuple[jax.Array, Variables] = _train(self.network.apply, variables, rounded, inputs, key)
        return outputs

    def features(
        self, variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Variables]:
        """Logits and features: in training of the float32 weights, in evaluation of the rounded ones."""
        assert self.network.features is not None
        own = _network_variables(variables)
        if train:
            outputs: tuple[tuple[jax.Array, dict[str, jax.Array]], Variables] = _train(
                self.network.features, variables, own, inputs, key
            )
            return outputs
        rounded = _straight_through(self._plan(own, inputs), own)
        return self.network.features(rounded, inputs, train=False)[0], variables

    def _plan(self, variables: Variables, inputs: Any) -> _Plan:
        with self.trace_context():
            traced = jax.make_jaxpr(lambda variables, inputs: self.network.apply(variables, inputs, train=False)[0])(
                variables, inputs
            )
        return _plan_of(flatten(traced), len(jax.tree.leaves(variables.params)), len(jax.tree.leaves(variables)))

    def _evaluate(self, variables: Variables, inputs: jax.Array) -> tuple[jax.Array, Variables]:
        own, ranges = _network_variables(variables), variables.stats[RANGES]
        quantize = functools.partial(_quantize_activation, ranges["low"], ranges["high"])
        return _run(self._plan(own, inputs), own, inputs, quantize), variables


def _train(
    forward: Callable[..., Any], variables: Variables, own: Variables, inputs: jax.Array, key: jax.Array | None
) -> Any:
    """Runs the network's forward pass in training with `own`, and puts its new statistics into `variables`."""
    outputs, after = forward(own, inputs, train=True, key=key)
    return outputs, Variables(variables.params, {**variables.stats, NETWORK_STATS: after.stats})


def _straight_through(plan: _Plan, variables: Variables, share: jax.typing.ArrayLike = 1.0) -> Variables:
    """Moves weights this share of the way to the rounded ones; gradients pass straight through."""
    leaves, tree = jax.tree.flatten(variables.params)
    for index, axes in plan.leaves.items():
        leaves[index] += share * jax.lax.stop_gradient(round_weights(leaves[index], axes) - leaves[index])
    return Variables(jax.tree.unflatten(tree, leaves), variables.stats)


def _network_variables(variables: Variables) -> Variables:
    """The variables of the network itself, without ranges."""
    return Variables(variables.params, variables.stats[NETWORK_STATS])


def has_batch_stats(variables: Variables) -> bool:
    """Whether a network, quantized or not, has statistics of its own, such as those of BatchNorm."""
    stats = variables.stats[NETWORK_STATS] if is_int8(variables) else variables.stats
    return bool(jax.tree.leaves(stats))


def is_int8(variables: Variables) -> bool:
    """Whether variables belong to a quantized network."""
    return isinstance(variables.stats, dict) and RANGES in variables.stats


def round_weights(weights: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Rounds weights to integers of at most WEIGHT_LEVELS times a scale, one scale for each entry of these axes."""
    others = tuple(axis for axis in range(weights.ndim) if axis not in axes)
    scale = jnp.abs(weights).max(others, keepdims=True) / WEIGHT_LEVELS
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.clip(jnp.round(weights / scale), -WEIGHT_LEVELS, WEIGHT_LEVELS) * scale


def _quantize_activation(low_S: jax.Array, high_S: jax.Array, site: int, array: jax.Array) -> jax.Array:
    """Quantizes the activation of a site to its range, widened to contain zero."""
    low, high = jnp.minimum(low_S[site], 0.0), jnp.maximum(high_S[site], 0.0)
    scale = (high - low) / ACTIVATION_LEVELS
    scale = jnp.where(scale > 0, scale, 1.0)
    zero = jnp.clip(jnp.round(-low / scale), 0, ACTIVATION_LEVELS)
    out: jax.Array = _quantize.bind(array, scale, zero)
    return out


def _nearest(array: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """ONNX's QuantizeLinear to uint8 and DequantizeLinear: halves round to even."""
    return (jnp.clip(jnp.round(array / scale) + zero, 0, ACTIVATION_LEVELS) - zero) * scale


def _plan_of(program: Program, params: int, variables: int) -> _Plan:
    """Decides what to quantize in a program whose first `variables` inputs are variables, the first `params` parameters."""
    producers = {number: operation for operation in program.operations for number in operation.outputs}
    users: dict[int, list[Operation]] = {}
    for operation in program.operations:
        for number in operation.inputs:
            users.setdefault(number, []).append(operation)
    fixed = {*program.inputs[:variables], *program.constants}  # arrays that do not depend on the network's inputs
    for operation in program.operations:
        if all(number in fixed for number in operation.inputs):
            fixed.update(operation.outputs)
    marked, weights, leaves = set[int](), dict[int, tuple[int, tuple[int, ...]]](), dict[int, tuple[int, ...]]()
    for i, operation in enumerate(program.operations):
        is_fixed = [number in fixed for number in operation.inputs]
        if operation.name not in PRODUCTS or sum(is_fixed) != 1:
            continue
        if program.avals[operation.outputs[0]].dtype != jnp.float32:
            continue
        which = is_fixed.index(True)
        weights[i] = which, _output_axes(operation, which, program.avals[operation.inputs[which]].ndim)
        if operation.inputs[which] in program.inputs[:params]:
            leaves[program.inputs.index(operation.inputs[which])] = weights[i][1]
        source = operation.inputs[1 - which]
        while source in producers and producers[source].name in RESHAPING:
            source = producers[source].inputs[0]
        marked.add(source)
        if (fused := _fused_output(operation.outputs[0], users, fixed)) not in program.outputs:
            marked.add(fused)
    order = [number for number in (*program.inputs, *producers) if number in marked]
    return _Plan(program, {number: site for site, number in enumerate(order)}, weights, leaves)


def _output_axes(operation: Operation, which: int, rank: int) -> tuple[int, ...]:
    """The axes of a product's weights that are axes of its output."""
    numbers = operation.params["dimension_numbers"]
    if operation.name == "conv_general_dilated":
        return (numbers.rhs_spec[0],)
    return tuple(sorted({*range(rank)} - {*numbers[0][which]}))


def _fused_output(number: int, users: dict[int, list[Operation]], fixed: set[int]) -> int:
    """The output of a product after all operations that a runtime fuses into it: scales, shifts and a ReLU."""
    while len(following := users.get(number, [])) == 1:
        (operation,) = following
        others = [other for other in operation.inputs if other != number]
        if operation.name not in (*RESHAPING, *AFFINE, "max") or any(other not in fixed for other in others):
            break
        number = operation.outputs[0]
        if operation.name == "max":
            break
    return number


def _run(
    plan: _Plan, variables: Variables, inputs: jax.Array, at_site: Callable[[int, jax.Array], jax.Array]
) -> jax.Array:
    """Runs the program with rounded weights, replacing the activation of each site by `at_site(site, activation)`."""
    program = plan.program

    def replaced(number: int, array: Any) -> Any:
        return at_site(plan.sites[number], array) if number in plan.sites else array

    arrays = dict(program.constants)
    leaves = zip(program.inputs, (*jax.tree.leaves(variables), inputs), strict=True)
    arrays.update((number, replaced(number, array)) for number, array in leaves)
    for i, operation in enumerate(program.operations):
        operands = [arrays[number] for number in operation.inputs]
        if i in plan.weights:
            which, axes = plan.weights[i]
            operands[which] = round_weights(operands[which], axes)
        results = zip(operation.outputs, operation.apply(operands), strict=True)
        arrays.update((number, replaced(number, array)) for number, array in results)
    out: jax.Array = arrays[program.outputs[0]]
    return out


def _quantize_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[jax.Array, Any]:
    """Straight-through estimator: the tangent passes where the entry lies inside the range."""
    array, scale, zero = primals
    out = _quantize.bind(array, scale, zero)
    tangent = tangents[0]
    if type(tangent) is ad.Zero:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    level = array / scale + zero
    return out, jnp.where((level >= 0) & (level <= ACTIVATION_LEVELS), tangent, 0.0)


def _quantize_batch(args: Sequence[Any], axes: Sequence[int | None]) -> tuple[jax.Array, int]:
    return jax.vmap(_nearest, in_axes=tuple(axes))(*args), 0


_quantize = Primitive("quantize")
_quantize.def_impl(_nearest)
_quantize.def_abstract_eval(lambda array, scale, zero: jax.core.ShapedArray(array.shape, array.dtype))
mlir.register_lowering(_quantize, mlir.lower_fun(_nearest, multiple_results=False))
batching.primitive_batchers[_quantize] = _quantize_batch
ad.primitive_jvps[_quantize] = _quantize_jvp
