"""An exported file as it is deployed: run in a process of its own that knows nothing of us. Milliseconds."""

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
from ev3_distill.export.formats import safetensors
from ev3_distill.export.formats.metadata import BESIDE, About, from_dict, from_texts
from ev3_distill.runtime.cpu import cores
from ev3_distill.runtime.files import sha256_of

FILES = ("model.onnx", "model.stablehlo", safetensors.FILE)  # as an exported folder has one of them
WORKER = Path(__file__).with_name("worker.py")


def file_in(place: Path) -> Path | None:
    """The exported file that a path names, itself or its folder; None where it names none."""
    if place.name == safetensors.PROGRAM:  # is nothing without its variables
        return place.with_name(safetensors.FILE)
    if place.suffix in (".onnx", ".stablehlo", ".safetensors"):
        return place
    return next((place / name for name in FILES if (place / name).is_file()), None)


class Deployed:
    """A file that is open, in a process of its own."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes], errors: IO[bytes], *, threads: int):
        self.path, self.threads, self._process, self._errors = path, threads, process, errors
        told = self._answer()
        self.by: str = told["by"]
        beside = path.with_name(BESIDE)
        if told["metadata"]:
            self.about: About = from_texts(told["metadata"], path)
        elif path.suffix == ".stablehlo" and beside.is_file():
            self.about = from_dict(json.loads(beside.read_text()), beside)
        else:
            self.about = from_dict({}, path)

    def outputs(self, inputs: np.ndarray) -> np.ndarray:
        """What the file says [N, K] of inputs [N, ...] that lie as the data have them."""
        return self._asked(inputs, 0)

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """The same as logits [N, K], up to a constant for each example."""
        found = self.outputs(inputs)
        if self.about.output == "logits":
            return found
        with np.errstate(divide="ignore"):
            return np.log(found)

    def passes_ms(self, inputs: np.ndarray, passes: int) -> np.ndarray:
        """How long each of [passes] takes on these inputs."""
        return self._asked(inputs, passes)

    def _asked(self, inputs: np.ndarray, passes: int) -> np.ndarray:
        inputs = np.asarray(inputs, np.dtype(self.about.dtype))
        if self.about.layout == "nchw":
            inputs = np.moveaxis(inputs, -1, 1)
        inputs = np.ascontiguousarray(inputs)
        head = {"dtype": inputs.dtype.str, "shape": inputs.shape, "passes": passes}
        with contextlib.suppress(BrokenPipeError):  # the answer tells why
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(head).encode() + b"\n" + inputs.tobytes())
            self._process.stdin.flush()
        told = self._answer()
        assert self._process.stdout is not None
        dtype, shape = np.dtype(told["dtype"]), told["shape"]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return np.frombuffer(self._process.stdout.read(size), dtype).reshape(shape)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told = json.loads(line) if line else {"error": self._last_words()}
        if "error" in told:
            reason = first_line(told["error"])
            raise InputError(
                f"an exported file is one that its runtime can run; {self.path} fails with {reason}: export it again"
            )
        return cast(dict[str, Any], told)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}, {lines[-1] if lines else 'without a word'}"


def _check_whole(path: Path) -> None:
    """Whether a file in an export's folder is the one that was written there."""
    beside = path.with_name(BESIDE)
    if path.name not in FILES or not beside.is_file():
        return
    files = {"sha256": path}
    if path.name == safetensors.FILE:
        files["sha256_program"] = path.with_name(safetensors.PROGRAM)
    try:
        told = json.loads(beside.read_text())
        noted = {file: told[name] for name, file in files.items()}
    except (ValueError, KeyError) as error:
        raise InputError(
            f"an export's {BESIDE} tells of its file; {beside} is damaged ({error}): export it again"
        ) from None
    for file, digest in noted.items():
        if digest != sha256_of(file):
            raise InputError(
                f"an exported file stays as it was written; {file} has changed since, or is damaged: export it again"
            )


@contextlib.contextmanager
def deployed(path: Path, *, threads: int = 0) -> Iterator[Deployed]:
    """Opens an exported file for a while.

    Args:
      path: of a .onnx, .stablehlo or .safetensors file.
      threads: that it may compute with; 0 for as many as there are processors.

    Raises:
      InputError: it is missing, broken, or does not say what it is.
    """
    if not path.is_file():
        raise InputError(f"an exported file is there; got {path}, which is none: name an export's folder or its file")
    program = path.with_name(safetensors.PROGRAM)
    if path.suffix == ".safetensors" and not program.is_file():
        raise InputError(
            f"exported variables have their program beside them; {program} is missing: put it back, or export them again"
        )
    _check_whole(path)
    there = cores()
    count = min(threads, there) if threads else there
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(path.absolute()), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            yield Deployed(path, process, errors, threads=count)
        finally:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()
            process.kill()
            process.wait()
