"""Evaluation: a student that is there already, scored anew."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill import config, students
from ev3_distill.certify import certificate
from ev3_distill.data.sources import Dataset
from ev3_distill.data.splits import split_rows
from ev3_distill.errors import InputError, warn
from ev3_distill.export import teacher_latency
from ev3_distill.export.formats.metadata import About
from ev3_distill.export.formats.runtime import Deployed, deployed
from ev3_distill.guards import judge
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.timing import PASSES, summary
from ev3_distill.tasks.classification import metric_bounds
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.teachers.targets import chunked
from ev3_distill.training import run_dir, sealed_split
from ev3_distill.training.certify_run import known_of, measured, metrics_asked
from ev3_distill.training.guard_checks import check_labelled, guards_of
from ev3_distill.training.run_reader import config_of, data_of, report_in
from ev3_distill.training.setup import CHUNK, evaluated_at_once, limit_of
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
) -> tuple[certificate.Certificate, list[dict[str, Any]]]:
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
      The certificate, and for each guard whether it is certified, see `guards.judge`.
    """
    finished = _report_of(directory)
    network, variables = students.load(directory, factory=students.factory_of(student))
    chosen = config_of(directory, finished)
    dataset, classes = data_of(chosen, source), finished["data"]["classes"]
    _check_fits(dataset, finished["data"])
    rows = _rows(directory, chosen, dataset, source, finished["data"]["fingerprint"])
    table = metric_bounds.read_costs(costs, len(classes)) if costs else None
    known = known_of(variables)
    asked = guards_of(guards, dataset, num_classes=len(classes), known=known, costs=table, teacher=False)
    metrics = metrics_asked(asked, labelled=True, teacher=False)
    sealed = None if source else directory
    level = _level(sealed, tree_digest(variables), metrics, confidence=confidence, costs=table, reopen=reopen)
    at_once = evaluated_at_once(dataset, limit_of(chosen.memory), CHUNK)
    outputs = _outputs(forward(network, variables), dataset, rows, at_once=at_once)
    found = measured(metrics, network, variables, dataset)
    made = _certified(metrics, outputs, found, level, costs=table)
    if level.reopened:
        run_dir.write_certificate(directory, made, tree_digest(variables))
    return made, judge(asked, made.claims, known=known)


@dataclasses.dataclass(frozen=True)
class OfFile:
    """What became of an exported file that was run."""

    lines: list[str]  # what it is, how it agrees with the student, and how long it takes
    certificate: certificate.Certificate
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
    with deployed(path, threads=threads) as file:
        about = file.about
        chosen = config.Compress() if of is None else config_of(of, _report_of(of))
        dataset = data_of(chosen, source)
        _check_takes(about, dataset)
        rows = _rows(of, chosen, dataset, source, about.data["fingerprint"])
        table = metric_bounds.read_costs(costs, len(about.classes)) if costs else None
        known = {"params": about.params, "bytes": path.stat().st_size}
        asked = guards_of(guards, dataset, num_classes=len(about.classes), known=known, costs=table, teacher=False)
        metrics = metrics_asked(asked, labelled=True, teacher=False)
        outputs = _outputs(
            file.logits, dataset, rows, at_once=evaluated_at_once(dataset, limit_of(chosen.memory), AT_ONCE)
        )
        lines = [f"{path}: {about.network}, {about.precision}, {known['bytes']:,} bytes, run by {file.by}"]
        sealed = None if source else of
        if of is not None:
            network, variables = _student_of(of, about.student, students.factory_of(student))
            theirs = _outputs(forward(network, variables), dataset, rows, at_once=AT_ONCE)
            same = _agreement(outputs.logits, theirs.logits, about.output)
            lines.append(f"the student of {of}: {same.told}")
            rounds = (
                about.precision == "int8" and about.certificate
            )  # such a student's file, fixed before the split was opened
            if not source and not rounds and (same.others or about.precision != "float32"):
                raise InputError(
                    f"a sealed split certifies one student, and files that compute the same; {path} is of {about.precision} "
                    f"weights and gives {same.told}: score data that are new to it by --data"
                )
        level = _level(sealed, about.student, metrics, confidence=confidence, costs=table, reopen=reopen)
        own, of_teacher = times_of(file, dataset, of)
        lines += _latency_lines(own, of_teacher, threads=file.threads)
        found = {"latency_ms": metric_bounds.latency(own[1])} if "latency_ms" in metrics else {}
        made = _certified(metrics, outputs, found, level, costs=table)
        if level.reopened and sealed is not None:
            run_dir.write_certificate(sealed, made, about.student)
        return OfFile(lines, made, judge(asked, made.claims, known=known))


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


def _check_takes(about: About, dataset: Dataset) -> None:
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
        run_dir.given_to(of, dataset.fingerprint)
        return split_rows(dataset.labels, dataset.test_rows, seed=chosen.seed, fractions=chosen.splits)["test"]
    if dataset.fingerprint == fingerprint:
        warn(
            f"{source} are the data of the run, and trained the student: on the whole of them its accuracy proves nothing"
        )
    return np.arange(len(dataset.labels))


def latency_line(whose: str, size: int, told: Mapping[str, float], *, threads: int) -> str:
    """What passes on batches of this size took, see `timing.summary`."""
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    return (
        f"latency{whose} at batch {size}: {told['p50']:.3g} ms p50, {told['p99']:.3g} ms p99, {count}, "
        f"{told['passes']} passes"
    )


def times_of(
    file: Deployed, dataset: Dataset, of: Path | None
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
    lines = [latency_line("", size, summary(times), threads=threads) for size, times in own.items()]
    if isinstance(theirs, str):
        return [*lines, f"latency of the teacher: {theirs}"] if theirs else lines
    whose = " of the teacher"
    return lines + [latency_line(whose, size, summary(times), threads=threads) for size, times in theirs.items()]


class _Agreement(NamedTuple):
    others: int  # examples that are given another class
    told: str


def _agreement(said: np.ndarray, expected: np.ndarray, output: str) -> _Agreement:
    """How a file's answers [N, K] compare with the student's."""
    if output == "probabilities":  # the file's logits are such up to a constant for each example
        said, expected = (metric_bounds.probabilities(logits) for logits in (said, expected))
    others = int((metric_bounds.said(said) != metric_bounds.said(expected)).sum())
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
) -> certificate.Outputs:
    """What is said of some examples of a data set."""
    parts = [logits(dataset.inputs[part]) for part in chunked(rows, at_once)]
    groups = None if dataset.groups is None else dataset.groups[rows]
    return certificate.Outputs(
        np.concatenate(parts), dataset.labels[rows], groups=groups, num_groups=len(dataset.group_names)
    )


def _certified(
    metrics: Sequence[str],
    outputs: certificate.Outputs,
    found: Mapping[str, metric_bounds.Bound],
    level: "_Level",
    *,
    costs: np.ndarray | None,
) -> certificate.Certificate:
    """The certificate at that level; some claims may be found already."""
    all_of = {**found, **certificate.claims_of([name for name in metrics if name not in found], outputs, costs=costs)}
    of_metrics = {metric: all_of[metric] for metric in metrics}
    made = certificate.make_certificate(of_metrics, confidence=level.confidence, shares=level.shares, among=level.among)
    return dataclasses.replace(made, reopened=level.reopened)


class _Level(NamedTuple):
    confidence: float
    shares: dict[str, float]  # of the error probability, by claim
    reopened: int
    among: int  # students for which the split was opened


def _level(
    directory: Path | None,
    student: str,
    metrics: Sequence[str],
    *,
    confidence: float | None,
    costs: np.ndarray | None,
    reopen: bool,
) -> _Level:
    """At which level these metrics may be claimed; opens the sealed split of a run again where that is due.

    Args:
      directory: of the run whose sealed split is scored; None for other data.
      student: its digest.
      metrics: to be claimed.
      confidence: asked for.
      costs: [K, K], for a claim on them.
      reopen: the split for other claims.
    """
    if confidence is not None and not 0 < confidence < 1:
        raise InputError(f"confidence is a probability above 0 and below 1; got {confidence}: try 0.95")
    if directory is None:
        return _Level(0.95 if confidence is None else confidence, certificate.shares_of(metrics), 0, 1)
    finished = _report_of(directory)
    own = finished["certificate"]["confidence"]
    digest = metric_bounds.digest_of_costs(costs)
    if not sealed_split.openings(directory):  # a run from before they were kept
        claimed = [claim["metric"] for claim in finished["certificate"]["claims"]]
        sealed_split.open_split(directory, student, claimed, confidence=own)
    first, *_ = sealed_split.openings(directory)
    among = len(sealed_split.candidates_of(first))
    same = (
        student in sealed_split.candidates_of(first)
        and confidence in (None, own)
        and ("cost" not in metrics or first["costs"] == digest)
    )
    if same and set(metrics) <= set(first["claims"]):
        return _Level(own, certificate.shares_of(first["claims"]), 0, among)
    if confidence not in (None, own):
        raise InputError(
            f"a sealed split keeps the confidence that it was opened at; that of {directory} is {own:.10g}, got "
            f"{confidence:.10g}: leave out --confidence, or score other data by --data"
        )
    with run_dir.held(directory):
        reopened = sealed_split.open_split(directory, student, metrics, confidence=own, costs=digest, reopen=reopen)
    return _Level(own, certificate.shares_when_reopened(metrics, reopened), reopened, among)


def _check_fits(dataset: Dataset, expected: dict[str, Any]) -> None:
    """Whether a student of these data can be scored on that data set."""
    check_labelled(dataset, "evaluate")
    if list(dataset.inputs.shape[1:]) != expected["input_shape"] or dataset.num_classes > len(expected["classes"]):
        raise InputError(
            f"the student takes inputs of shape {expected['input_shape']} and knows {len(expected['classes'])} classes; "
            f"{dataset.source} has {list(dataset.inputs.shape[1:])} and {dataset.num_classes}: name data like its own"
        )
