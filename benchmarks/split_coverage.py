"""Whether bounds hold however splits are dealt: for a student of the prior, and for near-copies of a few patients.

*A student of the prior.* Labels of 2,000 examples are uniform noise among K classes, and the student predicts the most common
class of explore, so that its true accuracy is 1 / K. Each run deals REPETITIONS such data sets as `compress` does, and as
versions before it did, which stratified all four splits jointly.

*Near-copies.* 200 patients have 10 images each and a label that is a coin. The student knows the patients of explore by heart
and guesses the others: on a new patient it is right half of the time. Splits are dealt by examples or by patients.
"""

from typing import Any

import numpy as np

from ev3_distill.certify import clopper_pearson_lower
from ev3_distill.certify.bounds import mcnemar_p_value
from ev3_distill.config import Fractions
from ev3_distill.data.group_splits import split_groups
from ev3_distill.data.splits import split_rows, split_rows_jointly
from ev3_distill.tasks.outputs import Outputs, bounds_of

SHARES = (
    (10, 0.2),
    (10, 0.4),
    (10, 0.5),
    (10, 0.7),
    (100, 0.2),
    (100, 0.4),
    (100, 0.7),
)  # classes, share of the test split
EXAMPLES, REPETITIONS = 2000, 20
PATIENTS, IMAGES = 200, 10
BY_EXAMPLES, BY_GROUPS = "near-copies, split by examples", "near-copies, split by groups"


def prior_splits(
    rng: np.random.Generator, *, confidence: float, repetitions: int = REPETITIONS
) -> list[dict[str, Any]]:
    """How often a student of the prior was promised, or promoted for, too much: a row for each setting.

    `wrong` counts bounds above the true accuracy, `promoted` the tests on decide which prove at level 1 - confidence that the
    most common class of explore is a better prediction than the rarest; `jointly_wrong` and `jointly_promoted` with the old
    splits.
    """
    rows = []
    for classes, share in SHARES:
        counts = np.zeros(4, int)
        for _ in range(repetitions):
            labels, seed = rng.integers(0, classes, EXAMPLES), int(rng.integers(2**31))
            for i, deal in enumerate((split_rows, split_rows_jointly)):
                rows_of = deal(labels, None, seed=seed, fractions=_fractions(share))
                counts[2 * i : 2 * i + 2] += _faults(rows_of, labels, classes, confidence)
        names = ("wrong", "promoted", "jointly_wrong", "jointly_promoted")
        of = {"classes": classes, "share": share, "runs": repetitions}
        rows.append({**of, **dict(zip(names, counts.tolist(), strict=True))})
    return rows


def _fractions(share: float) -> Fractions:
    rest = 1 - share
    return Fractions(0.4 * rest, 0.2 * rest, 0.4 * rest, share, most=EXAMPLES)


def _faults(rows: dict[str, np.ndarray], labels: np.ndarray, classes: int, confidence: float) -> tuple[bool, bool]:
    """Whether these splits prove too much of a student of the prior: on test, and on decide."""
    seen = np.bincount(labels[rows["explore"]], minlength=classes)
    hits = labels[rows["test"]] == seen.argmax()
    wins, losses = ((labels[rows["decide"]] == c).sum() for c in (seen.argmax(), seen.argmin()))
    bound = clopper_pearson_lower(int(hits.sum()), len(hits), confidence=confidence)
    return bound > 1 / classes, mcnemar_p_value(int(wins), int(losses)) <= 1 - confidence


def near_copies(rng: np.random.Generator, *, confidence: float) -> list[dict[str, Any]]:
    """The accuracy promised where each patient has several images, dealt by images and by patients; the truth is 1/2."""
    patient = np.repeat(np.arange(PATIENTS), IMAGES)
    labels = rng.integers(0, 2, PATIENTS)[patient].astype(np.int32)
    guesses, seed = rng.integers(0, 2, PATIENTS)[patient], int(rng.integers(2**31))
    claims = []
    for name, rows in (
        (BY_EXAMPLES, split_rows(labels, None, seed=seed)),
        (BY_GROUPS, split_groups(patient, labels, None, seed=seed)),
    ):
        known = np.isin(patient, patient[rows["explore"]])
        logits, test = np.eye(2, dtype=np.float32)[np.where(known, labels, guesses)], rows["test"]
        units = patient[test] if name == BY_GROUPS else None
        claim = bounds_of(["accuracy"], Outputs(logits[test], labels[test], units=units))["accuracy"](confidence)
        claims.append({"metric": name, "lower_bound": claim.lower_bound, "truth": 0.5})
    return claims
