"""The Teacher type: a function from examples to outputs, and a digest of everything its outputs depend on.

Each kind of teacher supplies a `Model`; `build_teacher` adds preprocessing before it, checks its outputs against those
of the task, and puts the classes of a classification in order.

Shapes: B examples in a batch, K classes of the data, R outputs of the model itself. Examples are uint8, or float32; images in
float32 lie in [0, 1].
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError, summary
from ev3_distill.tasks.base import Task
from ev3_distill.teachers.class_order import ClassOrder, class_columns
from ev3_distill.teachers.output_meaning import (
    advice_on_infinite,
    columns_as_logits,
    labels_error,
    one_column_error,
    to_logits,
)
from ev3_distill.teachers.preprocessing import (
    IDENTITY,
    canonical,
    merge,
    needs_flattening,
    preprocess,
    resolve,
    shape_text,
)
from ev3_distill.types import Network, Variables

Outputs = dict[str, np.ndarray]
MAIN = "logits"  # name of a model's main output until the task names it; classification keeps the name


class BatchError(InputError):
    """A teacher failed on a batch, or returned unusable outputs.

    Attributes:
      row: index of the first faulty example in the batch; None if it may be any of them.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher, ready to run.

    Attributes:
      source: the teacher as the user named it.
      digest: SHA-256 (hex) of everything its outputs depend on: file content, preprocessing, class order, output names.
      outputs: inputs [B, ...] -> {NAME: float32 [B, ...], FEATURE: float32 [B, ...]}; NAME is that of the task's first teacher
        output, in classification `logits` [B, K].
      num_classes: K; None if only a run of the model can tell.
      class_names: of the columns of the logits.
      params: number of parameters, if known.
      network: of a JAX teacher that takes the data without preprocessing; it may run inside the training step.
      variables: of that network.
      preprocessing: in force, with the file beside the teacher and the resolved layout; None for an ensemble.
      with_preprocessing: builds the same teacher with other preprocessing; None if that is not possible.
      output_names: class names of the model's R outputs in its own order, if all have names.
      members: of an ensemble.
      notes: how outputs and classes were matched, where that is not obvious; sentences for the user.
      classifier: whether the file itself shows that its outputs are classes.
      recorded: whether its inputs are recorded outputs.
    """

    source: str
    digest: str
    outputs: Callable[[np.ndarray], Outputs]
    num_classes: int | None
    class_names: tuple[str, ...] | None
    params: int | None = None
    network: Network | None = None
    variables: Variables | None = None
    preprocessing: Preprocessing | None = None
    with_preprocessing: Callable[[Preprocessing], "Teacher"] | None = None
    output_names: tuple[str, ...] | None = None
    members: tuple["Teacher", ...] = ()
    notes: tuple[str, ...] = ()
    classifier: bool = False
    recorded: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Which teacher to load, and the data it will run on.

    Attributes:
      source: the teacher as the user named it.
      options: preprocessing options of the user.
      input_shape: of one example of the data.
      num_classes: classes of the data; 0 if unknown.
      class_names: of the data; empty if there are none.
      load_network: reads the directory of a `flax:` teacher.
      load_member: loads a member of an ensemble.
      kinds: names of all kinds of teachers.
      task: what the teacher's outputs mean; None: classification.
      offset: what was subtracted from the columns of the data, see `Dataset.offset`; teachers see the values as saved.
    """

    source: str
    options: Preprocessing
    input_shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    load_network: Callable[[str], tuple[Network, Variables]] | None = None
    load_member: Callable[[str], Teacher] | None = None
    kinds: tuple[str, ...] = ()
    task: Task | None = None
    offset: np.ndarray | None = None

    @property
    def main_output(self) -> str:
        """Name of the task's main teacher output."""
        return MAIN if self.task is None else next(iter(self.task.teacher_spec))

    @property
    def main_shape(self) -> tuple[int, ...] | None:
        """Shape of that output for one example; None in classification, where names or the first batch decide it."""
        if self.task is None or self.main_output == MAIN:
            return None
        return tuple(self.task.teacher_spec[self.main_output].shape)

    def expected_outputs(self, file_preprocessing: Preprocessing) -> int:
        """R as far as the names or the data determine it, else 0."""
        return len(self.options.classes or file_preprocessing.classes) or self.num_classes


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model as its file describes it.

    Attributes:
      run: preprocessed [B, ...] -> {"logits": [B, R], FEATURE: [B, ...]}. Inputs are float32, or float64 where the data
        have another offset.
      digest: of the file's content and of the names of the outputs in use.
      file_preprocessing: from the TOML file beside the model.
      input_shape: of one example; None, or None for an axis, if the model does not fix it.
      takes_uint8: whether inputs are uint8; the default scale is then 255.
      num_outputs: R.
      class_names: of the outputs, if the file has them.
      params: number of parameters, if known.
      network: of a JAX model.
      variables: of that network.
      notes: see `Teacher`.
      classifier: see `Teacher`.
      offset: what is subtracted from the columns of its inputs before it gets them, see `students.offset_of`.
    """

    run: Callable[[np.ndarray], Outputs]
    digest: str
    file_preprocessing: Preprocessing = IDENTITY
    input_shape: tuple[int | None, ...] | None = None
    takes_uint8: bool = False
    num_outputs: int | None = None
    class_names: tuple[str, ...] | None = None
    params: int | None = None
    network: Network | None = None
    variables: Variables | None = None
    notes: tuple[str, ...] = ()
    classifier: bool = False
    offset: np.ndarray | None = None


def build_teacher(model: Model, request: Request) -> Teacher:
    """Builds the teacher that runs a model on the data of a request.

    Raises:
      InputError: preprocessing, input size or classes do not fit the data.
    """
    source, shape = request.source, request.input_shape
    options = merge(request.options, model.file_preprocessing)
    if model.takes_uint8 and not options.scale:
        options = dataclasses.replace(options, scale=255.0)
    steps = resolve(options, shape, model.input_shape, source=source)
    order = _class_order(model, request, options)
    columns, output_names = order.columns, order.output_names
    classes = request.main_shape is None
    num_outputs = columns_as_logits(model.num_outputs, options.outputs)
    names = output_names if columns is None or output_names is None else tuple(output_names[i] for i in columns)
    effective = canonical(steps, shape)
    flat = needs_flattening(shape, model.input_shape)
    same = columns is None and effective == IDENTITY and _shift(model, request) is None
    untouched = same and not flat and model.num_outputs != 1
    return Teacher(
        source=source,
        digest=_digest(model, effective, columns),
        outputs=_output_function(model, request, steps, order),
        num_classes=(len(names or ()) or num_outputs or request.num_classes or None) if classes else None,
        class_names=(names or request.class_names or None) if classes else None,
        params=model.params,
        network=model.network if untouched else None,
        variables=model.variables if untouched else None,
        preprocessing=steps,
        with_preprocessing=lambda other: build_teacher(model, dataclasses.replace(request, options=other)),
        output_names=(output_names or request.class_names or None) if classes else None,
        notes=(*model.notes, *order.notes),
        classifier=model.classifier or model.class_names is not None,
    )


def _shift(model: Model, request: Request) -> np.ndarray | None:
    """What to add to an example of the data so that the model sees what it is made for; None: nothing."""
    if model.offset is None and request.offset is None:
        return None
    add, subtract = (np.zeros(1) if of is None else of for of in (request.offset, model.offset))
    return (add - subtract).reshape(request.input_shape) if (add != subtract).any() else None


def _class_order(model: Model, request: Request, options: Preprocessing) -> ClassOrder:
    """See `class_columns`; nothing in a task without classes."""
    if request.main_shape is None:
        columns = columns_as_logits(model.num_outputs, options.outputs)
        if columns == 1:
            raise one_column_error(request.num_classes, source=request.source)
        data = request.class_names, request.num_classes
        return class_columns(options.classes, model.class_names, *data, columns, source=request.source)
    task = request.task.name if request.task else ""
    for name, value in (("class names", ", ".join(options.classes)), ("a meaning to state", options.outputs)):
        if value:
            raise InputError(
                f"only the outputs of a classification have {name}; {request.source} is used for {task} with {value}: omit it"
            )
    return ClassOrder(None, None, ())


def _digest(model: Model, effective: Preprocessing, columns: np.ndarray | None) -> str:
    settings = dataclasses.asdict(effective)
    if not effective.outputs:
        del settings["outputs"]  # keeps the digests of caches and runs that are older than this field
    order = None if columns is None else columns.tolist()
    return hashlib.sha256(json.dumps([model.digest, settings, order]).encode()).hexdigest()


def _output_function(
    model: Model, request: Request, steps: Preprocessing, order: ClassOrder
) -> Callable[[np.ndarray], Outputs]:
    """A function that preprocesses inputs, runs the model, checks its outputs and puts the classes in order."""
    flat, shift = needs_flattening(request.input_shape, model.input_shape), _shift(model, request)
    channels_first = steps.layout in ("NCHW", "NCWH")
    known = columns_as_logits(model.num_outputs, steps.outputs) or len(order.output_names or ())
    width = known or request.num_classes  # of the logits; 0 until the first batch determines it

    def outputs(inputs: np.ndarray) -> Outputs:
        nonlocal width
        ready = preprocess(inputs, steps, shift)
        ready = ready if model.network is None else ready.astype(np.float32, copy=False)
        raw = _run(model, ready.reshape(len(ready), -1) if flat else ready, request.source)
        checked = {name: _checked(name, value, len(inputs), request, steps.outputs) for name, value in raw.items()}
        main = checked.pop(MAIN)
        features = {name: _channels_last(value) if channels_first else value for name, value in checked.items()}
        if request.main_shape is not None:
            return {request.main_output: main, **features}
        logits = to_logits(main, steps.outputs, source=request.source)
        if logits.shape[1] == 1:
            raise one_column_error(request.num_classes, source=request.source)
        width = width or logits.shape[1]
        if logits.shape[1] != width:
            raise BatchError(
                f"a teacher's logits must have one column per class, {width}; {request.source} gives {logits.shape[1]}: "
                "use a teacher of these classes, or name its outputs with --teacher-input.classes"
            )
        return {MAIN: logits if order.columns is None else logits[:, order.columns], **features}

    return outputs


def _run(model: Model, ready: np.ndarray, source: str) -> Outputs:
    try:
        return model.run(ready)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # libraries and user code may raise anything
        raise BatchError(
            f"a teacher must run on the data; {source} fails with {summary(error)} on a batch {list(ready.shape)} with values "
            f"from {ready.min():.3g} to {ready.max():.3g}: fix it, or change its inputs with --teacher-input"
        ) from error


def _checked(name: str, value: object, examples: int, request: Request, meaning: str) -> np.ndarray:
    """One output as float32, all finite: [B, R] for logits, [B, ...] for a feature, and the task's shape for its output."""
    array, source = np.asarray(value), request.source
    if name == MAIN and request.main_shape is None and array.shape == (examples,) and array.dtype.kind in "fiub":
        if array.dtype.kind != "f" and not meaning:
            raise labels_error(request.num_classes, source=source)
        array = array[:, None]
    valid = array.dtype.kind in "fiu" and array.ndim >= 1 and len(array) == examples
    shape, label = "[B, ...]", name
    main_shape = request.main_shape
    if name == MAIN and main_shape is None:
        shape, valid = "[B, K]", valid and array.ndim == 2
    elif name == MAIN and main_shape is not None:
        label, shape = request.main_output, str(["B", *main_shape]).replace("'", "")
        valid = valid and array.shape[1:] == main_shape
    if not valid:
        raise BatchError(
            f"a teacher's {label} must be numbers {shape}; {source} gives {array.dtype} {list(array.shape)} for {examples} "
            "examples: fix the teacher"
        )
    with np.errstate(over="ignore"):  # float64 may overflow; the check below finds it
        array = array.astype(np.float32, copy=False)
    finite = np.isfinite(array).reshape(examples, -1).all(axis=1)
    if not finite.all():
        row = int(finite.argmin())
        raise BatchError(
            f"a teacher's {label} must be finite; {source} gives nan or infinity for example {row} of a batch: "
            f"{advice_on_infinite(array)}",
            row,
        )
    return array


def _channels_last(feature: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C]; a feature without four axes is returned as it is."""
    return np.ascontiguousarray(feature.transpose(0, 2, 3, 1)) if feature.ndim == 4 else feature


def in_batches(run: Callable[[np.ndarray], Outputs], *, smallest: int, largest: int) -> Callable[[np.ndarray], Outputs]:
    """Wraps a model with limits on its batch size so that it takes any number of examples.

    Longer batches are split. A short batch is padded with its last example, and the padding is cut from the outputs.

    Args:
      run: preprocessed inputs [b, ...] -> outputs [b, ...].
      smallest: batch size that the model takes, at least 1.
      largest: batch size that the model takes.
    """

    def run_padded(inputs: np.ndarray) -> Outputs:
        missing = max(0, smallest - len(inputs))
        padded = np.concatenate([inputs, np.repeat(inputs[-1:], missing, axis=0)]) if missing else inputs
        outputs = run(padded)
        if missing and any(np.ndim(value) < 1 or len(value) != smallest for value in outputs.values()):
            return outputs  # of a wrong shape, which the caller reports
        return {name: value[: len(inputs)] for name, value in outputs.items()} if missing else outputs

    def run_all(inputs: np.ndarray) -> Outputs:
        if len(inputs) <= largest:
            return run_padded(inputs)
        parts = [run_padded(inputs[start : start + largest]) for start in range(0, len(inputs), largest)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return run_all


def pick_outputs(
    shapes: Mapping[str, Sequence[int | None] | None],
    names: Sequence[str],
    expected: int,
    *,
    source: str,
    normalized: Collection[str] = (),
) -> tuple[str, ...]:
    """Names of the outputs to use, logits first.

    Args:
      shapes: of the model's outputs by name, with the batch axis; None, or None for an axis, if unknown.
      names: the names that the user gave after `#`; if there are any, they are used as they are.
      expected: R, or 0 if unknown.
      source: the teacher, for errors.
      normalized: outputs after a softmax or a sigmoid. They are taken only where there is no other.

    Raises:
      InputError: no name is given and the output that holds the logits is ambiguous.
    """
    if names:
        return tuple(names)
    matrices = [
        n for n, shape in shapes.items() if shape is not None and len(shape) == 2 and shape[1] in (expected, None)
    ]
    exact = [name for name in matrices if expected and (shapes[name] or [])[1] == expected]
    if not expected:  # any width will do
        matrices = [name for name, shape in shapes.items() if shape is not None and len(shape) == 2]
    for group in (exact, matrices, list(shapes)):
        for candidates in (group, [name for name in group if name not in normalized]):
            if len(candidates) == 1:
                return (candidates[0],)
    listed = ", ".join(f"{name} {shape_text(shape)}" for name, shape in shapes.items())
    example = next((name for name in (*exact, *matrices, *shapes) if name not in normalized), "NAME")
    raise InputError(
        f"a teacher's logits [B, {expected or 'K'}] must be one of its outputs; {source} has {listed}: name one, as in "
        f"{source.partition('#')[0]}#{example}"
    )
