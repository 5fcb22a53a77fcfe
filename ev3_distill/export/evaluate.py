"""Evaluation: a student that is there already, scored anew."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill import config, students
from ev3_distill.certify.certificate import Bound, Certificate, equal_shares, median_bound
from ev3_distill.data.sources import Dataset
from ev3_distill.data.splits import split_rows
from ev3_distill.errors import InputError, warn
from ev3_distill.export import teacher_latency
from ev3_distill.export.formats.metadata import ModelMetadata
from ev3_distill.export.formats.runtime import ExportedModel, open_exported
from ev3_distill.guards import Guard, evaluate_guards
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.timing import PASSES, quantiles
from ev3_distill.tasks.classification.example_metrics import predicted_class, probabilities
from ev3_distill.tasks.classification.task import classification
from ev3_distill.tasks.classification.user_metrics import digest_of_costs, read_costs
from ev3_distill.tasks.outputs import Outputs
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.teachers.targets import chunked
from ev3_distill.training import run_dir, sealed_split
from ev3_distill.training.certify_run import (
    CertificateRequest,
    certificate_of,
    measured_bounds,
    metrics_to_claim,
    sizes_of,
    write_certificate,
)
from ev3_distill.training.guard_checks import parse_guards, require_labels
from ev3_distill.training.memory import eval_batch_size, memory_limit
from ev3_distill.training.run_reader import config_of, data_of, report_in
from ev3_distill.training.setup import CHUNK
from ev3_distill.types import Network, Variables

BATCHES = (1, 64)  # that a file is timed at
AT_ONCE = 256  # examples of one pass of a file, at most


def evaluate(
    directory: Path,
    source: str,
    confidence: float | None,
    student: str = "",
    guards: Sequence[str] = (),
    *,
    costs: str = "",
    reopen: bool = False,
) -> tuple[Certificate, list[dict[str, Any]]]:
    """Accuracy of a finished run's student, and what guards ask for, on a source as a whole or on the run's own sealed split.

    On the sealed split this is the run's own certificate again, claim by claim; what that does not claim needs `reopen`.

    Args:
      directory: of the run.
      source: of examples; the run's own sealed split where none is named.
      confidence: of all claims together; by default 0.95, or the run's own on its own split.
      student: the MODULE:FACTORY that made the student, where it is of the user's own.
      guards: what must hold of the student on these examples.
      costs: CSV file, for a guard on cost.
      reopen: the sealed split for other claims.

    Returns:
      The certificate, and for each guard whether it is certified, see `guards.evaluate_guards`.
    """
    finished = _report_of(directory)
    network, variables = students.load(directory, factory=students.import_factory(student))
    chosen = config_of(directory, finished)
    dataset, classes = data_of(chosen, source), finished["data"]["classes"]
    _check_fits(dataset, finished["data"])
    rows = _rows(directory, chosen, dataset, source, finished["data"]["fingerprint"])
    table = read_costs(costs, len(classes)) if costs else None
    sizes = sizes_of(variables)
    parsed = _parsed_guards(guards, dataset, classes, sizes=sizes, costs=table)
    metrics = metrics_to_claim(parsed, labeled=True, teacher=False)
    sealed = None if source else directory
    request = _Request(metrics, classes, table)
    level = _level(sealed, tree_digest(variables), request, confidence=confidence, reopen=reopen)
    at_once = eval_batch_size(dataset, memory_limit(chosen.memory), CHUNK)
    outputs = _outputs(forward(network, variables), dataset, rows, at_once=at_once)
    certificate = _certificate(outputs, request, measured_bounds(metrics, network, variables, dataset), level)
    if level.reopened:
        write_certificate(directory, certificate, tree_digest(variables))
    return certificate, evaluate_guards(parsed, certificate.claims, sizes=sizes)


@dataclasses.dataclass(frozen=True)
class OfFile:
    """What became of an exported file that was run."""

    lines: list[str]  # what it is, how it agrees with the student, and how long it takes
    certificate: Certificate
    guards: list[dict[str, Any]]


def evaluate_file(
    path: Path,
    source: str,
    *,
    of: Path | None = None,
    confidence: float | None = None,
    student: str = "",
    guards: Sequence[str] = (),
    costs: str = "",
    reopen: bool = False,
    threads: int = 0,
) -> OfFile:
    """Runs an exported file itself, in a process of its own, and says what `evaluate` says of a run's student.

    On the sealed split of the run `of` it does so where the file computes the same as the student and gives its answer to
    every example: the certificate is about both. A student that trained for int8 has its file in int8, which may round some
    sums to another whole number, and is scored there by what it says itself. An int8 file of a student in float32 is another
    student, and is scored on other data.

    Args:
      path: of the file, .onnx, .stablehlo or .safetensors.
      source: of examples; the sealed split of `of` where none is named.
      of: the run that the file is of, to compare them example by example.
      confidence: as `evaluate`.
      student: as `evaluate`.
      guards: what must hold of the file; `bytes` is its size.
      costs: as `evaluate`.
      reopen: as `evaluate`.
      threads: that the file may compute with; 0 for all.
    """
    if not source and of is None:
        raise InputError(
            "a file is scored on examples; got none: name them by --data, or the run that it is of by --of RUN"
        )
    with open_exported(path, threads=threads) as file:
        about = file.metadata
        chosen = config.Compress() if of is None else config_of(of, _report_of(of))
        dataset = data_of(chosen, source)
        _check_takes(about, dataset)
        rows = _rows(of, chosen, dataset, source, about.data["fingerprint"])
        table = read_costs(costs, len(about.classes)) if costs else None
        sizes = {"params": about.params, "bytes": path.stat().st_size}
        parsed = _parsed_guards(guards, dataset, about.classes, sizes=sizes, costs=table)
        metrics = metrics_to_claim(parsed, labeled=True, teacher=False)
        request = _Request(metrics, about.classes, table)
        outputs = _outputs(
            file.logits, dataset, rows, at_once=eval_batch_size(dataset, memory_limit(chosen.memory), AT_ONCE)
        )
        lines = [f"{path}: {about.network}, {about.precision}, {sizes['bytes']:,} bytes, run by {file.runtime}"]
        sealed = None if source else of
        if of is not None:
            network, variables = _student_of(of, about.student, students.import_factory(student))
            theirs = _outputs(forward(network, variables), dataset, rows, at_once=AT_ONCE)
            same = _agreement(outputs.student, theirs.student, about.output)
            lines.append(f"the student of {of}: {same.told}")
            rounds = (
                about.precision == "int8" and about.certificate
            )  # such a student's file, fixed before the split was opened
            if not source and not rounds and (same.others or about.precision != "float32"):
                raise InputError(
                    f"a sealed split certifies one student, and files that compute the same; {path} is of {about.precision} "
                    f"weights and gives {same.told}: score data that are new to it by --data"
                )
        level = _level(sealed, about.student, request, confidence=confidence, reopen=reopen)
        own, of_teacher = times_of(file, dataset, of)
        lines += _latency_lines(own, of_teacher, threads=file.threads)
        measured = {"latency_ms": median_bound("latency_ms", own[1])} if "latency_ms" in metrics else {}
        certificate = _certificate(outputs, request, measured, level)
        if level.reopened and sealed is not None:
            write_certificate(sealed, certificate, about.student)
        return OfFile(lines, certificate, evaluate_guards(parsed, certificate.claims, sizes=sizes))


def _report_of(directory: Path) -> dict[str, Any]:
    """The report of a run that must have one."""
    finished = report_in(directory)
    if finished is None and (directory / "evidence.json").exists():
        raise InputError(
            f"evaluate runs a student of a run, or a file; {directory} is one exported without a file, by an older version: "
            "evaluate the run, or export it again"
        )
    if finished is None:
        raise InputError(f"evaluate needs a finished run; {directory} has no report.json: finish it by --resume")
    return finished


def _check_takes(about: ModelMetadata, dataset: Dataset) -> None:
    """Whether a file can be scored on that data set."""
    _check_fits(dataset, {"input_shape": about.input_shape, "classes": about.classes})
    if dataset.inputs.dtype.name != about.dtype:
        raise InputError(
            f"a file takes inputs of the type that its run had, {about.dtype}; {dataset.source} has "
            f"{dataset.inputs.dtype.name}: convert the data"
        )


def _rows(
    of: Path | None, chosen: config.Compress | config.Teach, dataset: Dataset, source: str, fingerprint: str
) -> np.ndarray:
    """Of the examples to be scored: all of a source that is named, or those of the run's own sealed split."""
    if of is not None and not source:
        run_dir.read_inputs(of, dataset.fingerprint)
        return split_rows(dataset.labels, dataset.test_rows, seed=chosen.seed, fractions=chosen.splits)["test"]
    if dataset.fingerprint == fingerprint:
        warn(
            f"{source} are the data of the run, and trained the student: on the whole of them its accuracy proves nothing"
        )
    return np.arange(len(dataset.labels))


def latency_line(whose: str, size: int, told: Mapping[str, float], *, threads: int) -> str:
    """What passes on batches of this size took, see `timing.quantiles`."""
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    return (
        f"latency{whose} at batch {size}: {told['p50']:.3g} ms p50, {told['p99']:.3g} ms p99, {count}, "
        f"{told['passes']} passes"
    )


def times_of(
    file: ExportedModel, dataset: Dataset, of: Path | None
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray] | str]:
    """Times of passes of a file, and of the teacher of the run that it is of, each by the size of its batches.

    The teacher has as many processors as the file. A string says why it has no times; it is empty where no run is named.
    """
    examples = np.asarray(dataset.inputs[np.arange(min(max(BATCHES), len(dataset.labels)))])
    own = {}
    for size in BATCHES:
        batch = examples[np.resize(np.arange(len(examples)), size)]
        own[size] = file.passes_ms(batch, PASSES if size == 1 else PASSES // 3)
    theirs: dict[int, np.ndarray] | str = ""
    if of is not None:
        theirs = teacher_latency.teacher_times(of, dataset, examples, sizes=BATCHES, threads=file.threads)
    return own, theirs


def _latency_lines(own: dict[int, np.ndarray], theirs: dict[int, np.ndarray] | str, *, threads: int) -> list[str]:
    lines = [latency_line("", size, quantiles(times), threads=threads) for size, times in own.items()]
    if isinstance(theirs, str):
        return [*lines, f"latency of the teacher: {theirs}"] if theirs else lines
    whose = " of the teacher"
    return lines + [latency_line(whose, size, quantiles(times), threads=threads) for size, times in theirs.items()]


class _Agreement(NamedTuple):
    others: int  # examples that are given another class
    told: str


def _agreement(said: np.ndarray, expected: np.ndarray, output: str) -> _Agreement:
    """How a file's answers [N, K] compare with the student's."""
    if output == "probabilities":  # the file's logits are such up to a constant for each example
        said, expected = (probabilities(logits) for logits in (said, expected))
    others = int((predicted_class(said) != predicted_class(expected)).sum())
    difference, n = np.abs(said - expected).max(), len(said)
    return _Agreement(
        others, f"the same class on {n - others:,} of {n:,} examples, {output} differ by {difference:.1g} at most"
    )


def _student_of(directory: Path, digest: str, factory: Callable[..., Any] | None) -> tuple[Network, Variables]:
    """The student of that digest: the one that a run delivered, or one that a search tried."""
    for folder in (directory, *sorted((directory / "sizes").glob("*/student"))):
        network, variables = students.load(folder, factory=factory)
        if tree_digest(variables) == digest:
            return network, variables
    raise InputError(
        f"--of names the run that a file is of; {directory} has no student {digest[:12]}: name its run, or leave out --of"
    )


def _outputs(
    logits: Callable[[np.ndarray], np.ndarray], dataset: Dataset, rows: np.ndarray, *, at_once: int
) -> Outputs:
    """What is said of some examples of a data set."""
    parts = [logits(dataset.inputs[part]) for part in chunked(rows, at_once)]
    groups = None if dataset.groups is None else dataset.groups[rows]
    return Outputs(np.concatenate(parts), dataset.labels[rows], groups=groups, num_groups=len(dataset.group_names))


def _parsed_guards(
    texts: Sequence[str],
    dataset: Dataset,
    classes: Sequence[str],
    *,
    sizes: Mapping[str, int],
    costs: np.ndarray | None,
) -> list[Guard]:
    """The guards of a student of these classes, checked on the data that it is scored on, without its teacher."""
    return parse_guards(
        texts, dataset, num_classes=len(classes), class_names=classes, sizes=sizes, costs=costs, teacher=False
    )


class _Request(NamedTuple):
    """What to claim."""

    metrics: Sequence[str]
    class_names: Sequence[str]
    costs: np.ndarray | None  # [K, K], for a claim on cost


def _certificate(outputs: Outputs, request: _Request, measured: Mapping[str, Bound], level: "_Level") -> Certificate:
    """The certificate at that level."""
    return certificate_of(
        outputs,
        CertificateRequest(
            classification(len(request.class_names)),
            request.metrics,
            level.confidence,
            request.class_names,
            costs=request.costs,
        ),
        measured=measured,
        shares=level.shares,
        among=level.among,
        reopened=level.reopened,
    )


class _Level(NamedTuple):
    confidence: float
    shares: dict[str, float]  # of the error probability, by claim
    reopened: int
    among: int  # students for which the split was opened


def _level(
    directory: Path | None,
    student: str,
    request: _Request,
    *,
    confidence: float | None,
    reopen: bool,
) -> _Level:
    """The level at which metrics may be claimed; opens the sealed split of a run again where that is due.

    Args:
      directory: of the run whose sealed split is scored; None for other data.
      student: its digest.
      request: what to claim.
      confidence: that the user gives, if any.
      reopen: allow further claims on the sealed split.
    """
    metrics = request.metrics
    if confidence is not None and not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, exclusive; got {confidence}: try 0.95")
    if directory is None:
        return _Level(0.95 if confidence is None else confidence, equal_shares(metrics), 0, 1)
    finished = _report_of(directory)
    own = finished["certificate"]["confidence"]
    digest = digest_of_costs(request.costs)
    if not sealed_split.read_openings(directory):  # a run that is older than this record
        claimed = [claim["metric"] for claim in finished["certificate"]["claims"]]
        family = sealed_split.ORIGINAL_FAMILY
        sealed_split.open_split(directory, student, claimed, confidence=own, family=family)
    first, *_ = sealed_split.read_openings(directory)
    among = len(sealed_split.candidates_of(first))
    same = (
        student in sealed_split.candidates_of(first)
        and confidence in (None, own)
        and ("cost" not in metrics or first["costs"] == digest)
    )
    if same and set(metrics) <= set(first["claims"]):
        return _Level(own, equal_shares(first["claims"]), 0, among)
    if confidence not in (None, own):
        raise InputError(
            f"a sealed split keeps the confidence that it was opened at; that of {directory} is {own:.10g}, got "
            f"{confidence:.10g}: leave out --confidence, or score other data with --data"
        )
    with run_dir.held(directory):
        reopened = sealed_split.open_split(directory, student, metrics, confidence=own, costs=digest, reopen=reopen)
    shares = sealed_split.shares_when_reopened(
        metrics, reopened, family=sealed_split.family_of(first), num_classes=len(request.class_names)
    )
    return _Level(own, shares, reopened, among)


def _check_fits(dataset: Dataset, expected: dict[str, Any]) -> None:
    """Whether a student of these data can be scored on that data set."""
    require_labels(dataset, "evaluate")
    if list(dataset.inputs.shape[1:]) != expected["input_shape"] or dataset.num_classes > len(expected["classes"]):
        raise InputError(
            f"the student takes inputs of shape {expected['input_shape']} and knows {len(expected['classes'])} classes; "
            f"{dataset.source} has {list(dataset.inputs.shape[1:])} and {dataset.num_classes}: name data like its own"
        )
