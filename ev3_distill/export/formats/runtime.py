"""Runs an exported file as in deployment: in a subprocess that does not import this package. Milliseconds."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ev3_distill.errors import InputError, first_line
from ev3_distill.export.formats import safetensors_file
from ev3_distill.export.formats.metadata import (
    METADATA_DIGEST,
    SIDECAR,
    ModelMetadata,
    from_dict,
    from_texts,
    metadata_digest,
)
from ev3_distill.runtime.cpu import cores
from ev3_distill.runtime.files import sha256_of

FILES = ("model.onnx", "model.stablehlo", safetensors_file.FILE)  # an export folder holds one of these
WORKER = Path(__file__).with_name("worker.py")


def find_model_file(place: Path) -> Path | None:
    """The exported file at a path, which may be the file itself or its folder; None if there is none."""
    if place.name == safetensors_file.PROGRAM:  # useless without its variables
        return place.with_name(safetensors_file.FILE)
    if place.suffix in (".onnx", ".stablehlo", ".safetensors"):
        return place
    return next((place / name for name in FILES if (place / name).is_file()), None)


class ExportedModel:
    """An exported file that is open in a subprocess.

    Attributes:
      path: of the file.
      threads: number of threads the subprocess may use.
      runtime: name and version of the library that runs the file.
      metadata: of the file.
    """

    def __init__(self, path: Path, process: subprocess.Popen[bytes], errors: IO[bytes], *, threads: int):
        self.path, self.threads, self._process, self._errors = path, threads, process, errors
        header = self._read_reply()
        self.runtime: str = header["by"]
        sidecar = path.with_name(SIDECAR)
        if header["metadata"]:
            self.metadata: ModelMetadata = from_texts(header["metadata"], path)
        elif path.suffix == ".stablehlo" and sidecar.is_file():
            self.metadata = from_dict(json.loads(sidecar.read_text()), sidecar)
        else:
            self.metadata = from_dict({}, path)

    def outputs(self, inputs: np.ndarray) -> np.ndarray:
        """The file's outputs [N, K] for inputs [N, ...] laid out as in the data set."""
        return self._request(inputs, 0)

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """The same as logits [N, K]; for a file that outputs probabilities, up to a constant for each example."""
        outputs = self.outputs(inputs)
        if self.metadata.output == "logits":
            return outputs
        with np.errstate(divide="ignore"):
            return np.log(outputs)

    def passes_ms(self, inputs: np.ndarray, passes: int) -> np.ndarray:
        """Times [passes] of forward passes on these inputs."""
        return self._request(inputs, passes)

    def _request(self, inputs: np.ndarray, passes: int) -> np.ndarray:
        inputs = np.asarray(inputs, np.dtype(self.metadata.dtype))
        if self.metadata.layout == "nchw":
            inputs = np.moveaxis(inputs, -1, 1)
        inputs = np.ascontiguousarray(inputs)
        head = {"dtype": inputs.dtype.str, "shape": inputs.shape, "passes": passes}
        with contextlib.suppress(BrokenPipeError):  # the reply gives the reason
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(head).encode() + b"\n" + inputs.tobytes())
            self._process.stdin.flush()
        reply = self._read_reply()
        assert self._process.stdout is not None
        dtype, shape = np.dtype(reply["dtype"]), reply["shape"]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return np.frombuffer(self._process.stdout.read(size), dtype).reshape(shape)

    def _read_reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": self._exit_reason()}
        if "error" in reply:
            reason = first_line(reply["error"]) or "an error without a message"
            raise InputError(
                f"an exported file must run in its runtime; {self.path} fails with {reason}: export the student again"
            )
        return cast(dict[str, Any], reply)

    def _exit_reason(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}, {lines[-1] if lines else 'no message'}"


def _check_digests(path: Path) -> None:
    """Raises InputError if a file in an export folder has changed since it was written."""
    sidecar = path.with_name(SIDECAR)
    if path.name not in FILES or not sidecar.is_file():
        return
    files = {"sha256": path}
    if path.name == safetensors_file.FILE:
        files["sha256_program"] = path.with_name(safetensors_file.PROGRAM)
    try:
        content = json.loads(sidecar.read_text())
        digests = {file: content[name] for name, file in files.items()}
        if content.get(METADATA_DIGEST, metadata_digest(content)) != metadata_digest(content):
            raise ValueError("its content does not match its digest")
    except (ValueError, KeyError) as error:
        raise InputError(
            f"an export's {SIDECAR} describes its file; {sidecar} is damaged ({error}): export the student again"
        ) from None
    for file, digest in digests.items():
        if digest != sha256_of(file):
            raise InputError(
                f"an exported file must stay as it was written; {file} was changed or damaged: export the student again"
            )


@contextlib.contextmanager
def open_exported(path: Path, *, threads: int = 0) -> Iterator[ExportedModel]:
    """Opens an exported file in a subprocess; a context manager.

    Args:
      path: a .onnx, .stablehlo or .safetensors file.
      threads: number of threads the subprocess may use; 0 for all cores.

    Raises:
      InputError: the file is missing or broken, or has no metadata.
    """
    if not path.is_file():
        raise InputError(
            f"evaluate needs an exported file; got {path}, which is missing or not a file: name an export folder or its file"
        )
    program = path.with_name(safetensors_file.PROGRAM)
    if path.suffix == ".safetensors" and not program.is_file():
        raise InputError(
            f"exported variables need their program beside them; {program} is missing: restore it, or export the student again"
        )
    _check_digests(path)
    available = cores()
    count = min(threads, available) if threads else available
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(path.absolute()), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            yield ExportedModel(path, process, errors, threads=count)
        finally:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()
            process.kill()
            process.wait()
