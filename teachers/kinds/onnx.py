"""`onnx:FILE`: an ONNX model, run by onnxruntime on the CPU. `onnx:FILE#LOGITS,FEATURE,...` names its outputs.

A feature may be any tensor inside the graph. It becomes an output of a copy in memory, which needs the package onnx.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import sha256_of
from ev3_distill.teachers.kinds.normalized_outputs import notes_on
from ev3_distill.teachers.kinds.onnx_outputs import origins_of, score_shapes
from ev3_distill.teachers.loading import digest_of, import_package, split_file_and_outputs
from ev3_distill.teachers.preprocessing import read_preprocessing_file
from ev3_distill.teachers.teacher import Model, Outputs, Request, Teacher, build_teacher, in_batches, pick_outputs

LARGEST_BATCH = 256  # larger batches are no faster on a CPU and need more memory for activations
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
_LOCATION = re.compile(
    rb"\x0a\x08location\x12([\x01-\x7f])", re.DOTALL
)  # of external data, a protobuf key and its length


def onnx_teacher(place: str, request: Request) -> Teacher:
    """Loads an ONNX file.

    Args:
      place: FILE, or FILE#LOGITS,FEATURE,... with names of outputs or of tensors inside the graph.
      request: the data it will run on.

    Raises:
      InputError: the file is missing or damaged, the model has several inputs, or it does not fit the data.
    """
    path, names = split_file_and_outputs(place, kind="onnx")
    file_preprocessing = read_preprocessing_file(path)
    session = _session(path, names, request.source)
    entry = _input(session, request.source)
    shapes = {out.name: _shape(out) for out in session.get_outputs() if out.type.startswith("tensor(")}
    origins = origins_of(path)
    scores = score_shapes(
        session.get_outputs(), shapes, names, origins, source=request.source, num_classes=request.num_classes
    )
    expected = request.expected_outputs(file_preprocessing)
    taken = pick_outputs(scores, names, expected, source=request.source, normalized=origins.normalized)
    shape, logits = _shape(entry), shapes.get(taken[0])
    fixed = shape[0] if shape else None
    model = Model(
        run=in_batches(_runner(session, entry, taken), smallest=fixed or 1, largest=fixed or LARGEST_BATCH),
        digest=digest_of(["onnx", *taken, *_bytes_of(path)]),
        file_preprocessing=file_preprocessing,
        input_shape=None if shape is None else shape[1:],
        takes_uint8=entry.type == "tensor(uint8)",
        num_outputs=logits[1] if logits and len(logits) == 2 else None,
        params=_params(path),
        notes=notes_on(taken[0], names, origins.normalized, source=request.source, inside=True),
    )
    return build_teacher(model, request)


def _session(path: Path, names: Sequence[str], source: str) -> Any:
    runtime = import_package("onnxruntime", kind="onnx", install="onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, so nothing needs to be printed

    def open_session(program: str | bytes) -> Any:
        return runtime.InferenceSession(program, options, providers=["CPUExecutionProvider"])

    try:
        session = open_session(str(path))
        inside = [name for name in names if name not in {output.name for output in session.get_outputs()}]
        return open_session(_with_outputs(path, inside, source)) if inside else session
    except InputError:
        raise
    except Exception as error:  # onnxruntime raises many types
        raise InputError(
            f"onnx:FILE needs a model that onnxruntime can load; {path} fails with {summary(error)}: export it again"
        ) from None


def _with_outputs(path: Path, names: Sequence[str], source: str) -> bytes:
    """The model, serialized, with tensors inside its graph as additional outputs."""
    onnx = import_package("onnx", kind="onnx tensors inside the graph as outputs of", install="onnx")
    model = onnx.load(str(path))
    known = [name for node in model.graph.node for name in node.output if name]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[-5:]
            raise InputError(
                f"a name after # is an output or a tensor of the graph; got '{name}' in {source}: did you mean "
                f"{', '.join(close)}?"
            )
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    return bytes(model.SerializeToString())


def _input(session: Any, source: str) -> Any:
    entries = session.get_inputs()
    if len(entries) != 1:
        names = ", ".join(entry.name for entry in entries) or "none"
        raise InputError(
            f"a teacher has one input, the examples; {source} has {len(entries)} ({names}): export it with one, or wrap "
            "it in a python:MODULE:FUNCTION teacher"
        )
    if entries[0].type not in DTYPES:
        raise InputError(
            f"a teacher's input is one of {', '.join(DTYPES)}; {source} takes {entries[0].type}: export it with one of these"
        )
    return entries[0]


def _shape(value: Any) -> tuple[int | None, ...] | None:
    """Shape with the batch axis; None if unknown, or None for a free axis."""
    if not value.shape:
        return None
    return tuple(size if isinstance(size, int) and size > 0 else None for size in value.shape)


def _runner(session: Any, entry: Any, taken: Sequence[str]) -> Any:
    dtype = np.dtype(DTYPES[entry.type])
    names = ["logits", *taken[1:]]

    def run(ready: np.ndarray) -> Outputs:
        return dict(zip(names, session.run(list(taken), {entry.name: as_type(ready, dtype)}), strict=True))

    return run


def as_type(ready: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts preprocessed float32 inputs to the type that a model takes. For integers, rounds and clips to the range."""
    if dtype.kind == "f":
        return ready.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(ready), limits.min, limits.max).astype(dtype)


def _bytes_of(path: Path) -> list[str]:
    """Digests of the file and of the files with external weights beside it."""
    content = path.read_bytes()
    places = set()
    for match in _LOCATION.finditer(content):
        start = match.end()
        places.add(content[start : start + match.group(1)[0]])
    weights = [path.parent / place.decode(errors="replace") for place in sorted(places)]
    return [sha256_of(path), *(sha256_of(file) for file in weights if file.is_file())]


def _params(path: Path) -> int | None:
    """Number of floating-point values stored in the graph; None if the package onnx is not installed."""
    try:
        import onnx
    except ImportError:
        return None
    graph = onnx.load(str(path), load_external_data=False).graph
    real = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    return int(sum(np.prod(weight.dims, dtype=np.int64) for weight in graph.initializer if weight.data_type in real))
