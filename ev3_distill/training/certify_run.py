"""Certification of a run: opens the sealed split, on record, for one or a few final students, and certifies one of them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ev3_distill.certify.certificate import (
    NOT_COVERED,
    Bound,
    Certificate,
    Claim,
    Units,
    make_certificate,
    median_bound,
)
from ev3_distill.core.assess import outputs_of
from ev3_distill.data.sources import Dataset
from ev3_distill.guards import Guard, evaluate_guards
from ev3_distill.runtime.compile import jit
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.latency import passes_ms
from ev3_distill.students import count_params
from ev3_distill.students.digests import spec_digest
from ev3_distill.tasks.base import Task, has_target
from ev3_distill.tasks.metrics import METRICS, Metric
from ev3_distill.tasks.outputs import Outputs, bounds_of
from ev3_distill.training import sealed_split
from ev3_distill.training.run_dir import write_json
from ev3_distill.types import Batch, Network, Variables


@dataclasses.dataclass(frozen=True, eq=False)
class CertificateRequest:
    """What to claim, fixed before the split is opened.

    Attributes:
      task: says what outputs mean.
      metrics: to be claimed.
      confidence: of all claims jointly, and of each table.
      class_names: of the K classes; empty where the task has none.
      group_names: of the groups; empty where there are none.
      costs: [K, K] of predictions, for a claim on cost.
    """

    task: Task
    metrics: Sequence[str]
    confidence: float
    class_names: Sequence[str] = ()
    group_names: Sequence[str] = ()
    costs: np.ndarray | None = None


class Certification(NamedTuple):
    """The outcome of certifying a run."""

    which: int  # index of the certified candidate
    certificate: Certificate
    guards: list[dict[str, Any]]  # see `guards.evaluate_guards`
    teacher_score: float | None  # the teacher's own promise score, such as accuracy, on the split
    outputs: Outputs  # of the certified student and its teacher on the split


def metrics_to_claim(
    guards: Iterable[Guard], *, labeled: bool, teacher: bool, metrics: Mapping[str, Metric] = METRICS
) -> list[str]:
    """Names of the metrics that a certificate claims, each once.

    These are the task's default metrics, as far as labels and a teacher are known, and then the guarded ones.

    Args:
      guards: what must hold.
      labeled: whether there are targets.
      teacher: whether there is a teacher.
      metrics: the task's.
    """
    available = {name for name, present in (("labels", labeled), ("teacher", teacher)) if present}
    default = [name for name, row in metrics.items() if row.by_default and available.issuperset(row.needs)]
    return list(dict.fromkeys([*default, *(guard.metric for guard in guards if guard.row.source != "size")]))


def certify_run(
    directory: Path,
    candidates: Sequence[tuple[Network, Variables]],
    dataset: Dataset,
    *,
    test: Callable[[], Iterable[Batch]],
    request: CertificateRequest,
    guards: Sequence[Guard],
    teacher: bool,
    batch_size: int,
) -> Certification:
    """Opens a run's sealed split and writes the certificate of a student.

    Of several candidates it certifies the first whose guards are all certified, or else the last.

    Args:
      directory: of the run.
      candidates: final students, the preferred one first.
      dataset: that the split belongs to.
      test: returns the split in parts; nothing has been scored on it before.
      request: what to claim.
      guards: what must hold.
      teacher: whether there is a teacher.
      batch_size: examples of one forward pass.
    """
    task, labeled = request.task, bool(has_target(dataset.labels).any())
    names, among = [tree_digest(variables) for _, variables in candidates], len(candidates)
    sealed_split.open_split(
        directory,
        names[0],
        request.metrics,
        confidence=request.confidence,
        costs=sealed_split.digest_of_costs(request.costs),
        others=names[1:],
        family=[name for name, row in task.metrics.items() if row.source != "size"],
    )
    earlier = sealed_split.certificate_of_opening(directory, 0)  # of this run, if it was killed before its report
    for which, (network, variables) in enumerate(candidates):
        if earlier and earlier["student"] != names[which]:
            continue
        of_teacher = tuple(task.teacher_spec) if teacher else ()
        outputs = outputs_on(network, variables, test(), labeled=labeled, teacher=of_teacher, batch_size=batch_size)
        outputs = outputs._replace(num_groups=len(request.group_names))
        measured = measured_bounds(request.metrics, network, variables, dataset, earlier=earlier)
        tables = task.tables(
            outputs,
            class_names=request.class_names,
            group_names=request.group_names,
            confidence=request.confidence,
            among=among,
        )
        certificate = certificate_of(outputs, request, measured=measured, among=among)
        certificate = dataclasses.replace(certificate, tables=tables)
        outcomes = evaluate_guards(guards, certificate.claims, sizes=sizes_of(variables))
        if earlier or which + 1 == among or all(guard["certified"] for guard in outcomes):
            write_certificate(directory, certificate, names[which], network.spec)
            return Certification(which, certificate, outcomes, _teacher_score(outputs, task), outputs)
    raise ValueError("a sealed split is opened for at least one student; got none: pass candidates")


def outputs_on(
    network: Network,
    variables: Variables,
    split: Iterable[Batch],
    *,
    labeled: bool,
    teacher: Sequence[str],
    batch_size: int,
) -> Outputs:
    """Outputs of a student and its teacher on a split.

    Args:
      network: the student's.
      variables: the student's.
      split: in parts.
      labeled: whether targets are real, and not predictions of the teacher that stand in for them.
      teacher: names of the teacher's outputs; empty where they are unknown.
      batch_size: examples of one forward pass.
    """
    forward = jit(lambda variables, inputs: outputs_of(network.apply, variables, inputs, batch_size=batch_size))
    parts = [
        (
            forward(variables, part.inputs),
            part.targets,
            {name: part.teacher[name] for name in teacher},
            part.group,
            part.unit,
        )
        for part in split
    ]
    outputs, targets, of_teacher, group, unit = (
        jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *parts_of_field)
        for parts_of_field in zip(*parts, strict=True)
    )
    if not labeled:
        targets = jax.tree.map(_missing, targets)
    groups, units = (None if isinstance(numbers, tuple) else numbers for numbers in (group, unit))
    return Outputs(outputs, targets, of_teacher or None, groups, units=units)


def _missing(leaf: np.ndarray) -> np.ndarray:
    return np.full_like(leaf, np.nan if leaf.dtype.kind == "f" else -1)


def certificate_of(
    outputs: Outputs,
    request: CertificateRequest,
    *,
    measured: Mapping[str, Bound] | None = None,
    shares: Mapping[str, float] | None = None,
    among: int = 1,
    reopened: int = 0,
) -> Certificate:
    """The certificate of a student from its outputs on the sealed split, without tables.

    Args:
      outputs: on the sealed split.
      request: what to claim, fixed before the split was opened.
      measured: bounds of metrics that are not measured on examples.
      shares: of the error probability by metric; equal by default.
      among: number of students for which the split was opened.
      reopened: number of earlier openings.
    """
    measured = measured or {}
    on_examples = bounds_of(
        [metric for metric in request.metrics if metric not in measured],
        outputs,
        rows=request.task.metrics,
        costs=request.costs,
        class_names=request.class_names,
    )
    claims = {metric: {**on_examples, **measured}[metric] for metric in request.metrics}
    certificate = make_certificate(claims, confidence=request.confidence, shares=shares, among=among)
    return dataclasses.replace(certificate, reopened=reopened, units=_units_in(outputs))


def _units_in(outputs: Outputs) -> Units | None:
    """The groups that are the independent units of a split."""
    if outputs.units is None:
        return None
    return Units("groups", len(np.unique(outputs.units)), len(outputs.units))


def write_certificate(
    directory: Path, certificate: Certificate, student: str, spec: Mapping[str, Any], *, file: str = ""
) -> None:
    """Writes certificate.json: the claims, the digests of the student and its spec, and the population that they are about.

    Of an exported file whose latency is claimed, it also holds the digest, as `file`.

    The certificate of a split that was opened before gets a file of its own: certificate-2.json and so on.
    """
    number = f"-{certificate.reopened + 1}" if certificate.reopened else ""
    about = {"student": student, "spec": spec_digest(spec), **({"file": file} if file else {})}
    population = {"covered": certificate.covered, "not_covered": NOT_COVERED}
    content = {**certificate.as_dict(), **about, "population": population}
    write_json(directory / f"certificate{number}.json", content)


def _teacher_score(outputs: Outputs, task: Task) -> float | None:
    """The teacher's own score in the promised metric.

    None without targets or teacher, or where the teacher's outputs are of another shape than the student's.
    """
    name = task.promise.name
    if outputs.teacher is None or name not in task.metrics or not has_target(outputs.targets).any():
        return None
    teachers = [key for key, spec in task.teacher_spec.items() if spec == task.output_spec]
    if not teachers:
        return None
    bounds = bounds_of([name], outputs._replace(student=outputs.teacher[teachers[0]]), rows=task.metrics)
    return bounds[name](0.5).point


def measured_bounds(
    metrics: Sequence[str],
    network: Network,
    variables: Variables,
    dataset: Dataset,
    *,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Bound]:
    """Bounds of the metrics that are measured by timing; the timing is done here.

    Args:
      metrics: to be claimed.
      network: the student's.
      variables: the student's.
      dataset: provides an example.
      earlier: content of the certificate that this one repeats; its claims with renewed content are not computed again.
    """
    claims = Certificate.from_dict(earlier, metrics).claims if earlier else ()
    repeated = {claim.metric: claim for claim in claims if sealed_split.is_renewed(claim.metric)}
    bounds = {name: _repeated(claim) for name, claim in repeated.items()}
    for name in metrics:
        if name not in bounds and sealed_split.metric_kind(name) == sealed_split.TIMING:
            bounds[name] = median_bound(name, passes_ms(network, variables, dataset.inputs[:1][0]))
    return bounds


def _repeated(claim: Claim) -> Bound:
    return lambda confidence: claim


def sizes_of(variables: Variables) -> dict[str, int]:
    """`params`: trained parameters. `bytes`: of all arrays of a student as they are saved."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    return {"params": count_params(variables), "bytes": size}
