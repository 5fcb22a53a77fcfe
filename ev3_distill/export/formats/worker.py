"""A process that runs an exported file and imports nothing of ours: `python -P worker.py FILE THREADS`.

It writes one line of JSON, what it opened or why not. Then for each line {"dtype", "shape", "passes"} and the bytes of such an
array on its input it answers a line {"dtype", "shape"} and bytes: what the file says of the inputs or, where passes are asked
for, how many seconds each took.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 10

Run = Callable[[np.ndarray], np.ndarray]


def opened_onnx(path: str, threads: int) -> tuple[Run, dict[str, Any]]:
    """By onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    metadata = session.get_modelmeta().custom_metadata_map

    def run(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(session.run([given.name], {taken.name: inputs})[0])

    return run, {"metadata": metadata, "by": f"onnxruntime {onnxruntime.__version__}"}


def opened_stablehlo(path: str, threads: int) -> tuple[Run, dict[str, Any]]:
    """By JAX."""
    del threads  # as many as the process has processors
    import jax
    from jax import export

    call = jax.jit(export.deserialize(bytearray(Path(path).read_bytes())).call)

    def run(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(call(inputs))

    return run, {"metadata": {}, "by": f"jax {jax.__version__}"}


def opened_safetensors(path: str, threads: int) -> tuple[Run, dict[str, Any]]:
    """By JAX and the program that lies beside the variables."""
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


OPENED = {".onnx": opened_onnx, ".stablehlo": opened_stablehlo, ".safetensors": opened_safetensors}


def answered(run: Run, inputs: np.ndarray, passes: int) -> np.ndarray:
    """What the file says, or the seconds [passes] that it takes, from an array on the host to one on the host."""
    if not passes:
        return run(inputs)
    times = np.empty(passes)
    for i in range(-WARM_UP, passes):
        began = time.perf_counter()
        run(inputs)
        times[max(i, 0)] = time.perf_counter() - began
    return times


def main(path: str, threads: int) -> None:
    """Opens the file, then answers until its input ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer

    def tell(content: dict[str, Any], payload: bytes = b"") -> None:
        out.write(json.dumps(content).encode() + b"\n" + payload)
        out.flush()

    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        run, facts = OPENED[Path(path).suffix](path, threads)
    except Exception as error:
        return tell({"error": f"{type(error).__name__}: {error}"})
    tell(facts)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        dtype, shape = np.dtype(asked["dtype"]), asked["shape"]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        inputs = np.frombuffer(sys.stdin.buffer.read(size), dtype).reshape(shape)
        try:
            found = np.ascontiguousarray(answered(run, inputs, asked["passes"]))
        except Exception as error:
            return tell({"error": f"{type(error).__name__}: {error}"})
        tell({"dtype": found.dtype.str, "shape": found.shape}, found.tobytes())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
