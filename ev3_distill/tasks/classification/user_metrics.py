"""What users bring to metrics: functions of their own, and tables of costs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.user_code import load_callable
from ev3_distill.tasks.classification.example_metrics import predicted_class

__all__ = ["UserMetric", "function_named", "read_costs", "user_scores"]

UserMetric = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (logits [N, K], labels [N]) -> scores [N] in [0, 1]


def function_named(name: str) -> UserMetric:
    """Imports the callable that MODULE:FUNCTION names; the module may be in the working directory.

    Raises:
      InputError: it cannot be imported, or is not callable.
    """
    return load_callable(name, rule="a metric of your own is an importable MODULE:FUNCTION")


def user_scores(name: str, function: UserMetric, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scores [N] of a user's function, 0 where the logits predict no class.

    Args:
      name: of the metric, for errors.
      function: the user's.
      logits: [N, K].
      labels: [N].

    Raises:
      InputError: the function fails, or does not return one score in [0, 1] for each example by itself.
    """
    n, half = len(labels), (len(labels) + 1) // 2
    scores = _checked_scores(name, function, logits, labels)
    if not np.allclose(scores[:half], _checked_scores(name, function, logits[:half], labels[:half]), atol=1e-6):
        raise InputError(
            f"a metric must score each example independently of the others; {name} scores the first {half} of {n} "
            "examples differently without the rest: use nothing but the example's own row"
        )
    return scores


def _checked_scores(name: str, function: UserMetric, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    try:
        scores: Any = np.asarray(function(logits.copy(), labels.copy()), np.float64)
    except Exception as error:  # of the user's own code
        raise InputError(
            f"a metric maps logits [N, K] and labels [N] to scores [N]; {name} fails with {summary(error)}: fix it"
        ) from error
    if scores.shape != (len(labels),):
        raise InputError(
            f"a metric must return scores [N], here {[len(labels)]}; {name} returns {list(scores.shape)}: fix it"
        )
    valid: np.ndarray = np.where(predicted_class(logits) >= 0, scores, 0.0)
    outside = valid[~((valid >= 0) & (valid <= 1))]
    if len(outside):
        raise InputError(f"the scores of a metric must lie in [0, 1]; {name} returns {outside[0]:g}: rescale them")
    return valid


def read_costs(path: str | Path, classes: int) -> np.ndarray:
    """Reads costs [K, K] from a CSV file without a header: rows are true classes, columns are predictions.

    Raises:
      InputError: the file cannot be read, or does not hold K x K finite numbers.
    """
    try:
        costs = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(
            f"costs are a CSV file of numbers; {path} cannot be read ({summary(error)}): fix it or name another"
        ) from None
    if costs.shape != (classes, classes) or not np.isfinite(costs).all():
        raise InputError(
            "costs must be finite, with a row for each true class and a column for each predicted class, "
            f"{classes} x {classes}; {path} has {' x '.join(map(str, costs.shape))}"
            f"{'' if np.isfinite(costs).all() else ', not finite'}: fix it"
        )
    return costs
