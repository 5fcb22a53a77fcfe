"""Exports a student of a finished run to a folder of its own.

The folder holds the student's file, evidence.json and MODEL_CARD.md. It appears complete or not at all, and only after the file
was run again and its outputs equaled the student's.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill import students
from ev3_distill.data import splits_of
from ev3_distill.data.sources import Dataset, describe_offset
from ev3_distill.errors import InputError
from ev3_distill.export import file_latency, model_card
from ev3_distill.export.acceptance import (
    Predict,
    check_accepted,
    check_quantized,
    compare,
    mean_score,
    run_file,
    task_of_report,
)
from ev3_distill.export.export_config import ExportConfig
from ev3_distill.export.formats import onnx_static_quantization
from ev3_distill.export.formats.metadata import SIDECAR, ModelMetadata
from ev3_distill.export.formats.runtime import open_exported
from ev3_distill.export.model_file import package_versions, student_facts, write_model
from ev3_distill.monitor.sentences import certificate_sentence
from ev3_distill.runtime import user_code
from ev3_distill.runtime.files import atomic_directory, sha256_of
from ev3_distill.runtime.timing import quantiles
from ev3_distill.search.archive import FILE, Archive, pick
from ev3_distill.tasks.base import Task, has_target
from ev3_distill.tasks.metrics import find_metric
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.training import seen_rows
from ev3_distill.training.run_dir import read_json, write_json
from ev3_distill.training.run_reader import certificate_in, config_of, data_of, offset_in

EVIDENCE = "evidence.json"
EXAMPLES = 1000  # number of examples on which a file is run again
CALIBRATION = 512  # number of explore examples that int8 is calibrated on


class _Student(NamedTuple):
    """A student in a run directory, and the evidence for it."""

    folder: Path
    evidence: dict[str, Any]
    network: str
    description: str
    digest: str | None  # of its variables, as recorded with the evidence; None in a run of an older version


class _Data(NamedTuple):
    """The run's data."""

    dataset: Dataset
    rows: dict[str, np.ndarray]  # by split


class _Exported(NamedTuple):
    """A written file, with what later steps need."""

    path: Path
    about: ModelMetadata
    student: Predict
    task: Task
    data: _Data | None  # None: the run's data are missing or have changed


def export_run(run: Path, out: Path, config: ExportConfig | None = None) -> list[str]:
    """Exports a student to a new folder.

    Args:
      run: directory of a finished run.
      out: the new folder. It holds model.onnx, model.stablehlo or model.safetensors, and model.json with the metadata. As
        flax it also holds apply.stablehlo, the program of the variables, and spec.json and variables/ as in a run directory.
      config: of the export; by default the delivered student as flax.

    Returns:
      Lines of text about the export.

    Raises:
      InputError: the run is not finished or has no such student, the folder exists, the format cannot hold the network, or the
        outputs of the file differ from the student's.
    """
    config = config or ExportConfig()
    if not (run / "report.json").exists():
        raise InputError(f"export needs a finished run; {run} has no report.json: finish it with --resume")
    if out.exists():
        raise InputError(f"export writes a new folder; {out} exists: choose another --out")
    run_report = read_json(run / "report.json")
    task = task_of_report(run_report)
    student = _find_student(run, run_report, config.pick)
    try:
        with atomic_directory(out) as temporary, user_code.only_typed((config.student,), trusted=config.trust_run):
            about, evidence, lines = _export(temporary, run, run_report, student, config)
            write_json(temporary / EVIDENCE, evidence)
            if (run / seen_rows.NAME).exists():
                shutil.copyfile(run / seen_rows.NAME, temporary / seen_rows.NAME)
            card = model_card.render(run_report, evidence, about, config, task=task)
            (temporary / model_card.NAME).write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(f"export needs a writable folder; got {out} ({error}): choose another --out") from None
    return [f"Exported {student.description}.", *lines, f"Student: {out}"]


def _find_student(run: Path, run_report: dict[str, Any], conditions: str) -> _Student:
    """The delivered student or, with conditions, the best student of a search that meets them."""
    evidence = {
        "certificate": _about_files(run_report["certificate"]),
        "guards": [guard for guard in run_report["guards"] if not _is_of_process(guard["metric"])],
    }
    description = f"the student that {run} delivered, {run_report['student']['params']:,} parameters"
    certificate = certificate_in(run, run_report)
    delivered = _Student(
        run / "student", evidence, run_report["student"]["network"], description, certificate.get("student")
    )
    if not conditions:
        return delivered
    if not (run / FILE).exists():
        raise InputError(f"--pick needs a run of a search; {run} trained one student: omit --pick")
    entry = pick(Archive(run, confidence=run_report["certificate"]["confidence"]).entries, conditions)
    description = (
        f"student {entry.number}, {entry.network}, {entry.params:,} parameters: {entry.accuracy:.1%} on decide"
    )
    if entry.number == run_report["search"]["delivered"]:
        return delivered._replace(network=entry.network, description=description, digest=entry.digest)
    description += (
        ", the split that selected among several students; no certificate covers it: run evaluate on new data"
    )
    folder = run / "sizes" / f"{entry.number:02d}" / "student"
    return _Student(folder, {"decide": dataclasses.asdict(entry)}, entry.network, description, entry.digest)


def _about_files(certificate: dict[str, Any]) -> dict[str, Any]:
    """A certificate without the claims that are not about files of the student."""
    return {**certificate, "claims": [one for one in certificate["claims"] if not _is_of_process(one["metric"])]}


def _is_of_process(metric: str) -> bool:
    """Whether a metric is about the student as its run held it: in another file and runtime it has another latency and size."""
    query = find_metric(metric)
    return query is not None and (query.row.source == "timing" or query.name == "bytes")


def _export(
    folder: Path, run: Path, run_report: dict[str, Any], student: _Student, config: ExportConfig
) -> tuple[ModelMetadata, dict[str, Any], list[str]]:
    """Writes the file and runs it again. Returns its metadata, the evidence and lines of text."""
    network, variables = students.load(student.folder, factory=students.import_factory(config.student))
    data = _load_data(run, run_report)
    facts = student_facts(network, variables, student.network)
    if student.digest not in (None, facts["student"]):
        raise InputError(
            f"an export needs the student that its evidence is about, {str(student.digest)[:12]}; {student.folder} holds "
            f"{str(facts['student'])[:12]}: restore that student, or name another run"
        )
    about = _metadata(run_report, student, config, facts, dtype=_dtype(run_report, data))
    if config.int8 and about.precision == "int8":
        raise InputError(f"--int8 needs a float32 student; {student.description} trained for int8 already: omit --int8")
    path = write_model(folder, network, variables, config, about)
    exported = _Exported(path, about, forward(network, variables), task_of_report(run_report), data)
    inputs = _example_inputs(exported, "explore", EXAMPLES)
    comparison = compare(path, exported.student, inputs, task=exported.task, output=about.output)
    check_accepted(comparison, format=config.format, precision=about.precision, real_data=data is not None)
    checked = {
        "format": config.format,
        "precision": about.precision,
        "data": "explore" if data else "random",
        **comparison,
    }
    lines = [
        f"The outputs of the file and the student differ by at most {checked['difference']:.1g} on {checked['examples']} "
        f"examples, and {checked['agreement']:.1%} of the answers are the same."
    ]
    covered = about.precision != "int8"
    evidence = {**(student.evidence if covered else {"student": student.evidence}), "export": checked}
    if not covered:
        lines.append(f"{about.promise}.")
    if config.int8:
        about, evidence, lines = _quantize(exported, evidence)
    if config.latency:
        latency = _latency(exported, run)
        evidence = {**evidence, "latency": latency}
        lines += [f"latency of the teacher: {latency['teacher']}"] if isinstance(latency["teacher"], str) else []
    shape = list(config.input_shape(about.input_shape))
    lines.append(f"File: {path.name}, {path.stat().st_size:,} bytes, {about.dtype} {shape} to {about.output}.")
    if offset := offset_in(about.data):
        lines.append(
            f"Its inputs are shifted: subtract {describe_offset(offset)} in float64, then convert to float32 (data.offset in "
            f"{SIDECAR})."
        )
    return about, evidence, lines


def _metadata(
    run_report: dict[str, Any],
    student: _Student,
    config: ExportConfig,
    facts: dict[str, Any],
    *,
    dtype: str,
) -> ModelMetadata:
    certificate = student.evidence.get("certificate", {})
    promise = "No certificate covers this student: it was selected among several by their scores on the decide split"
    if certificate:
        promise = certificate_sentence({**run_report, "certificate": certificate})
    if certificate and facts["precision"] == "int8":
        certificate = {}
        promise = (
            "No certificate covers this file, which may round some sums to other integers than the student that was "
            "certified: evaluate certifies the file itself"
        )
    return ModelMetadata(
        format=config.format,
        classes=run_report["data"]["classes"],
        input_shape=run_report["data"]["input_shape"],
        dtype=dtype,
        layout=config.layout,
        output=config.output,
        data={name: of for name, of in run_report["data"].items() if name in ("source", "fingerprint", "offset")},
        teacher={"source": run_report["teacher"]["source"], "licence": config.license},
        promise=promise,
        certificate=certificate,
        versions=package_versions(),
        **facts,
    )


def _quantized_metadata(about: ModelMetadata) -> ModelMetadata:
    promise = "No certificate covers these int8 weights, only the float32 student that they come from"
    if not about.certificate:
        promise = "No certificate covers these int8 weights or the float32 student that they come from"
    return dataclasses.replace(about, precision="int8", promise=promise, certificate={})


def _load_data(run: Path, run_report: dict[str, Any]) -> _Data | None:
    """The run's data; None if they are missing or have changed."""
    config = config_of(run, run_report)
    try:
        dataset = data_of(config, offset=offset_in(run_report["data"]))
    except InputError:
        return None
    if dataset.fingerprint != run_report["data"]["fingerprint"]:
        return None
    return _Data(dataset, splits_of(config, dataset))


def _dtype(run_report: dict[str, Any], data: _Data | None) -> str:
    """The dtype of the inputs, from the report or, for an older run, from the data."""
    if "dtype" in run_report["data"]:
        return str(run_report["data"]["dtype"])
    if data is None:
        raise InputError(
            f"a file has the input dtype of the data; this run is older than its record in report.json, and its data "
            f"{run_report['data']['source']} are missing or have changed: restore them"
        )
    return data.dataset.inputs.dtype.name


def _example_inputs(exported: _Exported, split: str, count: int) -> np.ndarray:
    """Inputs of a split as in the data set; random ones if the data are missing."""
    rng, about = np.random.default_rng(0), exported.about
    if exported.data is not None:
        rows = np.sort(rng.permutation(exported.data.rows[split])[:count])
        return np.asarray(exported.data.dataset.inputs[rows])
    shape = (count, *about.input_shape)
    if about.dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.random(shape).astype(about.dtype)


def _required_data(exported: _Exported, option: str, purpose: str) -> _Data:
    if exported.data is None:
        raise InputError(
            f"{option} needs {purpose}; the data {exported.about.data['source']} are missing or have changed: restore them, or "
            f"omit {option}"
        )
    return exported.data


def _latency(exported: _Exported, run: Path) -> dict[str, Any]:
    """Latency of the file and the teacher, by batch size, on all cores; a string in place of the teacher's gives a reason."""
    data = _required_data(exported, "--latency", "examples of the run")
    with open_exported(exported.path) as file:
        times, teacher = file_latency.measure(file, data.dataset, run)
    return {
        "threads": file.threads,
        "by": file.runtime,
        "file": _quantiles(times),
        "teacher": teacher if isinstance(teacher, str) else _quantiles(teacher),
    }


def _quantiles(times: file_latency.Times) -> dict[str, Any]:
    return {str(size): quantiles(of) for size, of in times.items()}


def _quantize(exported: _Exported, evidence: dict[str, Any]) -> tuple[ModelMetadata, dict[str, Any], list[str]]:
    """Replaces a file by its int8 form. No certificate covers that, so it must give the student's answers on decide."""
    data = _required_data(exported, "--int8", "examples of the explore split to calibrate on")
    path, about, student, task, _ = exported
    model, float32_bytes = path.read_bytes(), path.stat().st_size
    inputs = _example_inputs(exported, "explore", CALIBRATION)
    inputs = np.moveaxis(inputs, -1, 1) if about.layout == "nchw" else inputs
    scratch, quantized = path.with_suffix(".tmp"), _quantized_metadata(about)
    path.write_bytes(
        onnx_static_quantization.quantize(model, np.ascontiguousarray(inputs), scratch, metadata=quantized.as_texts())
    )
    scratch.unlink(missing_ok=True)
    write_json(path.with_name(SIDECAR), quantized.as_sidecar(sha256=sha256_of(path)))
    rows = data.rows["decide"]
    inputs, targets = np.asarray(data.dataset.inputs[rows]), data.dataset.labels[rows]
    comparison = compare(path, student, inputs, task=task, output=about.output)
    check_quantized(comparison)
    checked = {"format": "onnx", "precision": "int8", "data": "decide", **comparison}
    checked |= {"bytes": path.stat().st_size, "bytes_float32": float32_bytes}
    line = f"int8: {checked['bytes']:,} bytes for {float32_bytes:,}, {checked['agreement']:.1%} same answers on decide"
    if has_target(targets).any():
        name = task.promise.name
        checked[name] = mean_score(task, run_file(path, inputs), targets)
        checked[f"{name}_float32"] = mean_score(task, student(inputs), targets)
        line += f", {name} {checked[name]:.1%} there for {checked[f'{name}_float32']:.1%}"
    lines = [f"{line}; no certificate covers it: run evaluate on new data."]
    return quantized, {"float32": evidence, "export": checked}, lines
