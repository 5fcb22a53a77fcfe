"""The confidence level at which an evaluation may claim metrics, and the record of sealed splits that are opened again."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ev3_distill.certify.certificate import equal_shares
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


class Level(NamedTuple):
    """How the error probability is divided."""

    confidence: float
    shares: dict[str, float]  # of the error probability, by metric
    reopened: int  # number of earlier openings
    among: int  # number of students for which the split was opened


def level_on_new_data(query: Query) -> Level:
    """The level on data that are new to the student."""
    confidence = DEFAULT_CONFIDENCE if query.confidence is None else query.confidence
    return Level(confidence, equal_shares(query.metrics), 0, 1)


def level_on_sealed_split(
    directory: Path, student: str, query: Query, *, confidence: float, claimed: Sequence[str]
) -> Level:
    """The level on a run's own sealed split. Claims that its certificate lacks open it again, which is recorded.

    Args:
      directory: of the run.
      student: digest of the student.
      query: what to claim.
      confidence: of the run's certificate.
      claimed: metrics of the run's certificate.

    Raises:
      InputError: another confidence than the certificate's, or further claims without `reopen`.
    """
    digest = sealed_split.digest_of_costs(query.costs)
    if not sealed_split.read_openings(directory):  # a run that is older than this record
        family = sealed_split.ORIGINAL_FAMILY
        sealed_split.open_split(directory, student, claimed, confidence=confidence, family=family)
    first, *_ = sealed_split.read_openings(directory)
    among = len(sealed_split.candidates_of(first))
    same = (
        student in sealed_split.candidates_of(first)
        and query.confidence in (None, confidence)
        and ("cost" not in query.metrics or first["costs"] == digest)
    )
    if same and set(query.metrics) <= set(first["claims"]):
        return Level(confidence, equal_shares(first["claims"]), 0, among)
    if query.confidence not in (None, confidence):
        raise InputError(
            f"a sealed split keeps the confidence that it was opened at; that of {directory} is {confidence:.10g}, got "
            f"{query.confidence:.10g}: leave out --confidence, or score other data with --data"
        )
    with run_dir.lock_run(directory):
        reopened = sealed_split.open_split(
            directory, student, query.metrics, confidence=confidence, costs=digest, reopen=query.reopen
        )
    shares = sealed_split.shares_when_reopened(
        query.metrics, reopened, family=sealed_split.family_of(first), num_classes=len(query.class_names)
    )
    return Level(confidence, shares, reopened, among)
