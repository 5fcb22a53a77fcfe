"""Names of students: `FAMILY:OPTION=VALUE,...`, `auto`, or a user's `MODULE:FACTORY`."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ev3_distill.errors import InputError
from ev3_distill.runtime.user_code import load_callable
from ev3_distill.students.registry import FAMILIES, build, spec_options
from ev3_distill.types import Network

LIST_OPTIONS = ("hidden", "filters", "blocks")  # options whose value is a list even if it has one entry
AUTO_RESNET_PIXELS = 16  # `auto` uses an mlp for images that are smaller along one side
KNOWN = f"{', '.join(FAMILIES)}, resnet8, auto"


def from_name(name: str, input_shape: Sequence[int], num_classes: int) -> Network:
    """Builds the network that a user names.

    Args:
      name: one of
        `FAMILY` or `FAMILY:OPTION=VALUE,...`, such as `mlp:hidden=32-32`; a value is an integer, or several joined by dashes;
        `resnet8`, `resnet20` and so on for `resnet:depth=8`;
        `auto`: an mlp for vectors and images below 16x16, a resnet8 for larger images, a convnet1d for sequences [L, C];
        `MODULE:FACTORY`: a callable (input_shape, num_classes, rngs) -> nnx.Module, importable or in the working directory.
      input_shape: of one example.
      num_classes: K.

    Raises:
      InputError: unknown family, option or factory.
    """
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    factory = import_factory(name)
    if factory is not None:
        return build({"factory": name, **shape}, factory=factory)
    family, options = _family_and_options(name, input_shape)
    return build({"family": family, **options, **shape})


def tiny(name: str, input_shape: Sequence[int], num_classes: int) -> Network:
    """A network of the named family, small enough to grow from; for a user's factory, the network itself.

    Args and errors are those of `from_name`.
    """
    network = from_name(name, input_shape, num_classes)
    if "factory" in network.spec:
        return network
    family = network.spec["family"]
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    return build({"family": family, **FAMILIES[family].tiny, **shape})


def name_of(spec: Mapping[str, Any]) -> str:
    """The name of the network of a spec, which `from_name` accepts."""
    if "factory" in spec:
        return str(spec["factory"])
    options = {key: value for key, value in spec_options(spec).items() if key not in ("input_shape", "num_classes")}
    parts = (
        f"{key}={'-'.join(map(str, value)) if isinstance(value, list) else value}" for key, value in options.items()
    )
    return f"{spec['family']}:{','.join(parts)}"


def import_factory(name: str) -> Callable[..., Any] | None:
    """Imports the callable that `MODULE:FACTORY` names; None if `name` is empty or names a family.

    Raises:
      InputError: `name` is neither, or the import fails.
    """
    module, _, attribute = name.partition(":")
    if not name or module in FAMILIES or re.fullmatch(r"auto|resnet\d+", module):
        return None
    if not module or not attribute:
        raise InputError(
            f"a student is one of {KNOWN} or MODULE:FACTORY; got '{name}': "
            "for example mlp:hidden=32-32, or my_module:make_student"
        )
    return load_callable(name, rule=f"a student is one of {KNOWN} or an importable MODULE:FACTORY")


def _family_and_options(name: str, input_shape: Sequence[int]) -> tuple[str, dict[str, int | list[int]]]:
    """The family and options of a name, with `resnet8` and `auto` resolved."""
    head, _, tail = name.partition(":")
    family, implied = head, []
    if head == "auto":
        family = _auto(input_shape)
    if depth := re.fullmatch(r"resnet(\d+)", family):
        family, implied = "resnet", [f"depth={depth[1]}"]
    pairs = [_option(name, part) for part in (*implied, *tail.split(",")) if part]
    options = dict(pairs)
    if len(options) < len(pairs):
        raise InputError(f"each option of a student may be given once; got '{name}': remove the duplicate")
    return family, options


def _auto(input_shape: Sequence[int]) -> str:
    if len(input_shape) == 2:
        return "convnet1d"
    return "resnet8" if len(input_shape) == 3 and min(input_shape[:2]) >= AUTO_RESNET_PIXELS else "mlp"


def _option(name: str, part: str) -> tuple[str, int | list[int]]:
    option, equals, value = part.partition("=")
    try:
        numbers = [int(piece) for piece in value.split("-")]
    except ValueError:
        numbers = []
    if not equals or not numbers or min(numbers) < 1:
        raise InputError(
            f"an option of a student is NAME=INTEGER or NAME=INTEGER-INTEGER, with integers from 1; got '{part}' in '{name}': "
            "try mlp:hidden=32-32"
        )
    return option, numbers if option in LIST_OPTIONS or len(numbers) > 1 else numbers[0]
