"""A network in int8: what it computes as deployed, and how it trains for that.

In evaluation every product with weights, of matrices or a convolution, is of whole numbers: weights have 7 bits and a scale per
output channel (with 8, sums of two products overflow 16 bits on x86 processors without VNNI), what they meet has 8 bits, one
scale and one zero. What they make is rounded too, behind its BatchNorm or bias and ReLU, so that a runtime may keep all of it
in int8; the last one's outputs, the logits, are not. Here this is simulated in float32: each array is the nearest one that is a
scale times a whole number. `formats` writes the same as a file whose operators do compute in int8. The two are not the same bit
by bit: a sum in another order that falls to the other side of a half is another whole number, one in 100,000 at first, and each
layer makes some ten of one, up to a fifth of the entries of a ResNet-8's last layers, by one step.

Training has two forms, and in both gradients are biased on purpose, while what assess and decide score is not: it is the
student as deployed, up to that. `apply` trains in float32. `straight` rounds the weights, and the gradient passes straight
through (Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR 2018;
arXiv:1712.05877). Arms take it from a share of the budget on, when the student has nearly learned what it will (`arms/`).
Activations are rounded in neither: their ranges, the least and the greatest of some batches, are part of the statistics, and
`fit` finds them anew for each student that is proposed: those of the iterates of a trajectory are not those of their average.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ev3_distill.runtime.jaxpr import Operation, Program, flatten
from ev3_distill.types import Network, Variables

WHOLE, RANGES = "network", "ranges"  # in the statistics: the network's own, and those of activations
LARGEST = 64  # of a weight, as a whole number
LEVELS = 255  # of an activation
PRODUCTS = ("conv_general_dilated", "dot_general")
LAYOUT = ("reshape", "transpose", "squeeze", "copy", "stop_gradient")  # what leaves the entries as they are
AFFINE = ("add", "sub", "mul", "div")

Tracing = Callable[[], contextlib.AbstractContextManager[None]]


class _Plan(NamedTuple):
    """What of a program is rounded."""

    program: Program
    sites: dict[int, int]  # number of an array -> its place among the ranges
    weights: dict[
        int, tuple[int, tuple[int, ...]]
    ]  # step -> which of its inputs is the weights, and axes of its outputs
    leaves: dict[int, tuple[int, ...]]  # place among the parameters -> axes of its outputs, of weights as they are


def as_int8(network: Network, *, tracing: Tracing = contextlib.nullcontext) -> Network:
    """The network in int8, with the ranges of its activations among its statistics.

    Args:
      network: in float32, of a spec that tells its `input_shape`.
      tracing: inside which its forward pass is traced, for families that have more than one form of it.
    """

    def plan_of(variables: Variables, inputs: Any) -> _Plan:
        with tracing():
            traced = jax.make_jaxpr(lambda variables, inputs: network.apply(variables, inputs, train=False)[0])(
                variables, inputs
            )
        return _planned(flatten(traced), len(jax.tree.leaves(variables.params)), len(jax.tree.leaves(variables)))

    def init(key: jax.Array) -> Variables:
        variables = network.init(key)
        inputs = jax.ShapeDtypeStruct((2, *network.spec["input_shape"]), jnp.float32)
        count = len(plan_of(jax.eval_shape(network.init, key), inputs).sites)
        ranges = {"low": jnp.zeros(count), "high": jnp.zeros(count)}
        return Variables(variables.params, {WHOLE: variables.stats, RANGES: ranges})

    def straightened(plan: _Plan, variables: Variables, share: jax.typing.ArrayLike = 1.0) -> Variables:
        """With weights that are rounded, or on their way, and gradients that pass through."""
        leaves, tree = jax.tree.flatten(variables.params)
        for place, axes in plan.leaves.items():
            leaves[place] += share * jax.lax.stop_gradient(rounded(leaves[place], axes) - leaves[place])
        return Variables(jax.tree.unflatten(tree, leaves), variables.stats)

    def fit(variables: Variables, inputs: jax.Array) -> Variables:
        whole = _own(variables)
        found: dict[int, tuple[jax.Array, jax.Array]] = {}

        def watch(site: int, array: jax.Array) -> jax.Array:
            found[site] = array.min(), array.max()
            return array

        _run(plan_of(whole, inputs), whole, inputs, watch)
        low, high = (jnp.stack([found[site][i] for site in range(len(found))]) for i in (0, 1))
        return Variables(variables.params, {**variables.stats, RANGES: {"low": low, "high": high}})

    def trained(call: Callable[..., Any], variables: Variables, whole: Variables, inputs: jax.Array, key: Any) -> Any:
        """The training pass of a forward pass of the network's, of its own variables as they are given."""
        outputs, after = call(whole, inputs, train=True, key=key)
        return outputs, Variables(variables.params, {**variables.stats, WHOLE: after.stats})

    def evaluated(variables: Variables, inputs: jax.Array) -> tuple[jax.Array, Variables]:
        whole, ranges = _own(variables), variables.stats[RANGES]
        at_site = functools.partial(_at_site, ranges["low"], ranges["high"])
        return _run(plan_of(whole, inputs), whole, inputs, at_site), variables

    def apply(
        variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Variables]:
        if not train:
            return evaluated(variables, inputs)
        made: tuple[jax.Array, Variables] = trained(network.apply, variables, _own(variables), inputs, key)
        return made

    def straight(
        variables: Variables,
        inputs: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        share: jax.typing.ArrayLike = 1.0,
    ) -> tuple[jax.Array, Variables]:
        if not train:
            return evaluated(variables, inputs)
        whole = _own(variables)
        given = straightened(plan_of(whole, inputs), whole, share)
        made: tuple[jax.Array, Variables] = trained(network.apply, variables, given, inputs, key)
        return made

    features = None
    if (show := network.features) is not None:

        def features(variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None) -> Any:
            whole = _own(variables)
            if train:
                return trained(show, variables, whole, inputs, key)
            return show(straightened(plan_of(whole, inputs), whole), inputs, train=False)[0], variables

    return Network(init, apply, {**network.spec, "deploy": "int8"}, features, straight, fit)


def _own(variables: Variables) -> Variables:
    """The network's, without ranges."""
    return Variables(variables.params, variables.stats[WHOLE])


def normalises(variables: Variables) -> bool:
    """Whether a network has statistics of its own."""
    stats = variables.stats[WHOLE] if is_int8(variables) else variables.stats
    return bool(jax.tree.leaves(stats))


def is_int8(variables: Variables) -> bool:
    """Whether variables are those of a network in int8."""
    return isinstance(variables.stats, dict) and RANGES in variables.stats


def rounded(weights: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Weights as the nearest whole numbers up to LARGEST, times a scale for each entry of these axes."""
    others = tuple(axis for axis in range(weights.ndim) if axis not in axes)
    scale = jnp.abs(weights).max(others, keepdims=True) / LARGEST
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.clip(jnp.round(weights / scale), -LARGEST, LARGEST) * scale


def _at_site(low_S: jax.Array, high_S: jax.Array, site: int, array: jax.Array) -> jax.Array:
    """An activation, rounded; zero is among its levels."""
    low, high = jnp.minimum(low_S[site], 0.0), jnp.maximum(high_S[site], 0.0)
    scale = (high - low) / LEVELS
    scale = jnp.where(scale > 0, scale, 1.0)
    zero = jnp.clip(jnp.round(-low / scale), 0, LEVELS)
    out: jax.Array = _quantise.bind(array, scale, zero)
    return out


def _nearest(array: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """ONNX's QuantizeLinear to bytes and DequantizeLinear: halves are rounded to even."""
    return (jnp.clip(jnp.round(array / scale) + zero, 0, LEVELS) - zero) * scale


def _planned(program: Program, params: int, variables: int) -> _Plan:
    """What of a program is rounded, the first `variables` inputs of which are variables, parameters first."""
    makers = {number: step for step in program.operations for number in step.outputs}
    users: dict[int, list[Operation]] = {}
    for step in program.operations:
        for number in step.inputs:
            users.setdefault(number, []).append(step)
    fixed = {*program.inputs[:variables], *program.constants}
    for step in program.operations:
        if all(number in fixed for number in step.inputs):
            fixed.update(step.outputs)
    marked, weights, leaves = set[int](), dict[int, tuple[int, tuple[int, ...]]](), dict[int, tuple[int, ...]]()
    for i, step in enumerate(program.operations):
        held = [number in fixed for number in step.inputs]
        if step.name not in PRODUCTS or sum(held) != 1 or program.avals[step.outputs[0]].dtype != jnp.float32:
            continue
        which = held.index(True)
        weights[i] = which, _outputs_of(step, which, program.avals[step.inputs[which]].ndim)
        if step.inputs[which] in program.inputs[:params]:
            leaves[program.inputs.index(step.inputs[which])] = weights[i][1]
        source = step.inputs[1 - which]
        while source in makers and makers[source].name in LAYOUT:
            source = makers[source].inputs[0]
        marked.add(source)
        if (made := _settled(step.outputs[0], users, fixed)) not in program.outputs:
            marked.add(made)
    order = [number for number in (*program.inputs, *makers) if number in marked]
    return _Plan(program, {number: site for site, number in enumerate(order)}, weights, leaves)


def _outputs_of(step: Operation, which: int, rank: int) -> tuple[int, ...]:
    """The axes of a product's weights that are axes of what it makes."""
    numbers = step.params["dimension_numbers"]
    if step.name == "conv_general_dilated":
        return (numbers.rhs_spec[0],)
    return tuple(sorted({*range(rank)} - {*numbers[0][which]}))


def _settled(number: int, users: dict[int, list[Operation]], fixed: set[int]) -> int:
    """What a product makes, behind all that a runtime takes into it: scales, shifts and a ReLU."""
    while len(using := users.get(number, [])) == 1:
        (step,) = using
        others = [other for other in step.inputs if other != number]
        if step.name not in (*LAYOUT, *AFFINE, "max") or any(other not in fixed for other in others):
            break
        number = step.outputs[0]
        if step.name == "max":
            break
    return number


def _run(
    plan: _Plan, variables: Variables, inputs: jax.Array, at_site: Callable[[int, jax.Array], jax.Array]
) -> jax.Array:
    """The program's output with rounded weights, and with each activation at a site as `at_site` makes it."""
    program = plan.program

    def settled(number: int, array: Any) -> Any:
        return at_site(plan.sites[number], array) if number in plan.sites else array

    arrays = dict(program.constants)
    given = zip(program.inputs, (*jax.tree.leaves(variables), inputs), strict=True)
    arrays.update((number, settled(number, array)) for number, array in given)
    for i, step in enumerate(program.operations):
        taken = [arrays[number] for number in step.inputs]
        if i in plan.weights:
            which, axes = plan.weights[i]
            taken[which] = rounded(taken[which], axes)
        made = zip(step.outputs, step.apply(taken), strict=True)
        arrays.update((number, settled(number, array)) for number, array in made)
    out: jax.Array = arrays[program.outputs[0]]
    return out


def _quantise_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[jax.Array, Any]:
    """Straight through, where the range does not cut the entry off."""
    array, scale, zero = primals
    out = _quantise.bind(array, scale, zero)
    tangent = tangents[0]
    if type(tangent) is ad.Zero:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    level = array / scale + zero
    return out, jnp.where((level >= 0) & (level <= LEVELS), tangent, 0.0)


def _quantise_batch(args: Sequence[Any], axes: Sequence[int | None]) -> tuple[jax.Array, int]:
    return jax.vmap(_nearest, in_axes=tuple(axes))(*args), 0


_quantise = Primitive("quantise")
_quantise.def_impl(_nearest)
_quantise.def_abstract_eval(lambda array, scale, zero: jax.core.ShapedArray(array.shape, array.dtype))
mlir.register_lowering(_quantise, mlir.lower_fun(_nearest, multiple_results=False))
batching.primitive_batchers[_quantise] = _quantise_batch
ad.primitive_jvps[_quantise] = _quantise_jvp
