"""Evaluation: scores the student of a finished run, or an exported file, on new data or on the run's sealed split."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill import config, students
from ev3_distill.certify.certificate import Bound, Certificate, median_bound
from ev3_distill.data import splits_of, units_of
from ev3_distill.data.class_names import match_classes, nfc, pairing_warnings
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError, warn
from ev3_distill.export import file_latency
from ev3_distill.export.acceptance import TOLERANCE, task_of, task_of_report
from ev3_distill.export.evaluation_level import Level, Query, Subject, level_on_new_data, level_on_sealed_split
from ev3_distill.export.formats.metadata import ModelMetadata
from ev3_distill.export.formats.runtime import ExportedModel, open_exported
from ev3_distill.export.overlap import find_new_rows, find_seen_rows, proof_without_overlap
from ev3_distill.guards import Guard, evaluate_guards
from ev3_distill.runtime import user_code
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.files import sha256_of
from ev3_distill.tasks.base import Task
from ev3_distill.tasks.classification.example_metrics import probabilities
from ev3_distill.tasks.classification.user_metrics import read_costs
from ev3_distill.tasks.outputs import Outputs
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.teachers.targets import chunked
from ev3_distill.training import run_dir
from ev3_distill.training.certify_run import (
    CertificateRequest,
    certificate_of,
    measured_bounds,
    metrics_to_claim,
    sizes_of,
    write_certificate,
)
from ev3_distill.training.guard_checks import parse_guards
from ev3_distill.training.label_checks import require_labels
from ev3_distill.training.memory import eval_batch_size, memory_limit
from ev3_distill.training.run_reader import certificate_in, config_of, data_of, offset_in, report_in
from ev3_distill.training.sealed_split import TIMING, is_renewed, metric_kind
from ev3_distill.training.setup import CHUNK
from ev3_distill.types import Network, Variables

FILE_CHUNK = 256  # largest number of examples per pass of a file


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate, and on which data.

    Attributes:
      data: data source, scored as a whole; empty: the run's own sealed split.
      confidence: of all claims jointly; None: 0.95 or, on the run's own sealed split, the run's.
      student: MODULE:FACTORY, for a student of the user's own.
      guards: requirements on these examples, such as `accuracy >= 0.9`.
      costs: CSV file, for a guard on cost.
      reopen: whether claims that the run's certificate lacks may open the sealed split again.
      keep_overlap: whether to score examples of `data` that the student has seen, too; nothing is certified then.
      trust_run: whether code that only the run names may be imported, such as its python: teacher.
    """

    data: str = ""
    confidence: float | None = None
    student: str = ""
    guards: Sequence[str] = ()
    costs: str = ""
    reopen: bool = False
    keep_overlap: bool = False
    trust_run: bool = False

    def __post_init__(self) -> None:
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise InputError(f"confidence must lie between 0 and 1, exclusive; got {self.confidence}: try 0.95")


@dataclasses.dataclass(frozen=True)
class FileEvaluation:
    """The result of evaluating an exported file."""

    lines: list[str]  # what the file is, how it agrees with the student, and its latency
    certificate: Certificate
    guards: list[dict[str, Any]]  # see `guards.evaluate_guards`


class _Examples(NamedTuple):
    """The examples to score."""

    dataset: Dataset
    rows: np.ndarray
    memory: int  # limit in bytes
    units: np.ndarray | None = None  # [N] of all rows, see `Outputs.units`
    overlap: int = 0  # rows that the student has seen


def evaluate_run(directory: Path, settings: EvaluationConfig) -> tuple[Certificate, list[dict[str, Any]]]:
    """Evaluates the student of a finished run.

    On the run's own sealed split this repeats the claims of the run's certificates, from their files; any others need `reopen`.

    Args:
      directory: of the run.
      settings: what to evaluate.

    Returns:
      The certificate, and the outcome of each guard, see `guards.evaluate_guards`.
    """
    with _trust(settings):
        return _evaluate_run(directory, settings)


def _trust(settings: EvaluationConfig) -> contextlib.AbstractContextManager[None]:
    texts = (settings.student, settings.data, *settings.guards)
    return user_code.only_typed(texts, trusted=settings.trust_run)


def _evaluate_run(directory: Path, settings: EvaluationConfig) -> tuple[Certificate, list[dict[str, Any]]]:
    run_report = _read_report(directory)
    network, variables = students.load(directory, factory=students.import_factory(settings.student))
    run_config, classes = config_of(directory, run_report), run_report["data"]["classes"]
    examples = _load_examples(directory, run_config, settings, run_report["data"])
    sizes = sizes_of(variables)
    query, guards = _query(settings, examples, classes, sizes=sizes)
    digest = tree_digest(variables)
    level = _level(None if settings.data else directory, Subject(digest), query)
    if level.repeated is not None:
        return level.repeated, evaluate_guards(guards, level.repeated.claims, sizes=sizes)
    outputs = _outputs(forward(network, variables), examples, chunk=CHUNK)
    measured = measured_bounds(query.metrics, network, variables, examples.dataset)
    certificate = _certificate(outputs, query, measured, level)
    if level.reopened:
        write_certificate(directory, certificate, digest, network.spec)
    outcomes = evaluate_guards(guards, certificate.claims, sizes=sizes)
    return proof_without_overlap(certificate, outcomes, examples.overlap)


def evaluate_file(
    path: Path, settings: EvaluationConfig, *, run: Path | None = None, threads: int = 0
) -> FileEvaluation:
    """Runs an exported file itself, in a subprocess, and evaluates it as `evaluate_run` does a run's student.

    On the sealed split of its run, the file must compute the same as the student and give the same answer to every example.
    The certificate then covers both, except for latency, which is the file's own. A student that trained for int8 has an int8
    file, which may round some sums differently and is scored by its own outputs. The int8 file of a float32 student is another
    student, and needs other data.

    Args:
      path: a .onnx, .stablehlo or .safetensors file.
      settings: what to evaluate; without `data`, on the sealed split of `run`. A guard on `bytes` is about the file's size.
      run: the run of the file, whose student it is compared with, example by example.
      threads: number of threads the file may use; 0: all cores.
    """
    with _trust(settings):
        return _evaluate_file(path, settings, run, threads)


def _evaluate_file(path: Path, settings: EvaluationConfig, run: Path | None, threads: int) -> FileEvaluation:
    if not settings.data and run is None:
        raise InputError(
            "evaluating a file needs examples; got none: name data with --data, or the run of the file with --of RUN"
        )
    with open_exported(path, threads=threads) as file:
        about = file.metadata
        run_config = config.Compress() if run is None else config_of(run, _read_report(run))
        examples = _load_examples(run, run_config, settings, about.data, file=file)
        sizes = {"params": about.params, "bytes": path.stat().st_size}
        query, guards = _query(settings, examples, about.classes, sizes=sizes)
        outputs = _outputs(file.logits, examples, chunk=FILE_CHUNK)
        lines = [f"{path}: {about.network}, {about.precision}, {sizes['bytes']:,} bytes, run by {file.runtime}"]
        subject, student = Subject(about.student), None
        if run is not None:
            student = _load_student(run, about.student, students.import_factory(settings.student))
            comparison = _compare_with_student(file, outputs, examples, student, settings)
            lines.append(f"the student of {run}: {comparison.text}")
            subject = Subject(about.student, sha256_of(path), comparison.same)
            outputs = comparison.student if comparison.same and not settings.data else outputs
        level = _level(None if settings.data else run, subject, query)
        times, teacher = file_latency.measure(file, examples.dataset, run)
        lines += file_latency.report_lines(times, teacher, threads=file.threads)
        measured = {"latency_ms": median_bound("latency_ms", times[1])} if "latency_ms" in query.metrics else {}
        certificate = level.repeated or _certificate(outputs, query, measured, level)
        if level.repeated is None and level.reopened and run is not None and student is not None:
            timed = subject.file if measured else ""
            write_certificate(run, certificate, about.student, student[0].spec, file=timed)
        outcomes = evaluate_guards(guards, certificate.claims, sizes=sizes)
        return FileEvaluation(lines, *proof_without_overlap(certificate, outcomes, examples.overlap))


class _Comparison(NamedTuple):
    """A file beside the student that it comes from."""

    student: Outputs  # of the student on the examples
    same: bool  # whether the file computes the same
    text: str


def _compare_with_student(
    file: ExportedModel,
    outputs: Outputs,
    examples: _Examples,
    student: tuple[Network, Variables],
    settings: EvaluationConfig,
) -> _Comparison:
    """Compares a file with the student it comes from, example by example.

    Raises:
      InputError: the file is to be scored on the sealed split, and is another student.
    """
    about = file.metadata
    expected = _outputs(forward(*student), examples, chunk=FILE_CHUNK)
    equal, text = _agreement(outputs.student, expected.student, task=task_of(about.classes), output=about.output)
    same = equal and about.precision == "float32"
    trained_for_int8 = about.precision == "int8" == student[0].spec.get("deploy")  # fixed before the split was opened
    if not settings.data and not trained_for_int8 and not same:
        raise InputError(
            f"a sealed split certifies one student, and files that compute the same; {file.path} has {about.precision} weights "
            f"and gives {text}: score new data with --data"
        )
    return _Comparison(expected, same, text)


def _read_report(directory: Path) -> dict[str, Any]:
    """The report of a finished run."""
    run_report = report_in(directory)
    if run_report is None and (directory / "evidence.json").exists():
        raise InputError(
            f"evaluate takes a run or an exported file; {directory} is an export of an older version, without a file: evaluate "
            "the run, or export the student again"
        )
    if run_report is None:
        raise InputError(f"evaluate needs a finished run; {directory} has no report.json: finish it with --resume")
    task_of_report(run_report)  # refuses other tasks
    return run_report


def _load_examples(
    run: Path | None,
    run_config: config.RunConfig,
    settings: EvaluationConfig,
    trained_on: Mapping[str, Any],
    *,
    file: ExportedModel | None = None,
) -> _Examples:
    """The examples to score: those of a data source that are new to the student, or the sealed split of the run's own data.

    Args:
      run: its directory.
      run_config: its configuration.
      settings: name the data source; without one, the run's own.
      trained_on: `fingerprint` and `offset` of the run's data and, without `file`, their `input_shape` and `classes`.
      file: to be scored.

    Raises:
      InputError: the data do not fit the student or the file, or none of them is new.
    """
    about = None if file is None else file.metadata
    dataset = data_of(run_config, settings.data, offset=offset_in(trained_on))
    if about is None:
        matched = _as_student_sees(dataset, trained_on["input_shape"], trained_on["classes"])
    else:
        matched = _as_student_sees(dataset, about.input_shape, about.classes)
        _check_dtype(dataset, about)
    limit = memory_limit(run_config.memory)
    if run is not None and not settings.data:
        run_dir.read_inputs(run, dataset.fingerprint)
        return _Examples(matched, splits_of(run_config, dataset)["test"], limit, units_of(run_config, dataset))
    seen = find_seen_rows(run, run_config, None if file is None else file.path, trained_on["fingerprint"])
    rows, overlap = find_new_rows(dataset, seen, keep=settings.keep_overlap)
    for text in pairing_warnings(dataset, matched, rows):
        warn(text)
    grouped = run_config.split_by == config.GROUPS or (about is not None and "units" in about.certificate)
    if grouped and dataset.groups is None:
        warn(
            f"the student was certified for new groups, and {dataset.source} has no array `groups`: the bounds take every "
            "example for independent, and promise too much where several resemble each other"
        )
    return _Examples(matched, rows, limit, dataset.groups if grouped else None, overlap)


def _as_student_sees(dataset: Dataset, input_shape: list[int], classes: Sequence[str]) -> Dataset:
    """The data set with the classes of a student.

    Raises:
      InputError: a student of these inputs and classes cannot be scored on the data set.
    """
    require_labels(dataset, "evaluate")
    if list(dataset.inputs.shape[1:]) != input_shape:
        raise InputError(
            f"the student takes inputs of shape {input_shape}; {dataset.source} has {list(dataset.inputs.shape[1:])}: name "
            "data like those of the run"
        )
    return match_classes(dataset, classes)


def _check_dtype(dataset: Dataset, about: ModelMetadata) -> None:
    if dataset.inputs.dtype.name != about.dtype:
        raise InputError(
            f"a file takes inputs of the dtype of its run's data, {about.dtype}; {dataset.source} has "
            f"{dataset.inputs.dtype.name}: convert the data"
        )


def _query(
    settings: EvaluationConfig, examples: _Examples, classes: Sequence[str], *, sizes: Mapping[str, int]
) -> tuple[Query, list[Guard]]:
    """What to claim, and the guards, checked against the data. The teacher is not available."""
    costs = read_costs(settings.costs, len(classes)) if settings.costs else None
    guards = parse_guards(
        settings.guards,
        examples.dataset,
        num_classes=len(classes),
        class_names=classes,
        sizes=sizes,
        costs=costs,
        teacher=False,
        grouped=examples.units is not None,
    )
    metrics = metrics_to_claim(guards, labeled=True, teacher=False)
    return Query(metrics, list(map(nfc, classes)), costs, settings.confidence, settings.reopen), guards


def _level(sealed: Path | None, subject: Subject, query: Query) -> Level:
    """The level of the claims.

    Args:
      sealed: the run whose sealed split is scored; None for new data.
      subject: what is evaluated.
      query: what to claim.
    """
    if sealed is None:
        if any(metric_kind(name) == TIMING for name in query.metrics):
            warn(
                "with --data a latency is measured at each evaluation, without a record: its bound holds for one measurement, "
                "not for the best of several"
            )
        return level_on_new_data(query)
    certificate = certificate_in(sealed, _read_report(sealed))
    claimed = [claim["metric"] for claim in certificate["claims"]]
    level = level_on_sealed_split(sealed, subject, query, confidence=certificate["confidence"], claimed=claimed)
    renewed = [name for name in query.metrics if is_renewed(name)]
    if level.repeated is not None and renewed:
        warn(
            f"claims on {', '.join(renewed)} are repeated from a certificate of {sealed}, not computed again: --reopen does "
            "that, with wider bounds"
        )
    return level


def _outputs(logits: Callable[[np.ndarray], np.ndarray], examples: _Examples, *, chunk: int) -> Outputs:
    """The outputs on the examples, computed in chunks that fit into memory."""
    dataset, rows, memory, of_rows, _ = examples
    parts = [logits(dataset.inputs[part]) for part in chunked(rows, eval_batch_size(dataset, memory, chunk))]
    groups = None if dataset.groups is None else dataset.groups[rows]
    units = None if of_rows is None else of_rows[rows]
    return Outputs(
        np.concatenate(parts), dataset.labels[rows], groups=groups, num_groups=len(dataset.group_names), units=units
    )


def _agreement(outputs: np.ndarray, expected: np.ndarray, *, task: Task, output: str) -> tuple[bool, str]:
    """Whether a file [N, K] computes what its student does, and a line of text about it."""
    if output == "probabilities":  # the file's logits are those of the student up to a constant for each example
        outputs, expected = (probabilities(logits) for logits in (outputs, expected))
    different, n = int((~task.same_answer(outputs, expected)).sum()), len(outputs)
    difference = np.abs(outputs - expected).max()
    equal = not different and bool(difference <= TOLERANCE * max(1.0, np.abs(expected).max()))
    text = f"the same answer on {n - different:,} of {n:,} examples, {output} differ by at most {difference:.1g}"
    return equal, text


def _load_student(directory: Path, digest: str, factory: Callable[..., Any] | None) -> tuple[Network, Variables]:
    """The student with that digest: the delivered one, or one that a search tried."""
    for folder in (directory, *sorted((directory / "sizes").glob("*/student"))):
        network, variables = students.load(folder, factory=factory)
        if tree_digest(variables) == digest:
            return network, variables
    raise InputError(
        f"--of names the run of an exported file; {directory} has no student {digest[:12]}: name its run, or omit --of"
    )


def _certificate(outputs: Outputs, query: Query, measured: Mapping[str, Bound], level: Level) -> Certificate:
    """The certificate at that level."""
    request = CertificateRequest(
        task_of(query.class_names), query.metrics, level.confidence, query.class_names, costs=query.costs
    )
    return certificate_of(
        outputs, request, measured=measured, shares=level.shares, among=level.among, reopened=level.reopened
    )
