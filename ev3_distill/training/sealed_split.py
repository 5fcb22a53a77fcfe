"""Record of the sealed split's openings, written before anything is scored on it.

opened.json of a run: {"openings": [{"student", "time", "confidence", "claims", "costs", "family"}]}, the run's own opening
first. `others` lists further students of the same opening, any of which may be delivered. `family` names all metrics that a
claim could have been about at the first opening; the level of a reopened certificate depends on their number. `functions` has
the digest of the source of each function of the user's among the claims.

The certificate of the first opening is certificate.json, that of the k-th certificate-k.json. A claim that stands in one of
them is repeated from it. A run that is killed while it scores its students continues the same opening when it is resumed. Any
other use is a further opening and requires `reopen=True`.

A claim is identified by its content. The content of most metrics is fixed by their names, that of a cost by the digest of its
table. A function of the user's and a measured time have new content whenever they are computed: what a name refers to may have
changed, and a time differs from pass to pass. These are called renewed here. Computing one again is always a further opening.
"""

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.runtime.files import sync_directory
from ev3_distill.runtime.user_code import source_digest
from ev3_distill.tasks.metrics import METRICS, MetricQuery, find_metric
from ev3_distill.training.run_dir import read_json, write_json

NAME = "opened.json"
FUNCTION, TIMING = "MODULE:FUNCTION", "timing"  # a row of METRICS, and the source of one
ORIGINAL_FAMILY = (  # of runs whose record has no `family`, because they are older than that entry
    *("accuracy", "balanced_accuracy", "worst_class_accuracy", "worst_group_accuracy", "macro_f1", "agreement"),
    *(
        "drop(accuracy)",
        "ece",
        "brier",
        "cost",
        "latency_ms",
        "topK_accuracy",
        "drop(topK_accuracy)",
        "MODULE:FUNCTION",
    ),
)


def read_openings(directory: Path) -> list[dict[str, Any]]:
    """All openings of a run's sealed split so far.

    Raises:
      InputError: the record is damaged.
    """
    if not (directory / NAME).exists():
        return []
    openings: list[dict[str, Any]] = read_json(directory / NAME)["openings"]
    return openings


def candidates_of(opening: dict[str, Any]) -> list[str]:
    """Digests of the students that a split was opened for."""
    return [opening["student"], *opening.get("others", [])]


def family_of(opening: dict[str, Any]) -> tuple[str, ...]:
    """Names of the metrics that claims could have been about when the split was opened."""
    return tuple(opening.get("family", ORIGINAL_FAMILY))


def certificate_of_opening(directory: Path, number: int) -> dict[str, Any] | None:
    """The content of the certificate of an opening, counted from 0; None if it was not finished."""
    path = directory / (f"certificate-{number + 1}.json" if number else "certificate.json")
    return read_json(path) if path.exists() else None


def is_renewed(metric: str) -> bool:
    """Whether the metric has new content whenever it is computed."""
    return metric_kind(metric) in (TIMING, FUNCTION)


def metric_kind(metric: str) -> str:
    """TIMING, FUNCTION or an empty string."""
    query = find_metric(metric)
    if query is None:
        return ""
    return FUNCTION if query.row.name == FUNCTION else TIMING if query.row.source == TIMING else ""


def digests_of_functions(metrics: Iterable[str]) -> dict[str, str | None]:
    """Digest of the source of each metric that is a function of the user's; None where it has no source."""
    return {name: source_digest(name) for name in metrics if metric_kind(name) == FUNCTION}


def changed_functions(opening: dict[str, Any], metrics: Iterable[str]) -> list[str]:
    """The functions of the user's whose source is known to have changed since an opening."""
    recorded = opening.get("functions", {})
    return [name for name, digest in digests_of_functions(metrics).items() if recorded.get(name, digest) != digest]


def digest_of_costs(costs: np.ndarray | None) -> str | None:
    """SHA-256 of a table of costs; None where there is none."""
    return None if costs is None else hashlib.sha256(np.ascontiguousarray(costs, np.float64).tobytes()).hexdigest()


def claimable_metrics() -> tuple[str, ...]:
    """Names of all metrics that a certificate can claim today, a family of metrics counted once."""
    return tuple(name for name, row in METRICS.items() if row.source != "size")


def open_split(
    directory: Path,
    student: str,
    claims: Sequence[str],
    *,
    confidence: float,
    costs: str | None = None,
    reopen: bool = False,
    others: Sequence[str] = (),
    family: Sequence[str] | None = None,
) -> int:
    """Opens the sealed split of a run for one or a few students and a fixed list of claims.

    The opening is on disk when this returns. One that is recorded already continues, and does not count again; but with
    `reopen`, renewed claims always make a further one.

    Args:
      directory: of the run.
      student: its digest.
      claims: metrics that will be claimed.
      confidence: of the certificate.
      costs: digest of the table of costs, for a claim on cost.
      reopen: open a split again that was opened for other claims.
      others: digests of the students that may be delivered in place of `student`.
      family: metrics that a claim can be about, for a first opening; all of them by default.

    Returns:
      The number of openings before this one.

    Raises:
      InputError: the split was opened for another student; or for other claims or for another source of a function, and
        `reopen` is False or a claim is not in the family of the first opening.
    """
    openings = read_openings(directory)
    request = {"confidence": confidence, "claims": list(claims), "costs": costs}
    same_students = bool(openings) and {student, *others} <= set(candidates_of(openings[0]))
    if same_students and not (reopen and any(map(is_renewed, claims))):
        for i, opening in enumerate(openings):
            if {name: opening[name] for name in request} == request:
                _check_same_functions(directory, opening, claims)
                return i
    if openings and not same_students:
        raise InputError(
            f"a sealed split certifies only the students that it was opened for; that of {directory} was opened for "
            f"{' and '.join(name[:12] for name in candidates_of(openings[0]))}, got {student[:12]}: start a new run with "
            "--out, or score other data with --data"
        )
    if openings:
        check_reopening(directory, openings[0], claims, confidence=confidence, reopen=reopen)
        family = family_of(openings[0])
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    names = list(claimable_metrics() if family is None else family)
    functions = digests_of_functions(claims)
    row = {"student": student, **request, **({"others": list(others)} if others else {}), "family": names}
    row |= {"functions": functions} if functions else {}
    write_json(directory / NAME, {"openings": [*openings, {**row, "time": moment}]})
    sync_directory(directory)
    return len(openings)


def _check_same_functions(directory: Path, opening: dict[str, Any], claims: Sequence[str]) -> None:
    if changed := changed_functions(opening, claims):
        raise InputError(
            f"a sealed split is opened once, for metrics as they are then; {', '.join(changed)} changed after that of "
            f"{directory} was opened on {opening['time']}: restore the source, or start a new run with --out"
        )


def check_reopening(
    directory: Path,
    first: dict[str, Any],
    claims: Sequence[str],
    *,
    confidence: float,
    reopen: bool,
    reason: str = "",
) -> None:
    """Checks that a split may be opened again for some claims.

    Args:
      directory: of the run.
      first: the run's own opening.
      claims: to be made.
      confidence: of the certificate.
      reopen: whether the user allows it.
      reason: why the claims cannot be repeated, for the error.

    Raises:
      InputError: `reopen` is False, or a claim is not in the family of the first opening.
    """
    if not reopen:
        raise InputError(
            f"a sealed split is opened once; that of {directory} was opened on {first['time']} for "
            f"{', '.join(first['claims'])} at {first['confidence']:.10g}, got {', '.join(claims)} at "
            f"{confidence:.10g}{reason}: score other data with --data, or give --reopen, which widens the bounds to correct "
            "for it"
        )
    unknown = [name for name in claims if _query(name).row.name not in family_of(first)]
    if unknown:
        raise InputError(
            "a reopened split can claim only metrics that existed when it was first opened, because these share its error "
            f"probability; that of {directory} was opened without {', '.join(unknown)}: score other data with --data"
        )


def shares_when_reopened(
    metrics: Sequence[str], reopened: int, *, family: Sequence[str], num_classes: int
) -> dict[str, float]:
    """Shares of the error probability for claims that may have been selected after the split was opened.

    Someone who has read the first certificate may choose the next claims because of it. A correction for the claims that were
    made is therefore not enough: the family is everything that could ever be claimed. Each of its metrics gets an equal
    share, whether it is claimed or not. Of that, top-K accuracies get 1 / (K (K - 1)) for K = 2, 3, ..., each class gets
    1 / num_classes, and a metric that each opening may fill with something new (a function, costs, a measured time) gets
    1 / (j (j + 1)) in the j-th reopening, divided equally among functions. All these shares sum to at most 1, so the
    certificates of all reopenings hold jointly with the confidence, however the claims were selected: a claim on a metric with
    fixed content is the same event in each of them, and one on renewed content is in one opening alone. For functions and costs
    this requires that they were written without knowledge of the split.

    Args:
      metrics: to be claimed.
      reopened: j, the number of openings before this one, at least 1.
      family: names of the metrics that could be claimed at the first opening, see `family_of`.
      num_classes: that the student tells apart.
    """
    queries = {name: _query(name) for name in metrics}

    def share(query: MetricQuery) -> float:
        part = 1 / len(family)
        if query.row.family == "k":
            k = int(query.argument)
            part /= k * (k - 1)
        elif query.row.family == "class":
            part /= num_classes
        if query.row.renewable:
            part /= reopened * (reopened + 1) * sum(other.row is query.row for other in queries.values())
        return part

    return {name: share(query) for name, query in queries.items()}


def _query(name: str) -> MetricQuery:
    query = find_metric(name)
    if query is None:
        raise ValueError(f"a claim needs a known metric; got '{name}': see tasks/metrics.py")
    return query
