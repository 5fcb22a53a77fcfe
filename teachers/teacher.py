"""What a teacher is: a program from examples to logits, with all that its outputs depend on summed up in a digest.

Shapes: B examples of a batch, K classes as delivered, R outputs of the program itself. Examples are uint8 or, in [0, 1]
where they are images, float32. A teacher's kind supplies a `Model`; `teacher_of` puts preprocessing and class order before
and behind it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError, summary
from ev3_distill.teachers.class_order import columns_of
from ev3_distill.teachers.preprocessing import IDENTITY, flattens, merged, normal, prepared, settled
from ev3_distill.types import Network, Variables

Outputs = dict[str, np.ndarray]


class BatchError(InputError):
    """A teacher failed on a batch, or gave outputs that cannot be used.

    Attributes:
      row: the first example of the batch that is at fault; None where it may be any of them.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher, ready to run."""

    source: str  # as the user named it
    digest: str  # sha256 (hex) of all that its outputs depend on: file bytes, preprocessing, feature names
    outputs: Callable[[np.ndarray], Outputs]  # inputs [B, ...] -> {"logits": float32 [B, K], FEATURE: float32 [B, ...]}
    num_classes: int | None  # None where only running it can tell
    class_names: tuple[str, ...] | None  # of the logits' columns as delivered
    params: int | None = None
    network: Network | None = (
        None  # of a JAX teacher that takes the data as they are: it may run inside the training step
    )
    variables: Variables | None = None
    preprocessing: Preprocessing | None = (
        None  # in force, teacher.toml and the layout found included; None for an ensemble
    )
    again: Callable[[Preprocessing], "Teacher"] | None = None  # the same program behind other preprocessing
    outputs_named: tuple[str, ...] | None = None  # the program's own R outputs in their order, where all have names
    members: tuple["Teacher", ...] = ()  # of an ensemble


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What a user asks of a teacher: its name, and the data that it shall be run on."""

    source: str
    options: Preprocessing
    input_shape: tuple[int, ...]  # of one example
    num_classes: int  # of the data, 0 where they have none
    class_names: tuple[str, ...]  # of the data, empty where they have none
    networks: Callable[[str], tuple[Network, Variables]] | None = None  # reads the directory of a flax: teacher
    load: Callable[[str], Teacher] | None = None  # a member of an ensemble
    kinds: tuple[str, ...] = ()  # of all teachers there are

    def expected_outputs(self, beside: Preprocessing) -> int:
        """R, as far as names or the data tell it, else 0."""
        return len(self.options.classes or beside.classes) or self.num_classes


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A teacher's program as its file gives it."""

    run: Callable[[np.ndarray], Outputs]  # prepared float32 [B, ...] -> {"logits": [B, R], FEATURE: [B, ...]}
    digest: str  # of its bytes and of which outputs are taken
    beside: Preprocessing = IDENTITY  # from the file beside it
    input_shape: tuple[int | None, ...] | None = None  # of one example; None, or None in it, where the program is free
    input_bytes: bool = False  # takes uint8: its scale is 255 unless another is given
    num_outputs: int | None = None  # R
    class_names: tuple[str, ...] | None = None
    params: int | None = None
    network: Network | None = None
    variables: Variables | None = None


def teacher_of(model: Model, request: Request) -> Teacher:
    """The teacher that a model makes on the data of a request.

    Raises:
      InputError: preprocessing, input size or classes of the two sides do not fit.
    """
    source, shape = request.source, request.input_shape
    given = merged(request.options, model.beside)
    if model.input_bytes and not given.scale:
        given = dataclasses.replace(given, scale=255.0)
    steps = settled(given, shape, model.input_shape, source=source)
    columns, raw_names = columns_of(
        given.classes, model.class_names, request.class_names, request.num_classes, model.num_outputs, source=source
    )
    names = raw_names if columns is None or raw_names is None else tuple(raw_names[column] for column in columns)
    plain = normal(steps, shape)
    as_they_are = columns is None and plain == IDENTITY and not flattens(shape, model.input_shape)
    return Teacher(
        source=source,
        digest=_digest(model, plain, columns),
        outputs=_outputs_of(model, request, steps, columns, len(raw_names or ())),
        num_classes=len(names or ()) or model.num_outputs or request.num_classes or None,
        class_names=names or request.class_names or None,
        params=model.params,
        network=model.network if as_they_are else None,
        variables=model.variables if as_they_are else None,
        preprocessing=steps,
        again=lambda options: teacher_of(model, dataclasses.replace(request, options=options)),
        outputs_named=raw_names or request.class_names or None,
    )


def _digest(model: Model, plain: Preprocessing, columns: np.ndarray | None) -> str:
    settings = dataclasses.asdict(plain)
    order = None if columns is None else columns.tolist()
    return hashlib.sha256(json.dumps([model.digest, settings, order]).encode()).hexdigest()


def _outputs_of(
    model: Model, request: Request, steps: Preprocessing, columns: np.ndarray | None, names: int
) -> Callable[[np.ndarray], Outputs]:
    """Prepares, runs, checks and orders."""
    flat = flattens(request.input_shape, model.input_shape)
    wanted = [model.num_outputs or names or request.num_classes]  # R; 0 until the first batch tells

    def outputs(inputs: np.ndarray) -> Outputs:
        ready = prepared(inputs, steps)
        raw = _run(model, ready.reshape(len(ready), -1) if flat else ready, request.source)
        checked = {name: _checked(name, value, len(inputs), request.source) for name, value in raw.items()}
        logits = checked["logits"]
        wanted[0] = wanted[0] or logits.shape[1]
        if logits.shape[1] != wanted[0]:
            raise BatchError(
                f"a teacher's logits must have one column per class, {wanted[0]}; {request.source} gives "
                f"{logits.shape[1]}: use a teacher of these classes, or name its outputs by --teacher-input.classes"
            )
        checked["logits"] = logits if columns is None else logits[:, columns]
        last = steps.layout in ("NCHW", "NCWH")
        return {name: _channels_last(value) if last and name != "logits" else value for name, value in checked.items()}

    return outputs


def _run(model: Model, ready: np.ndarray, source: str) -> Outputs:
    try:
        return model.run(ready)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of any library, and of the user's own code
        raise BatchError(
            f"a teacher must run on the data; {source} fails with {summary(error)} on a batch {list(ready.shape)} with values "
            f"from {ready.min():.3g} to {ready.max():.3g}: mend it, or its inputs by --teacher-input"
        ) from error


def _checked(name: str, value: object, examples: int, source: str) -> np.ndarray:
    """An output as float32, [B, R] for logits and [B, ...] for a feature."""
    array = np.asarray(value)
    shape = "[B, K]" if name == "logits" else "[B, ...]"
    right = array.dtype.kind in "fiu" and array.ndim >= 1 and len(array) == examples
    if not right or (name == "logits" and array.ndim != 2):
        raise BatchError(
            f"a teacher's {name} must be numbers {shape}; {source} gives {array.dtype} {list(array.shape)} for {examples} "
            "examples: mend it"
        )
    with np.errstate(over="ignore"):  # of float64, found below
        array = array.astype(np.float32, copy=False)
    finite = np.isfinite(array).reshape(examples, -1).all(axis=1)
    if not finite.all():
        row = int(finite.argmin())
        raise BatchError(
            f"a teacher's {name} must be finite; {source} gives nan or infinity for example {row} of a batch: check the "
            "teacher and its input scale",
            row,
        )
    return array


def _channels_last(feature: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C]; features without four axes stay."""
    return np.ascontiguousarray(feature.transpose(0, 2, 3, 1)) if feature.ndim == 4 else feature


def in_chunks(run: Callable[[np.ndarray], Outputs], *, least: int, most: int) -> Callable[[np.ndarray], Outputs]:
    """A program of `least` to `most` examples as one of any number: longer batches are split, a short one is padded.

    Args:
      run: prepared inputs [b, ...] -> outputs [b, ...].
      least: examples of the smallest batch that it takes, at least 1.
      most: of the largest.
    """

    def chunk(inputs: np.ndarray) -> Outputs:
        missing = max(0, least - len(inputs))
        padded = np.concatenate([inputs, np.repeat(inputs[-1:], missing, axis=0)]) if missing else inputs
        outputs = run(padded)
        if missing and any(np.ndim(value) < 1 or len(value) != least for value in outputs.values()):
            return outputs  # told by whoever checks the shapes
        return {name: value[: len(inputs)] for name, value in outputs.items()} if missing else outputs

    def whole(inputs: np.ndarray) -> Outputs:
        if len(inputs) <= most:
            return chunk(inputs)
        parts = [chunk(inputs[start : start + most]) for start in range(0, len(inputs), most)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return whole


def picked(
    shapes: Mapping[str, Sequence[int | None] | None], asked: Sequence[str], expected: int, *, source: str
) -> tuple[str, ...]:
    """The names of the outputs to take, logits first.

    Args:
      shapes: of the program's outputs by name, with the batch axis; None, or None in one, where it is not known.
      asked: the names that the user gave after `#`; the others' shapes do not matter then.
      expected: R, or 0.
      source: of the teacher.

    Raises:
      InputError: no name is given and it is not plain which output holds the logits.
    """
    if asked:
        return tuple(asked)
    sure = [n for n, shape in shapes.items() if shape is not None and len(shape) == 2 and shape[1] in (expected, None)]
    exact = [name for name in sure if expected and (shapes[name] or [])[1] == expected]
    for found in (exact, sure, list(shapes)):
        if len(found) == 1:
            return (found[0],)
    listed = ", ".join(f"{name} {_told_shape(shape)}" for name, shape in shapes.items())
    wanted = f"[B, {expected or 'K'}]"
    raise InputError(
        f"a teacher's logits {wanted} must be one of its outputs; {source} has {listed}: pick one, as in "
        f"{source.partition('#')[0]}#{next(iter(shapes), 'NAME')}"
    )


def _told_shape(shape: Sequence[int | None] | None) -> str:
    return "of unknown shape" if shape is None else f"[{', '.join('?' if d is None else str(d) for d in shape)}]"
