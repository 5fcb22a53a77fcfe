"""Preprocessing: turns examples of the data into the inputs of a teacher, as `config.Preprocessing` describes.

Examples are images [H, W, C], sequences [L, C] or vectors [F]; uint8 means x / 255. For a sequence, NHWC is [L, C] and NCHW is
[C, L].

References:
  Bilinear resizing with a triangle filter, widened when shrinking, as Pillow's `resize(BILINEAR)` and PyTorch's
  `interpolate(antialias=True)`. Gray is the luma of ITU-R BT.601.
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
from ev3_distill.teachers.output_meaning import LOGITS

IDENTITY = Preprocessing()
OPTION = "--teacher-input"
AXES = {"NHWC": (0, 1, 2), "NCHW": (2, 0, 1), "NWHC": (1, 0, 2), "NCWH": (2, 1, 0)}  # of [H, W, C]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Shape = Sequence[int | None]  # of one example; None for an axis of unknown size


# Descriptions.


def merge(options: Preprocessing, file: Preprocessing) -> Preprocessing:
    """Combines the user's options with the file beside the teacher. Options win, field by field."""
    fields = [field.name for field in dataclasses.fields(Preprocessing)]
    return Preprocessing(**{name: getattr(options, name) or getattr(file, name) for name in fields})


def canonical(steps: Preprocessing, shape: Sequence[int]) -> Preprocessing:
    """Drops class names and every step without effect on examples of this shape. Results are equal if the effects are."""
    identity = axes_of(steps.layout, len(shape)) == tuple(range(len(shape)))
    return Preprocessing(
        layout="" if identity else steps.layout,
        channels=0 if steps.channels == shape[-1] else steps.channels,
        order="" if steps.order == "RGB" else steps.order,
        resize=() if steps.resize == tuple(shape[:-1]) else steps.resize,
        scale=0.0 if steps.scale == 1 else steps.scale,
        mean=steps.mean if any(steps.mean) else (),
        std=steps.std if any(x != 1 for x in steps.std) else (),
        outputs="" if steps.outputs == LOGITS else steps.outputs,
    )


def read_preprocessing_file(path: Path) -> Preprocessing:
    """Reads the TOML file beside a teacher: STEM.toml for STEM.onnx and the like, else teacher.toml.

    Args:
      path: the teacher's file, or its directory, which may hold `teacher.toml`.

    Returns:
      Its content; `IDENTITY` if there is no such file.

    Raises:
      InputError: the file is not TOML, has an unknown key, or a value of the wrong type.
    """
    candidates = (
        [path / "teacher.toml"] if path.is_dir() else [path.with_suffix(".toml"), path.with_name("teacher.toml")]
    )
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        return IDENTITY
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"a teacher's preprocessing is a TOML file; {file} cannot be read ({error}): fix it") from None
    fields = {field.name: field.default for field in dataclasses.fields(Preprocessing)}
    for name, value in content.items():
        if name not in fields:
            raise InputError(
                f"a teacher's preprocessing has the keys {', '.join(fields)}; got '{name}' in {file}: remove it"
            )
        fields[name] = _typed(name, value, file)
    try:
        return Preprocessing(**fields)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


_VALUES: dict[str, tuple[type, str]] = {
    "layout": (str, 'a text, such as "NCHW"'),
    "channels": (int, "an integer"),
    "order": (str, 'a text, such as "BGR"'),
    "resize": (int, "two integers, such as [32, 32]"),
    "scale": (float, "a number"),
    "mean": (float, "numbers, such as [0.5]"),
    "std": (float, "numbers, such as [0.5]"),
    "classes": (str, 'texts, such as ["cat", "dog"]'),
    "outputs": (str, 'a text, such as "probabilities"'),
}


def _typed(name: str, value: Any, path: Path) -> Any:
    kind, description = _VALUES[name]
    many = name in ("resize", "mean", "std", "classes")
    parts = value if isinstance(value, list) and many else [value]
    accepted = (int, float) if kind is float else (kind,)
    if any(not isinstance(part, accepted) or isinstance(part, bool) for part in parts) or (
        kind is str and many != isinstance(value, list)
    ):
        raise InputError(f"'{name}' in {path} is {description}; got {value!r}: change it")
    return tuple(kind(part) for part in parts) if many else kind(value)


def command_line_options(changes: Mapping[str, Any]) -> str:
    """Fields of a `Preprocessing` as command-line options."""
    words = []
    for name, value in changes.items():
        values = value if isinstance(value, tuple) else (value,)
        shown = (f"{v:.6g}" if isinstance(v, float) else shlex.quote(str(v)) for v in values)
        words.append(f"{OPTION}.{name} {' '.join(shown)}")
    return " ".join(words)


def shape_text(shape: Shape | None) -> str:
    """A shape for an error message, with `?` for an axis of unknown size."""
    if shape is None:
        return "of unknown shape"
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


# Checks against the data and the teacher.


def resolve(options: Preprocessing, shape: Sequence[int], model_shape: Shape | None, *, source: str) -> Preprocessing:
    """Determines the layout and checks that preprocessed examples fit the teacher.

    Args:
      options: the user's options merged with the file beside the teacher.
      shape: of one example of the data.
      model_shape: of one example as the model takes it; None, or None for an axis, if unknown.
      source: the teacher, for errors.

    Raises:
      InputError: a step does not apply to these data, the sizes differ, or the layout is not given and is ambiguous.
    """
    after = _shape_after_steps(options, tuple(shape), source)
    if model_shape is None:
        return options
    if needs_flattening(shape, model_shape):
        return _resolve_flat(options, after, model_shape[0], source)
    layouts = [options.layout] if options.layout else ["NHWC", "NCHW"] if len(after) > 1 else [""]
    fitting = [layout for layout in layouts if _fits(_transposed(after, layout), model_shape)]
    if len(fitting) == 1:
        return dataclasses.replace(options, layout=fitting[0])
    if fitting:
        raise InputError(
            f"a teacher's layout must be known; {source} takes {shape_text(model_shape)}, which fits both layouts: give "
            f"{OPTION}.layout NCHW (channels first, as in PyTorch) or NHWC"
        )
    raise InputError(_mismatch(options, after, model_shape, source))


def needs_flattening(shape: Sequence[int], model_shape: Shape | None) -> bool:
    """Whether the teacher takes vectors while the data are images or sequences."""
    return model_shape is not None and len(model_shape) == 1 and len(shape) > 1


def _shape_after_steps(options: Preprocessing, shape: tuple[int, ...], source: str) -> tuple[int, ...]:
    """Shape of an example, channels last, after the steps that change channels and size."""
    is_image = len(shape) == 3
    for name in ("channels", "order", "resize"):
        if getattr(options, name) and not is_image:
            raise InputError(
                f"{OPTION}.{name} is for images [H, W, C]; {source} runs on examples {list(shape)}: leave it out"
            )
    if options.layout and (len(shape) == 1 or (len(shape) == 2 and "WH" in options.layout)):
        raise InputError(f"{OPTION}.layout {options.layout} is not for examples {list(shape)} ({source}): leave it out")
    if options.channels and shape[-1] not in (options.channels, 1, 3):
        raise InputError(
            f"{OPTION}.channels converts between RGB and gray; the images have {shape[-1]} channels: convert the data"
        )
    channels = options.channels or shape[-1]
    if options.order == "BGR" and channels != 3:
        raise InputError(f"{OPTION}.order BGR is for 3 channels; the images have {channels}: leave it out")
    for name in ("mean", "std"):
        if (count := len(getattr(options, name))) not in (0, 1, channels):
            raise InputError(
                f"{OPTION}.{name} is one number or one per channel, {channels}; got {count} for {source}: change it, or give "
                f"{OPTION}.channels"
            )
    return (*(options.resize or shape[:-1]), channels)


def _resolve_flat(options: Preprocessing, after: tuple[int, ...], model_size: int | None, source: str) -> Preprocessing:
    size = int(np.prod(after))
    if model_size not in (None, size):
        raise InputError(
            f"a teacher's input must have the size of the examples; {source} takes {model_size} numbers, the examples "
            f"{list(after)} have {size}: give {OPTION}.resize or {OPTION}.channels, or use another teacher"
        )
    return dataclasses.replace(options, layout=options.layout or "NHWC")


def axes_of(layout: str, rank: int) -> tuple[int, ...]:
    """Axes of an example in the order of a layout."""
    if rank == 2:
        return (1, 0) if layout == "NCHW" else (0, 1)
    return AXES[layout or "NHWC"] if rank == 3 else tuple(range(rank))


def _transposed(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes_of(layout, len(shape)))


def _fits(shape: Sequence[int], model_shape: Shape) -> bool:
    return len(shape) == len(model_shape) and all(
        expected in (size, None) for size, expected in zip(shape, model_shape, strict=True)
    )


def _mismatch(options: Preprocessing, after: tuple[int, ...], model_shape: Shape, source: str) -> str:
    """The error for shapes that differ, with the options that would make them fit."""
    others = [layout for layout in AXES if layout != options.layout and len(after) > 1]
    fitting = [layout for layout in others if options.layout and _fits(_transposed(after, layout), model_shape)]
    fix = f"give {OPTION}.layout {fitting[0]}" if fitting else ""
    for layout in [options.layout] if options.layout else ["NHWC", "NCHW"]:
        fix = fix or _conversion(after, model_shape, layout)
    in_layout = f" in layout {options.layout}" if options.layout else ""
    return (
        f"a teacher's input must have the size of the examples; {source} takes {shape_text(model_shape)}, the examples are "
        f"{list(after)}{in_layout}: {fix or 'use another teacher or other data'}"
    )


def _conversion(after: tuple[int, ...], model_shape: Shape, layout: str) -> str:
    """The options that convert images [H, W, C] to the model's shape; empty if there are none."""
    if len(after) != 3 or len(model_shape) != 3:
        return ""
    by_axis = dict(zip(axes_of(layout, 3), model_shape, strict=True))
    height, width, channels = (by_axis[axis] for axis in range(3))
    options = []
    if channels not in (None, after[2]):
        if channels not in (1, 3) or after[2] not in (1, 3):
            return ""
        options.append(f"{OPTION}.channels {channels}")
    if (height or after[0], width or after[1]) != after[:2]:
        options.append(f"{OPTION}.resize {height or after[0]} {width or after[1]}")
    return f"give {' '.join(options)}" if options else ""


# Application.


def preprocess(inputs: np.ndarray, steps: Preprocessing, shift: np.ndarray | None = None) -> np.ndarray:
    """Applies the steps to examples [B, ...]: shift, channels, order, resize, scale, mean, std, layout.

    Args:
      inputs: uint8, which counts as x / 255, or float32.
      steps: to apply.
      shift: what to add to an example first, float64.

    Returns:
      float32, or float64 with a shift, in the teacher's layout. For a teacher of vectors the caller flattens them.
    """
    x: np.ndarray = inputs.astype(np.float32 if shift is None else np.float64)
    if inputs.dtype == np.uint8:
        x /= np.float32(255)
    if shift is not None:
        x += shift
    if inputs.ndim == 4:
        x = _convert_channels(x, steps)
        x = resize_images(x, steps.resize) if steps.resize else x
    if steps.scale:
        x *= x.dtype.type(steps.scale)  # in place: x is a copy
    if steps.mean:
        x -= np.array(steps.mean, x.dtype)
    if steps.std:
        x /= np.array(steps.std, x.dtype)
    axes = axes_of(steps.layout, inputs.ndim - 1)
    return np.ascontiguousarray(x.transpose(0, *(axis + 1 for axis in axes)))


def _convert_channels(images: np.ndarray, steps: Preprocessing) -> np.ndarray:
    if steps.channels and steps.channels != images.shape[-1]:
        to_gray = steps.channels == 1
        images = np.sum(images * _LUMA, axis=-1, keepdims=True) if to_gray else np.repeat(images, 3, axis=-1)
    return images[..., ::-1] if steps.order == "BGR" else images


def resize_images(images: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resizes images [B, H, W, C] to height and width `size`: bilinear, antialiased when shrinking."""
    for axis, new in ((1, size[0]), (2, size[1])):
        if images.shape[axis] != new:
            moved = np.tensordot(images, _weights(images.shape[axis], new), axes=(axis, 1))
            images = np.moveaxis(moved, -1, axis)
    return images


@functools.cache
def _weights(old: int, new: int) -> np.ndarray:
    """Weight of each old pixel in each new one [new, old]: a triangle around its center, at least one pixel wide."""
    ratio = old / new
    centers = (np.arange(new)[:, None] + 0.5) * ratio
    distance = np.abs(np.arange(old)[None] + 0.5 - centers) / max(ratio, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
