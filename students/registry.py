"""Students: one file per family, smallest first, and the ways to name, build, save and load one."""

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import atomic_directory
from ev3_distill.runtime.user_code import load_callable
from ev3_distill.students.families.conv4 import conv4
from ev3_distill.students.families.conv4 import grow as grow_conv4
from ev3_distill.students.families.convnet1d import convnet1d
from ev3_distill.students.families.convnet1d import grow as grow_convnet1d
from ev3_distill.students.families.mlp import grow as grow_mlp
from ev3_distill.students.families.mlp import mlp
from ev3_distill.students.families.mobilenet import grow as grow_mobilenet
from ev3_distill.students.families.mobilenet import mobilenet
from ev3_distill.students.families.resnet import grow as grow_resnet
from ev3_distill.students.families.resnet import resnet
from ev3_distill.students.families.transformer import grow as grow_transformer
from ev3_distill.students.families.transformer import transformer
from ev3_distill.students.families.vit import grow as grow_vit
from ev3_distill.students.families.vit import vit
from ev3_distill.students.growth.axes import Layout
from ev3_distill.students.layers.conv import standard
from ev3_distill.students.network import from_nnx, load_variables, save_variables
from ev3_distill.students.quantization import RANGES, as_int8
from ev3_distill.types import Network, Variables

__all__ = [
    "FAMILIES",
    "build",
    "deployed",
    "factory_of",
    "layout_of",
    "load",
    "load_variables",
    "mlp",
    "named",
    "save",
    "text_of",
    "tiny",
]


class Family(NamedTuple):
    """What a family's page makes of (input_shape, num_classes, and its options by name)."""

    network: Callable[..., Network]
    grow: Callable[..., Layout]  # how it grows, see students/grow.py
    tiny: Mapping[str, Any]  # options of a network small enough to begin with


FAMILIES = {
    "mlp": Family(mlp, grow_mlp, {"hidden": [2]}),
    "convnet1d": Family(convnet1d, grow_convnet1d, {"filters": [4, 4]}),
    "conv4": Family(conv4, grow_conv4, {"width": 2}),
    "resnet": Family(resnet, grow_resnet, {"depth": 8, "width": 2}),
    "mobilenet": Family(mobilenet, grow_mobilenet, {"blocks": [1, 1, 1], "filters": [8, 8, 16, 24, 64]}),
    "vit": Family(vit, grow_vit, {"width": 8, "depth": 1, "heads": 1}),
    "transformer": Family(transformer, grow_transformer, {"width": 8, "depth": 1, "heads": 1}),
}

_LISTS = ("hidden", "filters", "blocks")  # options that are lists whatever their length
_LEAST_RESNET = 16  # pixels: auto takes an mlp for smaller images
_KNOWN = f"{', '.join(FAMILIES)}, resnet8, auto"


def named(text: str, input_shape: Sequence[int], num_classes: int) -> Network:
    """The network that a user names.

    Args:
      text: `FAMILY` or `FAMILY:OPTION=VALUE,...` such as `mlp:hidden=32-32`, where a value is a whole number or several
        joined by dashes; `resnet8`, `resnet20` and so on for `resnet:depth=8`; `auto`, by input shape: an mlp for vectors
        and images below 16x16, a resnet8 for larger ones, a convnet1d for sequences [L, C]; or `MODULE:FACTORY`, a callable
        (input_shape, num_classes, rngs) -> nnx.Module of the user's own, the module being importable or in the working
        directory.
      input_shape: of one example.
      num_classes: K.

    Raises:
      InputError: no such family, option or factory.
    """
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    factory = factory_of(text)
    if factory is not None:
        return build({"factory": text, **shape}, factory=factory)
    family, options = _family_and_options(text, input_shape)
    return build({"family": family, **options, **shape})


def tiny(text: str, input_shape: Sequence[int], num_classes: int) -> Network:
    """A network of the family of `text`, as `named` takes it, small enough to grow from; of a user's own, itself."""
    network = named(text, input_shape, num_classes)
    if "factory" in network.spec:
        return network
    family = network.spec["family"]
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    return build({"family": family, **FAMILIES[family].tiny, **shape})


def text_of(spec: Mapping[str, Any]) -> str:
    """How a user names the network of this spec."""
    if "factory" in spec:
        return str(spec["factory"])
    options = {name: value for name, value in _options(spec).items() if name not in ("input_shape", "num_classes")}
    told = (
        f"{name}={'-'.join(map(str, value)) if isinstance(value, list) else value}" for name, value in options.items()
    )
    return f"{spec['family']}:{','.join(told)}"


def _family_and_options(text: str, input_shape: Sequence[int]) -> tuple[str, dict[str, int | list[int]]]:
    """What a name of a family, of a ResNet or `auto` stands for."""
    head, _, tail = text.partition(":")
    family, implied = head, []
    if head == "auto":
        family = _auto(input_shape)
    if depth := re.fullmatch(r"resnet(\d+)", family):
        family, implied = "resnet", [f"depth={depth[1]}"]
    pairs = [_option(text, part) for part in (*implied, *tail.split(",")) if part]
    options = dict(pairs)
    if len(options) < len(pairs):
        raise InputError(f"a student's option is given once; got '{text}': drop one")
    return family, options


def _auto(input_shape: Sequence[int]) -> str:
    if len(input_shape) == 2:
        return "convnet1d"
    return "resnet8" if len(input_shape) == 3 and min(input_shape[:2]) >= _LEAST_RESNET else "mlp"


def factory_of(text: str) -> Callable[..., Any] | None:
    """The callable that MODULE:FACTORY names; None where `text` is empty or names a family.

    Raises:
      InputError: it is neither, or cannot be imported.
    """
    module, _, name = text.partition(":")
    if not text or module in FAMILIES or re.fullmatch(r"auto|resnet\d+", module):
        return None
    if not module or not name:
        raise InputError(
            f"a student is one of {_KNOWN} or MODULE:FACTORY; got '{text}': "
            "for example mlp:hidden=32-32, or my_module:make_student"
        )
    return load_callable(text, rule=f"a student is one of {_KNOWN} or an importable MODULE:FACTORY")


def build(spec: Mapping[str, Any], *, factory: Callable[..., Any] | None = None) -> Network:
    """Rebuilds a network from its spec; one made by a user's factory needs that factory again.

    Raises:
      InputError: unknown family or option, a factory is needed, or what it makes is no network for these shapes.
    """
    rest = _options(spec)
    if "factory" not in spec:
        make = functools.partial(_family(spec).network, **rest)
    elif factory is None:
        raise InputError(
            f"this network was made by {spec['factory']}, and code is never imported because a file names it: pass that "
            "callable as factory=, to evaluate as --student, and instead of such a flax: teacher give logits:FILE"
        )
    else:
        of_user = factory
        make = functools.partial(from_nnx, lambda rngs: of_user(**rest, rngs=rngs), spec)
    name = spec.get("factory") or spec["family"]
    try:
        network = _deployed(make(), spec)
        got = _outputs(network, rest["input_shape"])
    except InputError:
        raise
    except Exception as error:  # of the user's own code, or of options that make no sense
        raise InputError(
            f"a student must map inputs [B, {_comma(rest['input_shape'])}] to logits [B, K]; {name} with {rest} fails with "
            f"{summary(error)}: mend it"
        ) from error
    if any(logits.shape != (2, rest["num_classes"]) or logits.dtype != jnp.float32 for logits in got):
        told = " and ".join(sorted({f"{logits.dtype} {list(logits.shape)}" for logits in got}))
        raise InputError(
            f"a student must give logits float32 [B, K], [2, {rest['num_classes']}] for 2 examples; {name} gives {told}: "
            "mend its last layer"
        )
    return network


def layout_of(spec: Mapping[str, Any], *, factory: Callable[..., Any] | None = None) -> Layout:
    """How a network grows. One of the user's own does where its factory has an attribute `grow`, a function.

    `grow` takes what the factory takes, without `rngs`, and returns a `students.layout.Layout`.

    Raises:
      InputError: unknown family or option, or a factory that has no such function.
    """
    if "factory" not in spec:
        return _family(spec).grow(**_options(spec))
    of_user = getattr(factory, "grow", None)
    if not callable(of_user):
        raise InputError(
            "a student of one's own grows where its factory has a function as attribute `grow`; "
            f"got {'no factory' if factory is None else 'none'} for {spec['factory']}: see students/grow.py, or take a family"
        )
    try:
        made = of_user(**_options(spec))
    except Exception as error:
        raise InputError(
            f"a factory's `grow` takes its options; that of {spec['factory']} with {_options(spec)} fails with "
            f"{summary(error)}: mend it"
        ) from error
    if not isinstance(made, Layout):
        raise InputError(
            f"a factory's `grow` returns a students.layout.Layout; got {type(made).__name__} of {spec['factory']}: mend it"
        )
    spaces = {axis.space for one in made.layers.values() for axis in one.axes if axis is not None}
    alike = {one.like for one in made.layers.values() if one.like is not None}
    if unknown := sorted((spaces - made.spaces.keys()) | (alike - made.layers.keys())):
        raise InputError(
            "a layout has the spaces and layers that its layers name; "
            f"got none of {', '.join(unknown)} from `grow` of {spec['factory']}: add what is missing"
        )
    return made


def _options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a spec gives to its family or factory."""
    return {name: value for name, value in spec.items() if name not in ("family", "factory", "deploy")}


def deployed(network: Network, precision: str) -> Network:
    """A network that trains for, and is scored as what is deployed: float32, itself, or int8.

    Raises:
      InputError: nothing in it can be in int8.
    """
    return network if precision == "float32" else _deployed(network, {"deploy": precision})


def _deployed(network: Network, spec: Mapping[str, Any]) -> Network:
    if "deploy" not in spec:
        return network
    if spec["deploy"] != "int8":
        raise InputError(f"a network is deployed in int8 or float32; got {spec['deploy']!r}: name one of these")
    made = as_int8(network, trace_context=standard)
    ranges = jax.eval_shape(made.init, jax.random.key(0)).stats[RANGES]
    if not ranges["low"].size:
        raise InputError(
            f"int8 is for networks that multiply by weights; {text_of(network.spec)} has no such product: leave out --deploy"
        )
    return made


def _family(spec: Mapping[str, Any]) -> Family:
    """Raises InputError where there is no such family, or it has no such options."""
    family = FAMILIES.get(spec.get("family", ""))
    if family is None:
        raise InputError(
            f"a network's family is one of {', '.join(FAMILIES)}; got {spec.get('family')!r}: name one of these"
        )
    shape, known = ("input_shape", "num_classes"), inspect.signature(family.network).parameters
    if unknown := [option for option in _options(spec) if option not in known]:
        raise InputError(
            f"the options of {spec['family']} are {', '.join(option for option in known if option not in shape)}; "
            f"got {', '.join(unknown)}: take one of those"
        )
    return family


def _outputs(network: Network, input_shape: Sequence[int]) -> list[jax.ShapeDtypeStruct]:
    """Shape and type of the logits for two examples, in evaluation and in training."""

    def forward(inputs: jax.Array) -> list[jax.Array]:
        key = jax.random.key(0)
        variables = network.init(key)
        return [network.apply(variables, inputs, train=train, key=key)[0] for train in (False, True)]

    outputs: list[jax.ShapeDtypeStruct] = jax.eval_shape(forward, jnp.zeros((2, *input_shape)))
    return outputs


def _comma(shape: Sequence[int]) -> str:
    return ", ".join(str(size) for size in shape)


def save(directory: Path, network: Network, variables: Variables) -> None:
    """Writes `spec.json` and the variables, atomically: the directory appears whole or not at all."""
    with atomic_directory(directory, overwrite=True) as temporary:
        (temporary / "spec.json").write_text(json.dumps(network.spec, indent=1) + "\n")
        save_variables(temporary / "variables", variables)


def load(directory: str | Path, *, factory: Callable[..., Any] | None = None) -> tuple[Network, Variables]:
    """Loads what `save` wrote.

    Args:
      directory: a run's `student/`, or the run itself.
      factory: for a network of the user's own, the callable that made its module.

    Returns:
      The network and its variables; `network.apply(variables, inputs, train=False)[0]` gives logits [B, K].

    Raises:
      InputError: nothing there, or not readable.
    """
    directory = Path(directory)
    if not (directory / "spec.json").exists() and (directory / "student" / "spec.json").exists():
        directory = directory / "student"
    try:
        spec = json.loads((directory / "spec.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"a saved network is a directory with spec.json and variables/; {directory} has none that can be read "
            f"({error}): name a finished run or its student/ directory"
        ) from None
    network = build(spec, factory=factory)
    return network, load_variables(directory / "variables", network)


def _option(text: str, part: str) -> tuple[str, int | list[int]]:
    name, equals, value = part.partition("=")
    try:
        numbers = [int(piece) for piece in value.split("-")]
    except ValueError:
        numbers = []
    if not equals or not numbers or min(numbers) < 1:
        raise InputError(
            f"a student's option is NAME=NUMBER or NAME=NUMBER-NUMBER, of numbers from 1; got '{part}' in '{text}': "
            "try mlp:hidden=32-32"
        )
    return name, numbers if name in _LISTS or len(numbers) > 1 else numbers[0]
