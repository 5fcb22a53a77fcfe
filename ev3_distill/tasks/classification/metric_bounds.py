"""Claims: what a student's answers on a sealed split let one say of each metric in the population, at a given level.

A metric's point is its value on the split, its bound what `bounds` proves. A model whose logits have a nan, a +inf or
nothing finite at all says no class: it is wrong, agrees with nobody, is fully sure of it, and gets the worst score or cost.
Metrics that ask for labels are about labelled examples alone.

References:
  R. L. Berger: Multiparameter hypothesis testing and acceptance sampling. Technometrics 24 (4), 1982.
  G. W. Brier: Verification of forecasts expressed in terms of probability. Monthly Weather Review 78 (1), 1950.
"""

import dataclasses
import functools
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.certify import bounds
from ev3_distill.errors import InputError
from ev3_distill.guards import DROP, FUNCTION, TOP_K


@dataclasses.dataclass(frozen=True)
class Claim:
    """One promise: in the population, the metric is at least `lower_bound`, or at most `upper_bound`."""

    metric: str
    point: float  # on the split
    lower_bound: float | None  # at the claim's own level, see certificate.make_certificate
    n: int  # examples
    upper_bound: float | None = None  # of a metric that is better when lower, in the place of the other


Bound = Callable[[float], Claim]  # confidence of this claim alone -> the claim
Score = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # (logits [N, K], labels [N]) -> [N] in [0, 1], example by example


class Outputs(NamedTuple):
    """What a student, and its teacher where there is one, say of a split of N examples."""

    logits: np.ndarray  # [N, K], the student's
    labels: np.ndarray  # [N] from 0 to K - 1, -1 where there is none
    teacher_logits: np.ndarray | None = None  # [N, K]
    groups: np.ndarray | None = None  # [N] from 0 to G - 1, -1 where there is none
    num_groups: int = 0  # G, where groups are given

    @property
    def classes(self) -> int:
        """K."""
        return self.logits.shape[1]

    def labelled(self) -> "Outputs":
        """The examples that have a label.

        Raises:
          InputError: none has.
        """
        rows = np.flatnonzero(self.labels >= 0)
        if not len(rows):
            raise InputError("a metric of labels needs an example with one; got none: claim agreement")

        def some(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else np.asarray(array)[rows]

        return Outputs(
            np.asarray(self.logits)[rows],
            np.asarray(self.labels)[rows],
            some(self.teacher_logits),
            some(self.groups),
            self.num_groups,
        )


def claims_of(metrics: Iterable[str], outputs: Outputs, *, costs: np.ndarray | None = None) -> dict[str, Bound]:
    """The claims of these names, each as a function of its own confidence.

    Args:
      metrics: names of `guards.METRICS` that are about examples, or of its forms; each once or more often.
      outputs: of the sealed split.
      costs: [K, K] of saying a class (columns) of an example of a class (rows), for `cost`.

    Raises:
      InputError: a function of the user's own cannot be used; when called, that the split has no example to ask.
      ValueError: no such metric, or outputs lack what it needs.
    """
    return {metric: _claim(metric, outputs, costs) for metric in dict.fromkeys(metrics)}


def _claim(metric: str, outputs: Outputs, costs: np.ndarray | None) -> Bound:
    if top := TOP_K.fullmatch(metric):
        return functools.partial(_top_k, metric, outputs, int(top[1]))
    if dropped := DROP.fullmatch(metric):
        top = TOP_K.fullmatch(dropped[1])
        return functools.partial(_drop, metric, outputs, int(top[1]) if top else 1)
    if FUNCTION.fullmatch(metric):
        return functools.partial(_function, metric, outputs, function_named(metric))
    if metric == "cost":
        return functools.partial(_cost, metric, outputs, costs)
    if metric not in CLAIMS:
        raise ValueError(f"claims are about {', '.join(CLAIMS)}, cost and others; got '{metric}': name one of these")
    return functools.partial(CLAIMS[metric], metric, outputs)


def said(logits: np.ndarray) -> np.ndarray:
    """The class of the greatest logit, the first of a tie, by example [N]; -1 where the logits say none."""
    logits = np.asarray(logits)
    return np.where(np.isfinite(logits.max(axis=1)), logits.argmax(axis=1), -1)


def in_top(logits: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether the label is among the k greatest logits [N]; of a tie the first classes are."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    own = np.take_along_axis(logits, np.maximum(labels, 0)[:, None], axis=1)
    tied_before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    rank = ((logits > own) | tied_before).sum(axis=1)
    return (rank < k) & (said(logits) >= 0) & (labels >= 0)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The softmax [N, K] in double precision; nan where the logits say no class."""
    logits = np.where(said(logits)[:, None] >= 0, np.asarray(logits, np.float64), np.nan)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def share(metric: str, hits: np.ndarray) -> Bound:
    """The claim that a share of the examples [N] is 1 and not 0, by Clopper and Pearson's bound.

    Raises:
      ValueError: they are no vector of zeros and ones.
    """
    hits = np.asarray(hits)
    if hits.ndim != 1 or not np.isin(hits, (0, 1)).all():
        raise ValueError(
            f"scores must be a vector of 0 and 1; got {metric} of shape {hits.shape} with {np.unique(hits)[:5]}: "
            "score each example as right (1) or wrong (0)"
        )
    n, k = len(hits), int(np.count_nonzero(hits))
    return lambda confidence: Claim(metric, k / max(n, 1), bounds.clopper_pearson_lower(k, n, confidence=confidence), n)


def latency(passes_ms: np.ndarray) -> Bound:
    """The claim that the median pass takes no longer, from [N] passes in milliseconds; on that machine, as it was then."""
    point = float(np.median(passes_ms))

    def bound(confidence: float) -> Claim:
        upper = bounds.median_upper(passes_ms, confidence=confidence)
        return Claim("latency_ms", point, None, len(passes_ms), upper_bound=upper)

    return bound


def by_part(hits: np.ndarray, parts: np.ndarray, count: int, *, confidence: float) -> list[tuple[int, int, float]]:
    """(right, examples, bound) of each of `count` parts, each bound with the given confidence, 0 where it has no example.

    Args:
      hits: [N] in {0, 1}.
      parts: [N] from 0, -1 for none: classes or groups.
      count: of parts.
      confidence: of each bound alone.
    """
    inside = parts >= 0
    sizes = np.bincount(parts[inside], minlength=count)
    right = np.bincount(parts[inside & np.asarray(hits, bool)], minlength=count)
    return [
        (int(k), int(n), bounds.clopper_pearson_lower(int(k), int(n), confidence=confidence) if n else 0.0)
        for k, n in zip(right, sizes, strict=True)
    ]


def _hits(outputs: Outputs, k: int = 1) -> np.ndarray:
    return in_top(outputs.logits, outputs.labels, k)


def _accuracy(metric: str, outputs: Outputs, confidence: float) -> Claim:
    return share(metric, _hits(outputs.labelled()))(confidence)


def _top_k(metric: str, outputs: Outputs, k: int, confidence: float) -> Claim:
    return share(metric, _hits(outputs.labelled(), k))(confidence)


def _agreement(metric: str, outputs: Outputs, confidence: float) -> Claim:
    of_student = said(outputs.logits)
    return share(metric, (of_student == said(_teacher(metric, outputs))) & (of_student >= 0))(confidence)


def _drop(metric: str, outputs: Outputs, k: int, confidence: float) -> Claim:
    """Bounds P(teacher right, student wrong) - P(student right, teacher wrong), each of the two at half of the level."""
    outputs = outputs.labelled()
    teacher = in_top(_teacher(metric, outputs), outputs.labels, k)
    student, n, each = _hits(outputs, k), len(outputs.labels), (1 + confidence) / 2
    lost, won = int((teacher & ~student).sum()), int((student & ~teacher).sum())
    upper = 1 - bounds.clopper_pearson_lower(n - lost, n, confidence=each)
    lower = bounds.clopper_pearson_lower(won, n, confidence=each)
    return Claim(metric, (lost - won) / n, None, n, upper_bound=upper - lower)


def _balanced(metric: str, outputs: Outputs, confidence: float) -> Claim:
    """`point` is over the classes that have examples, the bound over all."""
    outputs = outputs.labelled()
    hits = _hits(outputs)
    found = [hits[outputs.labels == k].mean() for k in np.unique(outputs.labels)]
    bound = bounds.balanced_lower(hits, outputs.labels, outputs.classes, confidence=confidence)
    return Claim(metric, float(np.mean(found)), bound, len(hits))


def _worst(metric: str, hits: np.ndarray, parts: np.ndarray, count: int, confidence: float) -> Claim:
    """The least of the parts' bounds, each at the claim's own level.

    No correction over parts is due: the bound exceeds the truth only where that of the truly worst part does (an
    intersection-union test, Berger 1982). `point` is over the parts that have examples, n the fewest of a part.
    """
    found = by_part(hits, parts, count, confidence=confidence)
    points = [right / n for right, n, _ in found if n]
    return Claim(metric, min(points, default=0.0), min(bound for *_, bound in found), min(n for _, n, _ in found))


def _worst_class(metric: str, outputs: Outputs, confidence: float) -> Claim:
    outputs = outputs.labelled()
    return _worst(metric, _hits(outputs), outputs.labels, outputs.classes, confidence)


def _worst_group(metric: str, outputs: Outputs, confidence: float) -> Claim:
    outputs = outputs.labelled()
    if outputs.groups is None or not (outputs.groups >= 0).any():
        raise InputError(f"{metric} needs groups; the examples have none: claim worst_class_accuracy")
    if outputs.groups.max() >= outputs.num_groups:
        raise ValueError(
            f"groups lie below num_groups; got {outputs.groups.max()} of {outputs.num_groups}: pass num_groups="
        )
    return _worst(metric, _hits(outputs), outputs.groups, outputs.num_groups, confidence)


def _macro_f1(metric: str, outputs: Outputs, confidence: float) -> Claim:
    outputs = outputs.labelled()
    answers = said(outputs.logits), outputs.labels, outputs.classes
    bound = bounds.macro_f1_lower(*answers, confidence=confidence)
    return Claim(metric, bounds.macro_f1(*answers), bound, len(outputs.labels))


def _ece(metric: str, outputs: Outputs, confidence: float) -> Claim:
    outputs = outputs.labelled()
    sure, hits = np.nan_to_num(probabilities(outputs.logits).max(axis=1), nan=1.0).clip(0, 1), _hits(outputs)
    upper = bounds.ece_upper(sure, hits, confidence=confidence)
    return Claim(metric, bounds.ece(sure, hits), None, len(hits), upper_bound=upper)


def _brier(metric: str, outputs: Outputs, confidence: float) -> Claim:
    """Half of Brier's sum of squares over classes, in [0, 1]."""
    outputs = outputs.labelled()
    wanted = outputs.labels[:, None] == np.arange(outputs.classes)
    scores = np.square(probabilities(outputs.logits) - wanted).sum(axis=1) / 2
    return _at_most(metric, np.nan_to_num(scores, nan=1.0), 0.0, 1.0, confidence)


def _cost(metric: str, outputs: Outputs, costs: np.ndarray | None, confidence: float) -> Claim:
    outputs = outputs.labelled()
    if costs is None or costs.shape != (outputs.classes,) * 2:
        raise ValueError(f"{metric} needs costs [{outputs.classes}, {outputs.classes}]; got none such: pass costs=")
    answers = said(outputs.logits)
    paid = np.where(answers >= 0, costs[outputs.labels, np.maximum(answers, 0)], costs[outputs.labels].max(axis=1))
    return _at_most(metric, paid, float(costs.min()), float(costs.max()), confidence)


def _function(metric: str, outputs: Outputs, function: Score, confidence: float) -> Claim:
    outputs = outputs.labelled()
    scores = _scored(metric, function, outputs)
    lower = bounds.mean_lower(scores, 0.0, 1.0, confidence=confidence)
    return Claim(metric, float(scores.mean()), lower, len(scores))


def _at_most(metric: str, x: np.ndarray, low: float, high: float, confidence: float) -> Claim:
    upper = bounds.mean_upper(x, low, high, confidence=confidence)
    return Claim(metric, float(x.mean()), None, len(x), upper_bound=upper)


def _teacher(metric: str, outputs: Outputs) -> np.ndarray:
    if outputs.teacher_logits is None:
        raise ValueError(f"{metric} needs the teacher's logits; got none: pass teacher_logits")
    return outputs.teacher_logits


CLAIMS: dict[str, Callable[[str, Outputs, float], Claim]] = {
    "accuracy": _accuracy,
    "agreement": _agreement,
    "balanced_accuracy": _balanced,
    "worst_class_accuracy": _worst_class,
    "worst_group_accuracy": _worst_group,
    "macro_f1": _macro_f1,
    "ece": _ece,
    "brier": _brier,
}


# What users bring: functions of their own, and tables of costs.


def function_named(name: str) -> Score:
    """The callable that MODULE:FUNCTION names; the module is importable or in the working directory.

    Raises:
      InputError: it is not there, or is no callable.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of the user's own code
        raise InputError(
            f"a metric of your own is an importable MODULE:FUNCTION; got '{name}', which fails with {_told(error)}: check "
            "the name, or run where the module is"
        ) from error
    if not callable(function):
        raise InputError(f"a metric's FUNCTION is callable; got {type(function).__name__} of '{name}': name a function")
    checked: Score = function
    return checked


def _scored(name: str, function: Score, outputs: Outputs) -> np.ndarray:
    """Scores [N], 0 where the logits say no class, once it is clear that they are scores, each of its own example."""
    n, half = len(outputs.labels), (len(outputs.labels) + 1) // 2

    def call(rows: int) -> np.ndarray:
        try:
            scores: Any = np.asarray(function(outputs.logits[:rows].copy(), outputs.labels[:rows].copy()), np.float64)
        except Exception as error:  # of the user's own code
            raise InputError(
                f"a metric maps logits [N, K] and labels [N] to scores [N]; {name} fails with {_told(error)}: mend it"
            ) from error
        if scores.shape != (rows,):
            raise InputError(f"a metric gives scores [N], {[rows]} here; {name} gives {list(scores.shape)}: mend it")
        found: np.ndarray = np.where(said(outputs.logits[:rows]) >= 0, scores, 0.0)
        if not ((found >= 0) & (found <= 1)).all():
            worst = found[~((found >= 0) & (found <= 1))][0]
            raise InputError(f"a metric's scores lie in [0, 1]; {name} gives {worst:g}: rescale them")
        return found

    scores = call(n)
    if not np.allclose(scores[:half], call(half), atol=1e-6):
        raise InputError(
            f"a metric scores each example by itself; {name} scores half of them unlike all of them: let no example depend "
            "on the others"
        )
    return scores


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def read_costs(path: str | Path, classes: int) -> np.ndarray:
    """The costs [K, K] in a CSV file without a heading: rows are true classes, columns what is said.

    Raises:
      InputError: no such file, or it holds no K x K finite numbers.
    """
    try:
        costs = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(
            f"costs are a CSV file of numbers; {path} cannot be read ({_told(error)}): mend it or name another"
        ) from None
    if costs.shape != (classes, classes) or not np.isfinite(costs).all():
        raise InputError(
            f"costs are finite, a row for each true class and a column for each that is said, {classes} x {classes}; "
            f"{path} has {' x '.join(map(str, costs.shape))}{'' if np.isfinite(costs).all() else ', not finite'}: mend it"
        )
    return costs


def digest_of_costs(costs: np.ndarray | None) -> str | None:
    """What tells one table of costs from another."""
    return None if costs is None else hashlib.sha256(np.ascontiguousarray(costs, np.float64).tobytes()).hexdigest()
