"""Export: a student out of a finished run, in a folder of its own with the evidence that speaks for it.

The folder holds the student alone, as a file that others run, evidence.json, and MODEL_CARD.md. It appears
whole or not at all, and not before the file was run again and said what the student says.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.data.sources import Dataset
from ev3_distill.data.splits import split_rows
from ev3_distill.errors import InputError
from ev3_distill.export import model_card
from ev3_distill.export.evaluate import times_of
from ev3_distill.export.formats import onnx, onnx_static_quantization, safetensors_file, stablehlo
from ev3_distill.export.formats.metadata import SIDECAR, ModelMetadata
from ev3_distill.export.formats.runtime import open_exported
from ev3_distill.monitor import report
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.files import atomic_directory, sha256_of
from ev3_distill.runtime.timing import quantiles
from ev3_distill.search.archive import FILE, Archive, pick
from ev3_distill.students import count_params
from ev3_distill.students.layers import standard_convolutions
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.training.run_dir import read_json, write_json
from ev3_distill.training.run_reader import config_of, data_of
from ev3_distill.types import Network, Variables

EVIDENCE = "evidence.json"
FORMATS = ("flax", "onnx", "stablehlo")
TOLERANCE = (
    1e-4  # of what a file says against the student, relative to the student's greatest logit where that is above 1
)
ROUNDED = 0.2  # the same of one in int8: a sum that is written otherwise may be rounded to another whole number, and each layer
AGREES = 0.9  # makes several of one such; and the share of examples of which it must say the same class
EXAMPLES = 1000  # that a file is run on again
CALIBRATION = 512  # examples of explore that int8 is fitted to
CHUNK = 64  # examples of one pass


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How a student is to be handed out."""

    format: str = "flax"
    pick: str = ""  # which student of a search, see `archive.pick`; the delivered one where it is empty
    layout: str = "nhwc"  # or nchw: the last axis of an example comes first
    softmax: bool = False
    int8: bool = False
    licence: str = "unknown"  # the teacher's
    student: str = ""  # MODULE:FACTORY, where the network is of the user's own
    latency: bool = False  # of the file and of the teacher, measured now

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(
                f"an export's format is one of {', '.join(FORMATS)}; got '{self.format}': name one of these"
            )
        if self.layout not in ("nhwc", "nchw"):
            raise InputError(f"an export's layout is nhwc or nchw; got '{self.layout}': name one of these")
        if self.format == "flax" and (self.layout != "nhwc" or self.softmax):
            raise InputError(
                "--layout and --softmax are about a file that others run; got --format flax, the student as it was trained: "
                "add --format onnx or stablehlo"
            )
        if self.int8 and self.format != "onnx":
            raise InputError(f"--int8 writes an ONNX file; got --format {self.format}: add --format onnx")


class _Source(NamedTuple):
    """Where a student lies in its run, and what speaks for it."""

    folder: Path
    evidence: dict[str, Any]
    network: str
    told: str


class _Data(NamedTuple):
    """The run's own data, where they are at hand."""

    dataset: Dataset
    rows: dict[str, np.ndarray]


def export(run: Path, out: Path, wanted: Wanted | None = None) -> list[str]:
    """Writes a student to a new folder.

    Args:
      run: directory of a finished run.
      out: the folder, with model.onnx, model.stablehlo or model.safetensors, and what the file says of itself, model.json. As
        flax also apply.stablehlo, the program of the variables, and spec.json and variables/ as a run has them.
      wanted: how; by default the delivered student as flax.

    Returns:
      Lines that tell what was exported.

    Raises:
      InputError: a run that is not finished or has no such student, a folder that is there, a network that the format cannot
        hold, or a file that says something else than the student.
    """
    wanted = wanted or Wanted()
    if not (run / "report.json").exists():
        raise InputError(f"export needs a finished run; {run} has no report.json: finish it by --resume")
    if out.exists():
        raise InputError(f"export writes a new folder; {out} is there: choose another --out")
    finished = read_json(run / "report.json")
    source = _source(run, finished, wanted.pick)
    try:
        with atomic_directory(out) as temporary:
            evidence, lines = _write(temporary, run, finished, source, wanted)
            write_json(temporary / EVIDENCE, evidence)
            (temporary / model_card.NAME).write_text(
                model_card.render(finished, evidence, wanted, network=source.network), encoding="utf-8"
            )
    except OSError as error:
        raise InputError(f"export needs a folder that it can write; got {out} ({error}): choose another") from None
    return [f"Exported {source.told}.", *lines, f"Student: {out}"]


def _source(run: Path, finished: dict[str, Any], conditions: str) -> _Source:
    evidence = {"certificate": finished["certificate"], "guards": finished["guards"]}
    told = f"the student that {run} delivered, {finished['student']['params']:,} parameters"
    delivered = _Source(run / "student", evidence, finished["student"]["network"], told)
    if not conditions:
        return delivered
    if not (run / FILE).exists():
        raise InputError(f"a pick is among the students of a search; {run} made one alone: leave out --pick")
    entry = pick(Archive(run, confidence=finished["certificate"]["confidence"]).entries, conditions)
    told = f"student {entry.number}, {entry.network}, {entry.params:,} parameters: {entry.accuracy:.1%} on decide"
    if entry.number == finished["search"]["delivered"]:
        return delivered._replace(network=entry.network, told=told)
    told += ", which chose among several; no certificate is about it: run evaluate on data that are new to it"
    folder = run / "sizes" / f"{entry.number:02d}" / "student"
    return _Source(folder, {"decide": dataclasses.asdict(entry)}, entry.network, told)


def _write(
    folder: Path, run: Path, finished: dict[str, Any], source: _Source, wanted: Wanted
) -> tuple[dict[str, Any], list[str]]:
    """The file, once it was run again; the evidence for it, and lines that tell of it."""
    network, variables = students.load(source.folder, factory=students.import_factory(wanted.student))
    data = _data(run, finished)
    about = _about(finished, source, wanted, (network, variables), dtype=_dtype(finished, data))
    if wanted.int8 and about.precision == "int8":
        raise InputError(f"--int8 is for students in float32; {source.told} is in int8, as it trained: leave it out")
    path = _saved(folder, source, wanted, (network, variables), about)
    student, inputs = forward(network, variables), _inputs(about, data, "explore", EXAMPLES)
    checked = {
        "format": wanted.format,
        "precision": about.precision,
        "data": "explore" if data else "random",
        **_compared(path, student, inputs, about.output),
    }
    allowed, agrees = (ROUNDED, AGREES if data else 0.0) if about.precision == "int8" else (TOLERANCE, 0.0)
    if checked["difference"] > allowed or checked["agreement"] < agrees:
        raise InputError(
            f"an exported file says what the student says; this {wanted.format} file differs by {checked['difference']:.2g} of "
            f"the greatest logit on {checked['examples']} examples, {allowed:g} is allowed, and agrees on the class of "
            f"{checked['agreement']:.1%}: it was deleted; try another --format, and tell the project"
        )
    lines = [
        f"The file and the student differ by {checked['difference']:.1g} at most on {checked['examples']} examples, and agree "
        f"on the class of {checked['agreement']:.1%}."
    ]
    evidence = {**source.evidence, "export": checked}
    if wanted.int8:
        evidence, lines = _quantised(path, evidence, about, data, student)
    if wanted.latency:
        evidence = {**evidence, "latency": _latency(path, run, about, data)}
    shape = list(_laid(about.input_shape, wanted.layout))
    lines.append(f"File: {path.name}, {path.stat().st_size:,} bytes, {about.dtype} {shape} to {about.output}.")
    return evidence, lines


def _saved(
    folder: Path, source: _Source, wanted: Wanted, student: tuple[Network, Variables], about: ModelMetadata
) -> Path:
    """The file that is run, with what it says of itself, and as flax what else belongs to it."""
    network, variables = student
    example = jax.ShapeDtypeStruct(_laid(about.input_shape, wanted.layout), np.dtype(about.dtype))
    says, name, beside = _says(network, wanted), about.network, dict[str, str]()
    whole = functools.partial(says, variables)
    if wanted.format == "flax":
        path, program = folder / safetensors_file.FILE, folder / safetensors_file.PROGRAM
        shutil.copytree(source.folder, folder, dirs_exist_ok=True)
        path.write_bytes(safetensors_file.serialize_variables(variables, about.as_texts()))
        program.write_bytes(safetensors_file.serialize_apply(says, variables, example, name=name))
        beside["sha256_program"] = sha256_of(program)
    elif wanted.format == "stablehlo":
        path = folder / "model.stablehlo"
        path.write_bytes(stablehlo.serialize(whole, example, name=name))
    else:
        path = folder / "model.onnx"
        path.write_bytes(onnx.serialize(whole, example, name=name, output=about.output, metadata=about.as_texts()))
    write_json(folder / SIDECAR, {**about.as_dict(), "sha256": sha256_of(path), **beside})
    return path


def _about(
    finished: dict[str, Any], source: _Source, wanted: Wanted, student: tuple[Network, Variables], *, dtype: str
) -> ModelMetadata:
    network, variables = student
    certificate = source.evidence.get("certificate", {})
    promised = {**finished, "certificate": certificate}
    precision = str(network.spec.get("deploy", "float32"))
    told = report.promise(promised) if certificate else "No certificate is about this student"
    if certificate and precision == "int8":
        told += (
            ". That is of the student as it was scored; this file may round some sums to other whole numbers: evaluate tells "
            "what is proven of the file itself"
        )
    versions = {name: metadata.version(name) for name in ("jax", "flax", "onnx") if _installed(name)}
    return ModelMetadata(
        format=wanted.format,
        precision=precision,
        classes=finished["data"]["classes"],
        input_shape=finished["data"]["input_shape"],
        dtype=dtype,
        layout=wanted.layout,
        output="probabilities" if wanted.softmax else "logits",
        params=count_params(variables),
        student=tree_digest(variables),
        network=source.network or students.name_of(network.spec),
        data={name: finished["data"][name] for name in ("source", "fingerprint")},
        teacher={"source": finished["teacher"]["source"], "licence": wanted.licence},
        promise=told,
        certificate=certificate,
        versions=versions,
    )


def _as_int8(about: ModelMetadata) -> ModelMetadata:
    told = "No certificate is about these int8 weights, only about the float32 student that they come from"
    return dataclasses.replace(about, precision="int8", promise=told, certificate={})


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def _data(run: Path, finished: dict[str, Any]) -> _Data | None:
    """The run's data; None where they are gone, or have become others."""
    chosen = config_of(run, finished)
    try:
        dataset = data_of(chosen)
    except InputError:
        return None
    if dataset.fingerprint != finished["data"]["fingerprint"]:
        return None
    return _Data(dataset, split_rows(dataset.labels, dataset.test_rows, seed=chosen.seed, fractions=chosen.splits))


def _dtype(finished: dict[str, Any], data: _Data | None) -> str:
    if "dtype" in finished["data"]:
        return str(finished["data"]["dtype"])
    if data is None:
        raise InputError(
            f"a file takes inputs of the data's own type; this run is from before reports told it, and its data "
            f"{finished['data']['source']} are not as they were: put them back"
        )
    return data.dataset.inputs.dtype.name


def _laid(shape: list[int], layout: str) -> tuple[int, ...]:
    if layout == "nhwc":
        return tuple(shape)
    if len(shape) < 2:
        raise InputError(f"--layout nchw is for images and sequences; the examples have shape {shape}: leave it out")
    return (shape[-1], *shape[:-1])


def _says(network: Network, wanted: Wanted) -> Callable[[Variables, jax.Array], jax.Array]:
    """The student as a program of its variables and inputs as the file takes them, of nothing but standard operations."""

    def says(variables: Variables, inputs: jax.Array) -> jax.Array:
        if wanted.layout == "nchw":
            inputs = jnp.moveaxis(inputs, 1, -1)
        with standard_convolutions():
            logits = network.apply(variables, inputs, train=False)[0]
        return jax.nn.softmax(logits) if wanted.softmax else logits

    return says


def _inputs(about: ModelMetadata, data: _Data | None, split: str, count: int) -> np.ndarray:
    """Examples of a split as the data have them; drawn at random where the data are not at hand."""
    rng = np.random.default_rng(0)
    if data is not None:
        rows = np.sort(rng.permutation(data.rows[split])[:count])
        return np.asarray(data.dataset.inputs[rows])
    shape = (count, *about.input_shape)
    if about.dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.random(shape).astype(about.dtype)


def _compared(
    path: Path, student: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray, output: str
) -> dict[str, Any]:
    """By how much a file differs from the student, and on which share of examples they say the same class."""
    said = _said_by(path, inputs)
    expected = student(inputs)
    classes = expected.argmax(axis=1)
    if output == "probabilities":
        expected = np.asarray(jax.nn.softmax(expected))
    difference = np.abs(said - expected).max() / max(1.0, np.abs(expected).max())
    return {
        "examples": len(inputs),
        "difference": float(difference) if np.isfinite(difference) else float("inf"),
        "agreement": float((said.argmax(axis=1) == classes).mean()),
    }


def _said_by(path: Path, inputs: np.ndarray) -> np.ndarray:
    with open_exported(path) as file:
        return np.concatenate([file.outputs(inputs[i : i + CHUNK]) for i in range(0, len(inputs), CHUNK)])


def _latency(path: Path, run: Path, about: ModelMetadata, data: _Data | None) -> dict[str, Any]:
    """Of the file, and of the teacher or why it has none, by the size of a batch, on as many threads as there are."""
    if data is None:
        raise InputError(
            f"--latency is of the run's own examples; the data {about.data['source']} are not at hand as the run had them: put "
            "them back, or leave out --latency"
        )
    with open_exported(path) as file:
        own, theirs = times_of(file, data.dataset, run)
    teacher = theirs if isinstance(theirs, str) else _summaries(theirs)
    return {"threads": file.threads, "by": file.runtime, "file": _summaries(own), "teacher": teacher}


def _summaries(times: dict[int, np.ndarray]) -> dict[str, Any]:
    return {str(size): quantiles(of) for size, of in times.items()}


def _quantised(
    path: Path,
    evidence: dict[str, Any],
    about: ModelMetadata,
    data: _Data | None,
    student: Callable[[np.ndarray], np.ndarray],
) -> tuple[dict[str, Any], list[str]]:
    """Puts the int8 file in the place of the other; no certificate is about it, so decide tells what it costs."""
    if data is None:
        raise InputError(
            f"--int8 is fitted to examples of the explore split; the data {about.data['source']} are not at hand as the run "
            "had them: put them back, or leave out --int8"
        )
    model, before = path.read_bytes(), path.stat().st_size
    inputs = _inputs(about, data, "explore", CALIBRATION)
    inputs = np.moveaxis(inputs, -1, 1) if about.layout == "nchw" else inputs
    path.write_bytes(
        onnx_static_quantization.quantize(
            model, np.ascontiguousarray(inputs), path.with_suffix(".tmp"), metadata=_as_int8(about).as_texts()
        )
    )
    path.with_suffix(".tmp").unlink(missing_ok=True)
    write_json(path.with_name(SIDECAR), {**_as_int8(about).as_dict(), "sha256": sha256_of(path)})
    rows = data.rows["decide"]
    inputs, labels = np.asarray(data.dataset.inputs[rows]), data.dataset.labels[rows]
    found = {"format": "onnx", "precision": "int8", "data": "decide", **_compared(path, student, inputs, about.output)}
    found |= {"bytes": path.stat().st_size, "bytes_float32": before}
    told = f"int8: {found['bytes']:,} bytes for {before:,}, the same class on {found['agreement']:.1%} of decide"
    if (labels >= 0).any():
        known = labels >= 0
        classes = {
            "accuracy": _said_by(path, inputs).argmax(axis=1),
            "accuracy_float32": student(inputs).argmax(axis=1),
        }
        found |= {name: float((said == labels)[known].mean()) for name, said in classes.items()}
        told += f", {found['accuracy']:.1%} right there for {found['accuracy_float32']:.1%}"
    lines = [f"{told}; no certificate is about it: run evaluate on data that are new to it."]
    return {"float32": evidence, "export": found}, lines
