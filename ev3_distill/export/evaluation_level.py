"""The confidence level at which an evaluation may claim metrics, and the record of sealed splits that are opened again.

On a sealed split, claims that stand in a certificate of the run are repeated from it and not computed again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.certify.certificate import Certificate, equal_shares
from ev3_distill.errors import InputError
from ev3_distill.training import run_dir, sealed_split

DEFAULT_CONFIDENCE = 0.95


class Query(NamedTuple):
    """What an evaluation asks for.

    Attributes:
      metrics: names of the metrics to claim.
      class_names: of the K classes.
      costs: [K, K], for a claim on cost; None without such a claim.
      confidence: given by the user; None: the default or, on a sealed split, the run's.
      reopen: whether further claims may open the sealed split again.
    """

    metrics: Sequence[str]
    class_names: Sequence[str]
    costs: np.ndarray | None
    confidence: float | None
    reopen: bool


class Subject(NamedTuple):
    """What is evaluated on a sealed split.

    Attributes:
      student: digest of the student's variables.
      file: SHA-256 of the exported file that is run; empty for the student in its run. Latency is the file's own.
      same: whether the file computes what the student does. A file that was trained for int8 may round sums differently.
    """

    student: str
    file: str = ""
    same: bool = True


class Level(NamedTuple):
    """How the error probability is divided, or the claims that were made before."""

    confidence: float
    shares: dict[str, float]  # of the error probability, by metric
    reopened: int  # number of earlier openings
    among: int  # number of students for which the split was opened
    repeated: Certificate | None = None  # if not None, nothing is scored


def level_on_new_data(query: Query) -> Level:
    """The level on data that are new to the student."""
    confidence = DEFAULT_CONFIDENCE if query.confidence is None else query.confidence
    return Level(confidence, equal_shares(query.metrics), 0, 1)


def level_on_sealed_split(
    directory: Path, subject: Subject, query: Query, *, confidence: float, claimed: Sequence[str]
) -> Level:
    """The level on a run's own sealed split, or the claims of a certificate that answers the query.

    Claims that no certificate has open the split again, which is recorded before this returns. So does computing a function of
    the user's or measuring a latency again: what the name refers to may have changed since.

    Args:
      directory: of the run.
      subject: what is evaluated.
      query: what to claim.
      confidence: of the run's certificate.
      claimed: metrics of the run's certificate.

    Raises:
      InputError: another confidence than the certificate's, or further claims without `reopen`.
    """
    digest = sealed_split.digest_of_costs(query.costs)
    if not sealed_split.read_openings(directory):  # a run that is older than this record
        family = sealed_split.ORIGINAL_FAMILY
        sealed_split.open_split(directory, subject.student, claimed, confidence=confidence, family=family)
    if query.confidence not in (None, confidence):
        raise InputError(
            f"a sealed split keeps the confidence that it was opened at; that of {directory} is {confidence:.10g}, got "
            f"{query.confidence:.10g}: leave out --confidence, or score other data with --data"
        )
    renewed = [name for name in query.metrics if sealed_split.is_renewed(name)]
    repeated = _repeated(directory, subject, query) if subject.same and not (query.reopen and renewed) else None
    if repeated is not None:
        return Level(confidence, {}, repeated.reopened, repeated.among, repeated)
    first, *_ = sealed_split.read_openings(directory)
    among = len(sealed_split.candidates_of(first))
    is_candidate = subject.student in sealed_split.candidates_of(first)
    if is_candidate and not renewed and set(query.metrics) <= set(first["claims"]) and _same_costs(first, query):
        return Level(confidence, equal_shares(first["claims"]), 0, among)
    if not subject.same:
        raise InputError(
            f"an int8 file may round sums differently from its student, so the sealed split certifies it for "
            f"{', '.join(name for name in first['claims'] if not sealed_split.is_renewed(name))} only; got "
            f"{', '.join(query.metrics)}: score new data with --data"
        )
    if is_candidate:
        reason = _reason(first, query, renewed)
        sealed_split.check_reopening(
            directory, first, query.metrics, confidence=confidence, reopen=query.reopen, reason=reason
        )
    with run_dir.lock_run(directory):
        reopened = sealed_split.open_split(
            directory, subject.student, query.metrics, confidence=confidence, costs=digest, reopen=query.reopen
        )
    shares = sealed_split.shares_when_reopened(
        query.metrics, reopened, family=sealed_split.family_of(first), num_classes=len(query.class_names)
    )
    return Level(confidence, shares, reopened, among)


def _repeated(directory: Path, subject: Subject, query: Query) -> Certificate | None:
    """The claims of the first certificate that has them all and is about the same contents; None if there is none."""
    timed = any(sealed_split.metric_kind(name) == sealed_split.TIMING for name in query.metrics)
    for number, opening in enumerate(sealed_split.read_openings(directory)):
        content = sealed_split.certificate_of_opening(directory, number)
        if (
            content is not None
            and content.get("student", subject.student) == subject.student
            and set(query.metrics) <= {claim["metric"] for claim in content["claims"]}
            and _same_costs(opening, query)
            and not sealed_split.changed_functions(opening, query.metrics)
            and (not timed or content.get("file", "") == subject.file)
        ):
            return Certificate.from_dict(content, query.metrics)
    return None


def _same_costs(opening: dict[str, Any], query: Query) -> bool:
    return "cost" not in query.metrics or opening["costs"] == sealed_split.digest_of_costs(query.costs)


def _reason(first: dict[str, Any], query: Query, renewed: Sequence[str]) -> str:
    """Why claims with names that were claimed before cannot be repeated, for an error."""
    if not set(query.metrics) <= set(first["claims"]):
        return ""
    if changed := sealed_split.changed_functions(first, query.metrics):
        return f", and the source of {', '.join(changed)} has changed since"
    if "cost" in query.metrics and not _same_costs(first, query):
        return ", and the costs are others now"
    return f", and {', '.join(renewed)} of this file was not among them" if renewed else ""
