"""Evaluation: a student that is there already, scored anew."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import students
from ev3_distill import certificate, claims, opening, run
from ev3_distill.certifying import known_of, measured, metrics_asked
from ev3_distill.course import CHUNK, evaluated_at_once, limit_of
from ev3_distill.demands import check_labelled, guards_of
from ev3_distill.errors import InputError, warn
from ev3_distill.finished import config_of, data_of, report_in
from ev3_distill.guards import judge
from ev3_distill.lessons import chunked
from ev3_distill.sources import Dataset
from ev3_distill.splits import split_rows
from ev3_distill.types import Variables
from teachers.flax import forward


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
    finished = report_in(directory)
    if finished is None:
        raise InputError(f"evaluate needs a finished run; {directory} has no report.json: finish it by --resume")
    network, variables = students.load(directory, factory=students.factory_of(student))
    chosen = config_of(directory, finished)
    dataset, classes = data_of(chosen, source), finished["data"]["classes"]
    _check_fits(dataset, finished["data"])
    rows = np.arange(len(dataset.labels))
    if not source:
        run.given_to(directory, dataset.fingerprint)
        rows = split_rows(dataset.labels, dataset.test_rows, seed=chosen.seed, fractions=chosen.splits)["test"]
    elif dataset.fingerprint == finished["data"]["fingerprint"]:
        warn(
            f"{source} are the data of the run, and trained the student: on the whole of them its accuracy proves nothing"
        )
    table = claims.read_costs(costs, len(classes)) if costs else None
    asked = guards_of(guards, dataset, network, costs=table, teacher=False)
    metrics = metrics_asked(asked, labelled=True, teacher=False)
    level = _level(
        *(directory, finished, variables, metrics),
        confidence=confidence,
        costs=table,
        sealed=not source,
        reopen=reopen,
    )
    logits = forward(network, variables)
    at_once = evaluated_at_once(dataset, limit_of(chosen.memory), CHUNK)
    parts = [logits(dataset.inputs[part]) for part in chunked(rows, at_once)]
    groups = None if dataset.groups is None else dataset.groups[rows]
    outputs = certificate.Outputs(
        np.concatenate(parts), dataset.labels[rows], groups=groups, num_groups=len(dataset.group_names)
    )
    found = measured(metrics, network, variables, dataset)
    found |= certificate.claims_of([metric for metric in metrics if metric not in found], outputs, costs=table)
    made = certificate.certify(
        {metric: found[metric] for metric in metrics}, confidence=level.confidence, shares=level.shares
    )
    made = dataclasses.replace(made, reopened=level.reopened)
    if level.reopened:
        run.write_certificate(directory, made, opening.digest_of(variables))
    return made, judge(asked, made.claims, known=known_of(variables))


class _Level(NamedTuple):
    confidence: float
    shares: dict[str, float]  # of the error probability, by claim
    reopened: int


def _level(
    directory: Path,
    finished: dict[str, Any],
    variables: Variables,
    metrics: Sequence[str],
    *,
    confidence: float | None,
    costs: np.ndarray | None,
    sealed: bool,
    reopen: bool,
) -> _Level:
    """At which level `evaluate` may claim these metrics; opens the sealed split again where that is due."""
    if confidence is not None and not 0 < confidence < 1:
        raise InputError(f"confidence is a probability above 0 and below 1; got {confidence}: try 0.95")
    if not sealed:
        return _Level(0.95 if confidence is None else confidence, certificate.shares_of(metrics), 0)
    own = finished["certificate"]["confidence"]
    student, digest = opening.digest_of(variables), claims.digest_of_costs(costs)
    if not opening.openings(directory):  # a run from before they were kept
        claimed = [claim["metric"] for claim in finished["certificate"]["claims"]]
        opening.open_split(directory, student, claimed, confidence=own)
    first, *_ = opening.openings(directory)
    same = (
        first["student"] == student
        and confidence in (None, own)
        and ("cost" not in metrics or first["costs"] == digest)
    )
    if same and set(metrics) <= set(first["claims"]):
        return _Level(own, certificate.shares_of(first["claims"]), 0)
    if confidence not in (None, own):
        raise InputError(
            f"a sealed split keeps the confidence that it was opened at; that of {directory} is {own:.10g}, got "
            f"{confidence:.10g}: leave out --confidence, or score other data by --data"
        )
    with run.held(directory):
        reopened = opening.open_split(directory, student, metrics, confidence=own, costs=digest, reopen=reopen)
    return _Level(own, certificate.shares_when_reopened(metrics, reopened), reopened)


def _check_fits(dataset: Dataset, expected: dict[str, Any]) -> None:
    """Whether a student of these data can be scored on that data set."""
    check_labelled(dataset, "evaluate")
    if list(dataset.inputs.shape[1:]) != expected["input_shape"] or dataset.num_classes > len(expected["classes"]):
        raise InputError(
            f"the student takes inputs of shape {expected['input_shape']} and knows {len(expected['classes'])} classes; "
            f"{dataset.source} has {list(dataset.inputs.shape[1:])} and {dataset.num_classes}: name data like its own"
        )
