"""`torch:FILE.pt2`: a program of torch.export, run on the CPU. `torch:FILE.pt2#LOGITS,FEATURE,...` names its outputs.

The outputs are named by the keys of the dictionary that the program returns, or 0, 1, ... by their place in the tuple.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import sha256_of
from ev3_distill.teachers.kinds.normalized_outputs import Normalized, notes_on
from ev3_distill.teachers.kinds.onnx import LARGEST_BATCH, as_type
from ev3_distill.teachers.kinds.torch_archive import SAVE, safe_archive
from ev3_distill.teachers.loading import digest_of, import_package, split_file_and_outputs
from ev3_distill.teachers.preprocessing import read_preprocessing_file
from ev3_distill.teachers.teacher import Model, Outputs, Request, Teacher, build_teacher, in_batches, pick_outputs

INSTALL = "ev3-distill[torch]"
_NORMALIZERS = {"aten.softmax.int": "softmax", "aten._softmax.default": "softmax", "aten.sigmoid.default": "sigmoid"}
_TRAINING = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}  # operator -> index of its argument `training`


def torch_teacher(place: str, request: Request) -> Teacher:
    """Loads an archive of torch.export without unpickling anything.

    Raises:
      InputError: the file is missing, damaged or no such archive, could run code when loaded, or does not fit the data.
    """
    path, names = split_file_and_outputs(place, kind="torch")
    torch = import_package("torch", kind="torch", install=INSTALL)
    file_preprocessing = read_preprocessing_file(path)
    program = _program(path, torch)
    entry = _input(program, request.source)
    shapes = _shapes(program)
    if unknown := [name for name in names if name not in shapes]:
        raise InputError(
            f"a name after # is an output; got {', '.join(unknown)} in {request.source}: the outputs are {', '.join(shapes)}"
        )
    normalized = _normalized(program, list(shapes))
    expected = request.expected_outputs(file_preprocessing)
    taken = pick_outputs(shapes, names, expected, source=request.source, normalized=normalized)
    smallest, largest = _batch_limits(program, entry)
    logits = shapes[taken[0]]
    model = Model(
        run=in_batches(_runner(program, entry.dtype, shapes, taken, torch), smallest=smallest, largest=largest),
        digest=digest_of(["torch", *taken, sha256_of(path)]),
        file_preprocessing=file_preprocessing,
        input_shape=_sizes(entry)[1:],
        takes_uint8=entry.dtype == torch.uint8,
        num_outputs=logits[1] if logits and len(logits) == 2 else None,
        params=sum(weight.numel() for weight in program.parameters()),
        notes=notes_on(taken[0], names, normalized, source=request.source, inside=False),
    )
    return build_teacher(model, request)


def _program(path: Path, torch: Any) -> Any:
    if path.suffix != ".pt2":
        raise InputError(
            f"torch:FILE.pt2 needs a program of torch.export, because a state dict has no network and a pickled network may "
            f"run any code; got {path}: load the network in Python and run {SAVE}"
        )
    try:
        program = torch.export.load(safe_archive(path))
    except InputError:
        raise
    except Exception as error:  # torch raises many types for a damaged file or another version
        raise InputError(
            f"torch:FILE.pt2 needs a program that this version of PyTorch ({torch.__version__}) loads; {path} fails with "
            f"{summary(error)}: export it again"
        ) from None
    for node in program.graph.nodes:
        place = _TRAINING.get(str(node.target))
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise InputError(
                f"a teacher is exported in evaluation mode; {path} has {node.target} in training mode: call model.eval() "
                f"first, as in {SAVE}"
            )
    return program


def _input(program: Any, source: str) -> Any:
    """The placeholder of the batch; its shape may be symbolic."""
    wanted = program.graph_signature.user_inputs
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    if len(wanted) != 1 or len(values) != 1 or not hasattr(values[0], "dtype") or not len(values[0].shape):
        raise InputError(
            f"a teacher has one input, the examples; {source} has {len(wanted)} ({', '.join(map(str, wanted)) or 'none'}): "
            "export it with one, or wrap it in a python:MODULE:FUNCTION teacher"
        )
    if values[0].dtype.is_complex or str(values[0].dtype) == "torch.bool":
        raise InputError(f"a teacher's input is numbers; {source} takes {values[0].dtype}: export it with float32")
    return values[0]


def _sizes(value: Any) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _output_nodes(program: Any) -> list[Any]:
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    return list(outputs)[-len(program.graph_signature.user_outputs) :]


def _normalized(program: Any, names: Sequence[str]) -> dict[str, Normalized]:
    """Outputs that are the softmax or the sigmoid of a tensor, which is named as an output where it is one."""
    nodes = _output_nodes(program)
    name_of = {id(node): name for node, name in zip(nodes, names, strict=True)}
    found = {}
    for node, name in zip(nodes, names, strict=True):
        if operator := _NORMALIZERS.get(str(getattr(node, "target", ""))):
            found[name] = Normalized(operator, name_of.get(id(node.args[0]), str(node.args[0])))
    return found


def _shapes(program: Any) -> dict[str, tuple[int | None, ...] | None]:
    """Shapes of the outputs by name."""
    values = [getattr(node, "meta", {}).get("val") for node in _output_nodes(program)]
    shapes = [None if not hasattr(value, "shape") else _sizes(value) for value in values]
    spec = program.call_spec.out_spec
    if spec.type is dict and spec.num_children == spec.num_leaves:
        return dict(zip(map(str, spec.context), shapes, strict=True))
    return {str(place): shape for place, shape in enumerate(shapes)}


def _batch_limits(program: Any, entry: Any) -> tuple[int, int]:
    """Smallest and largest batch of one call."""
    size = entry.shape[0]
    if isinstance(size, int):
        return size, size
    allowed = program.range_constraints.get(size.node.expr)
    if allowed is None:
        return 1, LARGEST_BATCH
    largest = min(LARGEST_BATCH, int(allowed.upper)) if allowed.upper < LARGEST_BATCH else LARGEST_BATCH
    return max(1, int(allowed.lower)), max(1, largest, int(allowed.lower))


def _runner(program: Any, dtype: Any, known: Iterable[str], taken: Sequence[str], torch: Any) -> Any:
    call = program.module()
    real = dtype.is_floating_point

    def run(ready: np.ndarray) -> Outputs:
        integers = None if real else np.dtype(str(dtype).removeprefix("torch."))
        inputs = torch.from_numpy(ready if integers is None else as_type(ready, integers)).to(dtype)
        with torch.no_grad():
            outputs = dict(zip(known, _flat(call(inputs)), strict=True))
        names = ["logits", *taken[1:]]
        return {name: outputs[key].float().numpy() for name, key in zip(names, taken, strict=True)}

    return run


def _flat(returned: Any) -> list[Any]:
    """Leaves of the tuples, lists and dictionaries that a program returned, in order."""
    if isinstance(returned, dict | tuple | list):
        parts = returned.values() if isinstance(returned, dict) else returned
        return [leaf for part in parts for leaf in _flat(part)]
    return [returned]
