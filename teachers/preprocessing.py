"""From an example to a teacher's input, as `config.Preprocessing` says, and what can be found out about it beforehand.

Examples are images [H, W, C], sequences [L, C] or vectors [F]; uint8 means x / 255. For a sequence NHWC is [L, C] and NCHW
is [C, L].

References:
  Bilinear resizing with the triangle filter widened when shrinking, as in Pillow's `resize(BILINEAR)` and PyTorch's
  `interpolate(antialias=True)`. Grey is ITU-R BT.601 luma.
"""

import dataclasses
import functools
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError

IDENTITY = Preprocessing()
OPTION = "--teacher-input"
AXES = {"NHWC": (0, 1, 2), "NCHW": (2, 0, 1), "NWHC": (1, 0, 2), "NCWH": (2, 1, 0)}  # of [H, W, C]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Shape = Sequence[int | None]


def merged(options: Preprocessing, beside: Preprocessing) -> Preprocessing:
    """Options win over the file beside the teacher, field by field."""
    fields = [field.name for field in dataclasses.fields(Preprocessing)]
    return Preprocessing(**{name: getattr(options, name) or getattr(beside, name) for name in fields})


def normal(steps: Preprocessing, shape: Sequence[int]) -> Preprocessing:
    """The same steps without those that do nothing to examples of this shape, and without names: equal where they act alike."""
    identity = axes_of(steps.layout, len(shape)) == tuple(range(len(shape)))
    return Preprocessing(
        layout="" if identity else steps.layout,
        channels=0 if steps.channels == shape[-1] else steps.channels,
        order="" if steps.order == "RGB" else steps.order,
        resize=() if steps.resize == tuple(shape[:-1]) else steps.resize,
        scale=0.0 if steps.scale == 1 else steps.scale,
        mean=steps.mean if any(steps.mean) else (),
        std=steps.std if any(x != 1 for x in steps.std) else (),
    )


def read_beside(path: Path) -> Preprocessing:
    """What the file beside a teacher says: STEM.toml for a teacher STEM.onnx and the like, else teacher.toml.

    Args:
      path: of the teacher's file, or of its directory, in which `teacher.toml` is looked for.

    Raises:
      InputError: not TOML, an unknown key, or a value of a wrong type.
    """
    candidates = (
        [path / "teacher.toml"] if path.is_dir() else [path.with_suffix(".toml"), path.with_name("teacher.toml")]
    )
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        return IDENTITY
    try:
        content = tomllib.loads(found.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"a teacher's preprocessing is a TOML file; {found} is not ({error}): mend it") from None
    fields = {field.name: field.default for field in dataclasses.fields(Preprocessing)}
    for name, value in content.items():
        if name not in fields:
            raise InputError(f"a teacher's preprocessing is {', '.join(fields)}; got '{name}' in {found}: remove it")
        fields[name] = _typed(name, value, found)
    try:
        return Preprocessing(**fields)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{found}: {error}") from None


_KINDS: dict[str, tuple[type, str]] = {
    "layout": (str, 'a text, such as "NCHW"'),
    "channels": (int, "a whole number"),
    "order": (str, 'a text, such as "BGR"'),
    "resize": (int, "two whole numbers, such as [32, 32]"),
    "scale": (float, "a number"),
    "mean": (float, "numbers, such as [0.5]"),
    "std": (float, "numbers, such as [0.5]"),
    "classes": (str, 'texts, such as ["cat", "dog"]'),
}


def _typed(name: str, value: Any, path: Path) -> Any:
    kind, told = _KINDS[name]
    many = name in ("resize", "mean", "std", "classes")
    parts = value if isinstance(value, list) and many else [value]
    accepted = (int, float) if kind is float else (kind,)
    if any(not isinstance(part, accepted) or isinstance(part, bool) for part in parts) or (
        kind is str and many != isinstance(value, list)
    ):
        raise InputError(f"'{name}' in {path} is {told}; got {value!r}: write it so")
    return tuple(kind(part) for part in parts) if many else kind(value)


def settled(given: Preprocessing, shape: Sequence[int], wanted: Shape | None, *, source: str) -> Preprocessing:
    """The preprocessing with its layout decided, once it fits both sides.

    Args:
      given: options and the file beside the teacher, merged.
      shape: of one example of the data.
      wanted: of one example as the teacher takes it; None, or None in it, where that is not known.
      source: of the teacher.

    Raises:
      InputError: a step does not apply to these data, the sizes differ, or the layout is not given and not plain.
    """
    after = _after(given, tuple(shape), source)
    if wanted is None:
        return given
    if flattens(shape, wanted):
        return _flat(given, after, wanted[0], source)
    layouts = [given.layout] if given.layout else ["NHWC", "NCHW"] if len(after) > 1 else [""]
    fitting = [layout for layout in layouts if _fits(_laid(after, layout), wanted)]
    if len(fitting) == 1:
        return dataclasses.replace(given, layout=fitting[0])
    if fitting:
        raise InputError(
            f"a teacher's layout must be known; {source} takes {_told(wanted)}, which says nothing: give {OPTION}.layout "
            "NCHW (channels first, as PyTorch) or NHWC"
        )
    raise InputError(_mismatch(given, after, wanted, source))


def flattens(shape: Sequence[int], wanted: Shape | None) -> bool:
    """Whether the teacher takes vectors where the data are images or sequences."""
    return wanted is not None and len(wanted) == 1 and len(shape) > 1


def _after(given: Preprocessing, shape: tuple[int, ...], source: str) -> tuple[int, ...]:
    """The example's shape, channels last, once channels and size are the teacher's."""
    image = len(shape) == 3
    for name in ("channels", "order", "resize"):
        if getattr(given, name) and not image:
            raise InputError(
                f"{OPTION}.{name} is for images [H, W, C]; {source} shall take examples {list(shape)}: leave it out"
            )
    if given.layout and (len(shape) == 1 or (len(shape) == 2 and "WH" in given.layout)):
        raise InputError(f"{OPTION}.layout {given.layout} is not for examples {list(shape)} ({source}): leave it out")
    if given.channels and shape[-1] not in (given.channels, 1, 3):
        raise InputError(
            f"{OPTION}.channels makes grey of RGB or RGB of grey; the images have {shape[-1]} channels: convert the data"
        )
    channels = given.channels or shape[-1]
    if given.order == "BGR" and channels != 3:
        raise InputError(f"{OPTION}.order BGR is for 3 channels; the images have {channels}: leave it out")
    for name in ("mean", "std"):
        if (count := len(getattr(given, name))) not in (0, 1, channels):
            raise InputError(
                f"{OPTION}.{name} is one number or one per channel, {channels}; got {count} for {source}: mend it, or give "
                f"{OPTION}.channels"
            )
    return (*(given.resize or shape[:-1]), channels)


def _flat(given: Preprocessing, after: tuple[int, ...], wanted: int | None, source: str) -> Preprocessing:
    got = int(np.prod(after))
    if wanted not in (None, got):
        raise InputError(
            f"a teacher's input must be of the data's size; {source} takes {wanted} numbers, the examples {list(after)} have "
            f"{got}: give {OPTION}.resize or {OPTION}.channels, or take another teacher"
        )
    return dataclasses.replace(given, layout=given.layout or "NHWC")


def _laid(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes_of(layout, len(shape)))


def axes_of(layout: str, rank: int) -> tuple[int, ...]:
    """The axes of an example in the order of a layout."""
    if rank == 2:
        return (1, 0) if layout == "NCHW" else (0, 1)
    return AXES[layout or "NHWC"] if rank == 3 else tuple(range(rank))


def _fits(shape: Sequence[int], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(size in (one, None) for one, size in zip(shape, wanted, strict=True))


def _mismatch(given: Preprocessing, after: tuple[int, ...], wanted: Shape, source: str) -> str:
    """What differs, and the options that make it fit where there are any."""
    other = [layout for layout in AXES if layout != given.layout and len(after) > 1]
    fitting = [layout for layout in other if given.layout and _fits(_laid(after, layout), wanted)]
    way = f"give {OPTION}.layout {fitting[0]}" if fitting else ""
    for layout in [given.layout] if given.layout else ["NHWC", "NCHW"]:
        way = way or _conversion(after, wanted, layout)
    laid = f" in layout {given.layout}" if given.layout else ""
    return (
        f"a teacher's input must be of the data's size; {source} takes {_told(wanted)}, the examples are {list(after)}{laid}: "
        + (way or "take another teacher or other data")
    )


def _conversion(after: tuple[int, ...], wanted: Shape, layout: str) -> str:
    """The options that turn images [H, W, C] into the wanted shape, if such there are."""
    if len(after) != 3 or len(wanted) != 3:
        return ""
    by_axis = dict(zip(axes_of(layout, 3), wanted, strict=True))
    height, width, channels = (by_axis[axis] for axis in range(3))
    options = []
    if channels not in (None, after[2]):
        if channels not in (1, 3) or after[2] not in (1, 3):
            return ""
        options.append(f"{OPTION}.channels {channels}")
    if (height or after[0], width or after[1]) != after[:2]:
        options.append(f"{OPTION}.resize {height or after[0]} {width or after[1]}")
    return f"give {' '.join(options)}" if options else ""


def _told(shape: Shape) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def prepared(inputs: np.ndarray, steps: Preprocessing) -> np.ndarray:
    """Examples [B, ...] as the teacher takes them, float32; an image teacher that wants vectors gets them flattened later."""
    x: np.ndarray = inputs.astype(np.float32)
    if inputs.dtype == np.uint8:
        x /= np.float32(255)
    if inputs.ndim == 4:
        x = _coloured(x, steps)
        x = resized(x, steps.resize) if steps.resize else x
    if steps.scale:
        x *= np.float32(steps.scale)  # of a copy of our own, here and below
    if steps.mean:
        x -= np.array(steps.mean, np.float32)
    if steps.std:
        x /= np.array(steps.std, np.float32)
    axes = axes_of(steps.layout, inputs.ndim - 1)
    return np.ascontiguousarray(x.transpose(0, *(axis + 1 for axis in axes)))


def _coloured(images: np.ndarray, steps: Preprocessing) -> np.ndarray:
    if steps.channels and steps.channels != images.shape[-1]:
        grey = steps.channels == 1
        images = np.sum(images * _LUMA, axis=-1, keepdims=True) if grey else np.repeat(images, 3, axis=-1)
    return images[..., ::-1] if steps.order == "BGR" else images


def resized(images: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Images [B, H, W, C] at height and width `size`, bilinear, antialiased when shrinking."""
    for axis, new in ((1, size[0]), (2, size[1])):
        if images.shape[axis] != new:
            moved = np.tensordot(images, _weights(images.shape[axis], new), axes=(axis, 1))
            images = np.moveaxis(moved, -1, axis)
    return images


@functools.cache
def _weights(old: int, new: int) -> np.ndarray:
    """The share of each old pixel in each new one [new, old]: a triangle around its centre, at least one pixel wide."""
    ratio = old / new
    centres = (np.arange(new)[:, None] + 0.5) * ratio
    distance = np.abs(np.arange(old)[None] + 0.5 - centres) / max(ratio, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def option_text(changes: Mapping[str, Any]) -> str:
    """Fields of a `Preprocessing` as a user gives them on the command line."""
    words = []
    for name, value in changes.items():
        values = value if isinstance(value, tuple) else (value,)
        shown = (f"{v:.6g}" if isinstance(v, float) else shlex.quote(str(v)) for v in values)
        words.append(f"{OPTION}.{name} {' '.join(shown)}")
    return " ".join(words)
