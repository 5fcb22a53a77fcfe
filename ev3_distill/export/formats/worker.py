"""Subprocess that runs an exported file without importing this package: `python -P worker.py FILE THREADS`. Milliseconds.

Protocol: the worker writes one line of JSON, metadata of the opened file or `{"error": ...}`. For each request on standard
input, a line `{"dtype", "shape", "passes"}` followed by the bytes of that array, it writes a line `{"dtype", "shape"}` followed
by bytes: the file's outputs if `passes` is 0, otherwise the time of each pass.
"""

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 10
TIMING = Path(__file__).parents[2] / "runtime" / "timing.py"  # run from its path, because the package is not imported

Run = Callable[[np.ndarray], np.ndarray]


def open_onnx(path: str, threads: int) -> tuple[Run, dict[str, Any]]:
    """Opens an ONNX file with onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (input_,), (output,) = session.get_inputs(), session.get_outputs()
    metadata = session.get_modelmeta().custom_metadata_map

    def run(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(session.run([output.name], {input_.name: inputs})[0])

    return run, {"metadata": metadata, "by": f"onnxruntime {onnxruntime.__version__}"}


def open_stablehlo(path: str, threads: int) -> tuple[Run, dict[str, Any]]:
    """Opens a StableHLO file with JAX, which uses as many threads as the process has cores."""
    del threads
    import jax
    from jax import export

    call = jax.jit(export.deserialize(bytearray(Path(path).read_bytes())).call)

    def run(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(call(inputs))

    return run, {"metadata": {}, "by": f"jax {jax.__version__}"}


def open_safetensors(path: str, threads: int) -> tuple[Run, dict[str, Any]]:
    """Opens variables and the StableHLO function beside them with JAX."""
    del threads
    import jax
    from jax import export
    from safetensors import safe_open
    from safetensors.numpy import load_file

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    variables = jax.device_put(load_file(path))
    call = jax.jit(export.deserialize(bytearray(Path(path).with_name("apply.stablehlo").read_bytes())).call)

    def run(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(call(variables, inputs))

    return run, {"metadata": metadata, "by": f"jax {jax.__version__}"}


OPENERS = {".onnx": open_onnx, ".stablehlo": open_stablehlo, ".safetensors": open_safetensors}


def answer(run: Run, inputs: np.ndarray, passes: int) -> np.ndarray:
    """The file's outputs [N, K], or the times [passes] in milliseconds, each from host array to host array."""
    if not passes:
        return run(inputs)
    times: np.ndarray = runpy.run_path(str(TIMING))["times_ms"](lambda: run(inputs), passes=passes, warm_up=WARM_UP)
    return times


def main(path: str, threads: int) -> None:
    """Opens the file, then answers requests until standard input ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output that a library prints must not mix with the protocol

    def reply(content: dict[str, Any], payload: bytes = b"") -> None:
        out.write(json.dumps(content).encode() + b"\n" + payload)
        out.flush()

    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        run, facts = OPENERS[Path(path).suffix](path, threads)
    except Exception as error:
        return reply({"error": f"{type(error).__name__}: {error}"})
    reply(facts)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        dtype, shape = np.dtype(request["dtype"]), request["shape"]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        inputs = np.frombuffer(sys.stdin.buffer.read(size), dtype).reshape(shape)
        try:
            result = np.ascontiguousarray(answer(run, inputs, request["passes"]))
        except Exception as error:
            return reply({"error": f"{type(error).__name__}: {error}"})
        reply({"dtype": result.dtype.str, "shape": result.shape}, result.tobytes())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
