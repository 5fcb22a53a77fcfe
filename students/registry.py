"""The zoo of student families, and how a network is built from its spec."""

import copy
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ev3_distill.errors import InputError, summary
from ev3_distill.students.axes import GrowthSpec
from ev3_distill.students.families.conv4 import conv4, conv4_growth
from ev3_distill.students.families.convnet1d import convnet1d, convnet1d_growth
from ev3_distill.students.families.mlp import mlp, mlp_growth
from ev3_distill.students.families.mobilenet import mobilenet, mobilenet_growth
from ev3_distill.students.families.resnet import resnet, resnet_growth
from ev3_distill.students.families.transformer import transformer, transformer_growth
from ev3_distill.students.families.vit import vit, vit_growth
from ev3_distill.students.layers import standard_convolutions
from ev3_distill.students.network import describe_spec, from_nnx
from ev3_distill.students.quantization import RANGES, as_int8
from ev3_distill.students.standardization import STANDARDIZE, standardized_like
from ev3_distill.types import Network


class Family(NamedTuple):
    """A student family. Both functions take input_shape, num_classes and the family's options by name."""

    network: Callable[..., Network]
    growth: Callable[..., GrowthSpec]
    tiny: Mapping[str, Any]  # options of a small network to grow from


FAMILIES = {
    "mlp": Family(mlp, mlp_growth, {"hidden": [2]}),
    "convnet1d": Family(convnet1d, convnet1d_growth, {"filters": [4, 4]}),
    "conv4": Family(conv4, conv4_growth, {"width": 2}),
    "resnet": Family(resnet, resnet_growth, {"depth": 8, "width": 2}),
    "mobilenet": Family(mobilenet, mobilenet_growth, {"blocks": [1, 1, 1], "filters": [8, 8, 16, 24, 64]}),
    "vit": Family(vit, vit_growth, {"width": 8, "depth": 1, "heads": 1}),
    "transformer": Family(transformer, transformer_growth, {"width": 8, "depth": 1, "heads": 1}),
}


def build(spec: Mapping[str, Any], *, factory: Callable[..., Any] | None = None) -> Network:
    """Builds a network from its spec. Equal specs share one network, and so what was compiled for it.

    Args:
      spec: of the network, as in spec.json.
      factory: the user's factory, for a network that was created by one.

    Raises:
      InputError: unknown family or option, a missing factory, or a module with the wrong outputs.
    """
    if "factory" in spec or factory is not None:
        return _build(spec, factory)
    network = _shared(json.dumps(spec))
    return dataclasses.replace(network, spec=copy.deepcopy(network.spec))


@functools.lru_cache(32)
def _shared(spec: str) -> Network:
    return _build(json.loads(spec), None)


def _build(spec: Mapping[str, Any], factory: Callable[..., Any] | None) -> Network:
    options = spec_options(spec)
    if "factory" not in spec:
        make = functools.partial(_family(spec).network, **options)
    elif factory is None:
        raise InputError(
            f"this network was created by {spec['factory']}, and code is never imported because a file names it: pass the "
            "callable as factory=, or as --student of evaluate and export; as a teacher, use logits:FILE instead of flax:DIR"
        )
    else:
        make = functools.partial(from_nnx, functools.partial(_user_module, factory, options), spec)
    name = spec.get("factory") or spec["family"]
    try:
        network = _with_spec_precision(standardized_like(make(), spec), spec)
        outputs = _output_shapes(network, options["input_shape"])
    except InputError:
        raise
    except Exception as error:  # user code, or options that do not fit together
        shape = ", ".join(str(size) for size in options["input_shape"])
        raise InputError(
            f"a student must map inputs [B, {shape}] to logits [B, K]; {name} with {options} fails with {summary(error)}: "
            "fix the student or its options"
        ) from error
    num_classes = options["num_classes"]
    if any(logits.shape != (2, num_classes) or logits.dtype != jnp.float32 for logits in outputs):
        got = " and ".join(sorted({f"{logits.dtype} {list(logits.shape)}" for logits in outputs}))
        raise InputError(
            f"a student must return float32 logits [B, K], here [2, {num_classes}] for 2 examples; {name} returns {got}: fix "
            "its last layer"
        )
    return network


def growth_spec(spec: Mapping[str, Any], *, factory: Callable[..., Any] | None = None) -> GrowthSpec:
    """How the network of a spec can grow.

    A network created by a user's factory can grow if the factory has an attribute `grow`: a function of the factory's arguments
    without `rngs` that returns a `GrowthSpec`. See `students/growth/grow.py`.

    Args:
      spec: of the network.
      factory: the user's factory, for a network that was created by one.

    Raises:
      InputError: unknown family or option, or a factory without a valid `grow`.
    """
    options = spec_options(spec)
    if "factory" not in spec:
        return _family(spec).growth(**options)
    grow = getattr(factory, "grow", None)
    if not callable(grow):
        got = "no factory" if factory is None else "none"
        raise InputError(
            f"a student of your own grows only if its factory has a function as attribute `grow`; got {got} for "
            f"{spec['factory']}: see students/growth/grow.py, or use a family"
        )
    try:
        result = grow(**options)
    except Exception as error:  # user code
        raise InputError(
            f"a factory's `grow` takes the factory's options; that of {spec['factory']} with {options} fails with "
            f"{summary(error)}: fix `grow`"
        ) from error
    if not isinstance(result, GrowthSpec):
        raise InputError(
            f"a factory's `grow` returns a students.growth.GrowthSpec; got {type(result).__name__} from {spec['factory']}: "
            "fix `grow`"
        )
    spaces = {axis.space for layer in result.layers.values() for axis in layer.axes if axis is not None}
    if unknown := sorted(spaces - result.spaces.keys()):
        raise InputError(
            f"a GrowthSpec contains every space that its layers name; got no {', '.join(unknown)} from `grow` of "
            f"{spec['factory']}: add what is missing"
        )
    return result


def spec_options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a spec passes to its family or factory."""
    return {name: value for name, value in spec.items() if name not in ("family", "factory", "deploy", STANDARDIZE)}


def with_precision(network: Network, precision: str) -> Network:
    """The network as it is deployed: itself in float32, or its quantized form in int8.

    Raises:
      InputError: the network has no product with weights that int8 could speed up.
    """
    return network if precision == "float32" else _with_spec_precision(network, {"deploy": precision})


def _with_spec_precision(network: Network, spec: Mapping[str, Any]) -> Network:
    if "deploy" not in spec:
        return network
    if spec["deploy"] != "int8":
        raise InputError(f"a network is deployed in int8 or float32; got {spec['deploy']!r}: use one of these")
    quantized = as_int8(network, trace_context=standard_convolutions)
    ranges = jax.eval_shape(quantized.init, jax.random.key(0)).stats[RANGES]
    if not ranges["low"].size:
        raise InputError(
            f"int8 needs a network that multiplies by weights; {describe_spec(network.spec)} has no such product: omit "
            "--deploy"
        )
    return quantized


def _family(spec: Mapping[str, Any]) -> Family:
    """Raises InputError if the family or one of its options does not exist."""
    family = FAMILIES.get(spec.get("family", ""))
    if family is None:
        raise InputError(
            f"a network's family is one of {', '.join(FAMILIES)}; got {spec.get('family')!r}: use one of these"
        )
    shape, known = ("input_shape", "num_classes"), inspect.signature(family.network).parameters
    if unknown := [option for option in spec_options(spec) if option not in known]:
        raise InputError(
            f"the options of {spec['family']} are {', '.join(option for option in known if option not in shape)}; "
            f"got {', '.join(unknown)}: use one of those"
        )
    return family


def _user_module(factory: Callable[..., Any], options: Mapping[str, Any], rngs: nnx.Rngs) -> Any:
    return factory(**options, rngs=rngs)


def _output_shapes(network: Network, input_shape: Sequence[int]) -> list[jax.ShapeDtypeStruct]:
    """Shape and dtype of the logits for two examples, in evaluation and in training."""

    def forward(inputs: jax.Array) -> list[jax.Array]:
        key = jax.random.key(0)
        variables = network.init(key)
        return [network.apply(variables, inputs, train=train, key=key)[0] for train in (False, True)]

    outputs: list[jax.ShapeDtypeStruct] = jax.eval_shape(forward, jax.ShapeDtypeStruct((2, *input_shape), jnp.float32))
    return outputs
