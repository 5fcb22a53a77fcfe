"""Overlap: examples of new data that a student has seen. They prove nothing about it, and are left out.

An example of explore, assess or decide made the student. One of the sealed split has been opened: its score is a part of the
run's certificate, and a further claim on it would be a second use of that split.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill import config
from ev3_distill.certify.certificate import Certificate
from ev3_distill.data.class_names import listed
from ev3_distill.data.row_digests import are_among, distinct, row_digests, text_digests
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError, warn
from ev3_distill.training.seen_rows import NAME, SeenRows, read_seen_rows, seen_rows_of_data


class NewRows(NamedTuple):
    """The rows to score."""

    rows: np.ndarray  # sorted
    overlap: int  # number of these that the student has seen; above 0 nothing can be certified


def find_seen_rows(
    run: Path | None, run_config: config.RunConfig, file: Path | None, fingerprint: str
) -> SeenRows | None:
    """Digests of what a student has seen, of its run or beside its exported file; None if they cannot be known.

    Args:
      run: its directory.
      run_config: its configuration.
      file: the exported file.
      fingerprint: of the run's data.
    """
    for directory in (run, None if file is None else file.parent):
        if directory is not None and (seen := read_seen_rows(directory, fingerprint)) is not None:
            return seen
    return None if run is None else seen_rows_of_data(run_config, fingerprint)


def find_new_rows(dataset: Dataset, seen: SeenRows | None, *, keep: bool) -> NewRows:
    """Finds the examples that are new to a student; tells how many are not, and how many occur twice.

    Args:
      dataset: to score.
      seen: by the student; None if unknown.
      keep: score the others as well.

    Raises:
      InputError: no example is new, and `keep` is False.
    """
    source, n = dataset.source, len(dataset.labels)
    digests = row_digests(dataset.inputs)
    if seen is None:
        warn(
            f"whether the student has seen examples of {source} cannot be checked: there is no {NAME}, and the run's data are "
            "missing or have changed. If it has, the bounds promise too much"
        )
        seen = SeenRows(digests[:0], digests[:0], digests[:0])
    used = are_among(digests, distinct(seen.used))
    sealed = are_among(digests, distinct(seen.sealed)) & ~used
    known = used | sealed
    new, overlap = np.flatnonzero(~known), int(known.sum())
    if overlap:
        text = f"{overlap:,} of {n:,} examples of {source} are known to the student: {_where(used, sealed)}"
        if keep:
            warn(f"{text}; they are scored as well, so nothing is certified")
        elif not len(new):
            raise InputError(
                f"evaluate needs examples that are new to the student; {text}: name new data, leave out --data to score the "
                "sealed split, or give --keep-overlap, which certifies nothing"
            )
        else:
            warn(f"{text}; they are left out")
    rows = np.arange(n) if keep else new
    _warn_of_groups(dataset, rows, seen)
    if copies := len(rows) - len(distinct(digests[rows])):
        warn(
            f"{copies:,} of the {len(rows):,} examples to score have the same inputs as another one; bounds take each for an "
            "independent one, and promise too much if they are copies"
        )
    return NewRows(rows, overlap if keep else 0)


def _warn_of_groups(dataset: Dataset, rows: np.ndarray, seen: SeenRows) -> None:
    """Warns of examples in groups with the names of the run's. Other groups may have these names, so they are not left out."""
    if dataset.groups is None or not len(seen.groups):
        return
    known = are_among(text_digests(dataset.group_names), distinct(seen.groups))
    if count := int(known[dataset.groups[rows]].sum()):
        names = [name for name, is_known in zip(dataset.group_names, known, strict=True) if is_known]
        warn(
            f"{count:,} of the {len(rows):,} examples to score are of groups that the run has as well ({listed(names)}): "
            "if they are the same groups, leave them out, because their examples resemble those that the student has seen"
        )


def _where(used: np.ndarray, sealed: np.ndarray) -> str:
    parts = []
    if used.any():
        parts.append(f"{int(used.sum()):,} occur in explore, assess or decide, which made it")
    if sealed.any():
        parts.append(f"{int(sealed.sum()):,} in its sealed split, which has been opened")
    return ", and ".join(parts)


def proof_without_overlap(
    certificate: Certificate, guards: list[dict[str, Any]], overlap: int
) -> tuple[Certificate, list[dict[str, Any]]]:
    """What is left of a certificate and of guards where examples that a student has seen were scored: measured values.

    Args:
      certificate: from these examples.
      guards: their outcomes, see `guards.evaluate_guards`.
      overlap: number of examples that the student has seen.
    """
    if not overlap:
        return certificate, guards
    claims = tuple(dataclasses.replace(claim, lower_bound=None, upper_bound=None) for claim in certificate.claims)
    measured = dataclasses.replace(certificate, claims=claims, tables=(), overlap=overlap)
    return measured, [{**guard, "bound": None, "certified": False} for guard in guards]
