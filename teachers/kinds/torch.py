"""`torch:FILE.pt2`, a program of torch.export, run on the CPU; `torch:FILE.pt2#LOGITS,FEATURE,...` names its outputs.

Outputs are named by the keys of a dictionary that the program returns, or 0, 1, ... by their place in a tuple.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import sha256_of
from ev3_distill.teachers.kinds.onnx import LARGEST_BATCH, as_type
from ev3_distill.teachers.kinds.torch_archive import SAVE, safe_archive
from ev3_distill.teachers.loading import digest_of, file_and_names, package
from ev3_distill.teachers.preprocessing import read_beside
from ev3_distill.teachers.teacher import Model, Outputs, Request, Teacher, in_chunks, picked, teacher_of

INSTALL = "ev3-distill[torch]"
_TRAINING = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}  # operator -> place of its argument `training`


def torch_teacher(place: str, request: Request) -> Teacher:
    """The teacher in an archive of torch.export, loaded without unpickling anything.

    Raises:
      InputError: the file is missing, broken, no such archive, could run code when loaded, or does not fit the data.
    """
    path, names = file_and_names(place, kind="torch")
    torch = package("torch", kind="torch", install=INSTALL)
    beside = read_beside(path)
    program = _program(path, torch)
    entry = _input(program, request.source)
    shapes = _shapes(program)
    if unknown := [name for name in names if name not in shapes]:
        raise InputError(
            f"a name after # is one of an output; got {', '.join(unknown)} in {request.source}: it has {', '.join(shapes)}"
        )
    taken = picked(shapes, names, request.expected_outputs(beside), source=request.source)
    least, most = _batch(program, entry)
    logits = shapes[taken[0]]
    model = Model(
        run=in_chunks(_runner(program, entry.dtype, shapes, taken, torch), least=least, most=most),
        digest=digest_of(["torch", *taken, sha256_of(path)]),
        beside=beside,
        input_shape=_sizes(entry)[1:],
        input_bytes=entry.dtype == torch.uint8,
        num_outputs=logits[1] if logits and len(logits) == 2 else None,
        params=sum(weight.numel() for weight in program.parameters()),
    )
    return teacher_of(model, request)


def _program(path: Path, torch: Any) -> Any:
    if path.suffix != ".pt2":
        raise InputError(
            f"torch:FILE.pt2 needs a program of torch.export, since a bare state dict is no network and a pickled one may "
            f"run any code; got {path}: with the network in Python, {SAVE}"
        )
    try:
        program = torch.export.load(safe_archive(path))
    except InputError:
        raise
    except Exception as error:  # of many kinds, for a damaged file or one of another version
        raise InputError(
            f"torch:FILE.pt2 needs a program that this version of PyTorch ({torch.__version__}) loads; {path} fails with "
            f"{summary(error)}: export it again"
        ) from None
    for node in program.graph.nodes:
        place = _TRAINING.get(str(node.target))
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise InputError(
                f"a teacher is exported for evaluation; {path} has {node.target} in training mode: call model.eval() before, "
                f"{SAVE}"
            )
    return program


def _input(program: Any, source: str) -> Any:
    """The value that stands for the batch: its shape may be symbolic."""
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


def _shapes(program: Any) -> dict[str, tuple[int | None, ...] | None]:
    """Of the outputs by name."""
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    values = [getattr(node, "meta", {}).get("val") for node in outputs][-len(program.graph_signature.user_outputs) :]
    shapes = [None if not hasattr(value, "shape") else _sizes(value) for value in values]
    spec = program.call_spec.out_spec
    if spec.type is dict and spec.num_children == spec.num_leaves:
        return dict(zip(map(str, spec.context), shapes, strict=True))
    return {str(place): shape for place, shape in enumerate(shapes)}


def _batch(program: Any, entry: Any) -> tuple[int, int]:
    """The fewest and the most examples of one call."""
    size = entry.shape[0]
    if isinstance(size, int):
        return size, size
    allowed = program.range_constraints.get(size.node.expr)
    if allowed is None:
        return 1, LARGEST_BATCH
    most = min(LARGEST_BATCH, int(allowed.upper)) if allowed.upper < LARGEST_BATCH else LARGEST_BATCH
    return max(1, int(allowed.lower)), max(1, most, int(allowed.lower))


def _runner(program: Any, dtype: Any, known: Iterable[str], taken: Sequence[str], torch: Any) -> Any:
    call = program.module()
    real = dtype.is_floating_point

    def run(ready: np.ndarray) -> Outputs:
        whole = None if real else np.dtype(str(dtype).removeprefix("torch."))
        inputs = torch.from_numpy(ready if whole is None else as_type(ready, whole)).to(dtype)
        with torch.no_grad():
            found = dict(zip(known, _flat(call(inputs)), strict=True))
        names = ["logits", *taken[1:]]
        return {name: found[key].float().numpy() for name, key in zip(names, taken, strict=True)}

    return run


def _flat(returned: Any) -> list[Any]:
    """What is in the tuples, lists and dictionaries that a program returned, in order."""
    if isinstance(returned, dict | tuple | list):
        parts = returned.values() if isinstance(returned, dict) else returned
        return [leaf for part in parts for leaf in _flat(part)]
    return [returned]
