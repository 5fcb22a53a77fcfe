"""Bounds of classification metrics in the population, from a student's outputs on a sealed split.

Each public function is named by a row of `tasks/metrics.py`. It takes (query, outputs) and returns a `Bound`: a function of the
claim's own confidence. The point of a claim is the metric's value on the split; the bound is what `certify/bounds.py` proves.

Where several examples form one independent unit (`Outputs.units`, such as the images of a patient), a claim is about an example
drawn at random from a new unit, and n counts units. A mean over examples becomes the mean over units of their means, bounded by
betting. All other metrics are computed on one example of each unit, and so are fractions where units have fewer than
AVERAGED_SIZE examples on average.

A student whose logits have a nan, a +inf or nothing finite predicts no class: it is wrong, agrees with no one, counts as fully
confident, and gets the worst score or cost. Metrics that need labels are about labeled examples alone.

References:
  R. L. Berger: Multiparameter hypothesis testing and acceptance sampling. Technometrics 24 (4), 1982.
"""

import numpy as np

from ev3_distill.certify import bounds
from ev3_distill.certify.certificate import Bound, Claim, fraction_bound, mean_bound, part_bounds
from ev3_distill.errors import InputError
from ev3_distill.tasks.classification import example_metrics
from ev3_distill.tasks.classification.metric_checks import class_index
from ev3_distill.tasks.classification.user_metrics import function_named, user_scores
from ev3_distill.tasks.metrics import MetricQuery
from ev3_distill.tasks.outputs import Outputs

AVERAGED_SIZE = 3  # examples of a unit, on average


def accuracy(query: MetricQuery, outputs: Outputs) -> Bound:
    """Fraction of labeled examples that are classified correctly."""
    outputs = outputs.with_target()
    return _fraction(query.name, _hits(outputs), outputs)


def top_k_accuracy(query: MetricQuery, outputs: Outputs) -> Bound:
    """Fraction of labeled examples whose label is among the K greatest logits."""
    outputs = outputs.with_target()
    return _fraction(query.name, _hits(outputs, int(query.argument)), outputs)


def agreement(query: MetricQuery, outputs: Outputs) -> Bound:
    """Fraction of all examples on which student and teacher predict the same class."""
    return _fraction(query.name, example_metrics.agrees(outputs.student, _teacher_logits(query, outputs)), outputs)


def accuracy_drop(query: MetricQuery, outputs: Outputs) -> Bound:
    """The teacher's accuracy minus the student's."""
    return _drop(query, outputs, 1)


def top_k_drop(query: MetricQuery, outputs: Outputs) -> Bound:
    """The teacher's top-K accuracy minus the student's."""
    return _drop(query, outputs, int(query.argument))


def _drop(query: MetricQuery, outputs: Outputs, k: int) -> Bound:
    """Bounds P(teacher right, student wrong) - P(student right, teacher wrong), each of the two at half of the level."""
    outputs = outputs.with_target()
    teacher = example_metrics.in_top_k(_teacher_logits(query, outputs), outputs.targets, k)
    student = _hits(outputs, k)
    if _averages(outputs):
        drop = outputs.means_of_units(teacher.astype(float) - student)
        return mean_bound(query.name, drop, -1.0, 1.0, higher_is_better=False)
    if outputs.units is not None:
        student, teacher = (hits[outputs.rows_of_units()] for hits in (student, teacher))
    losses, wins, n = int((teacher & ~student).sum()), int((student & ~teacher).sum()), len(student)

    def bound(confidence: float) -> Claim:
        upper = bounds.difference_upper(losses, wins, n, confidence=confidence)
        return Claim(query.name, (losses - wins) / n, None, n, upper_bound=upper)

    return bound


def balanced_accuracy(query: MetricQuery, outputs: Outputs) -> Bound:
    """Mean over classes of the accuracy; the point is over classes with examples, the bound over all."""
    outputs = outputs.with_target().one_per_unit()
    labels, hits, classes = outputs.targets, _hits(outputs), outputs.student.shape[1]
    point = float(np.mean([hits[labels == k].mean() for k in np.unique(labels)]))

    def bound(confidence: float) -> Claim:
        lower = bounds.balanced_lower(hits, labels, classes, confidence=confidence)
        return Claim(query.name, point, lower, len(hits))

    return bound


def worst_class_accuracy(query: MetricQuery, outputs: Outputs) -> Bound:
    """The lowest accuracy on any class."""
    outputs = outputs.with_target().one_per_unit()
    return _worst(query, outputs, outputs.targets, outputs.student.shape[1])


def worst_group_accuracy(query: MetricQuery, outputs: Outputs) -> Bound:
    """The lowest accuracy on any group."""
    outputs = outputs.with_target().one_per_unit()
    if outputs.groups is None or not (outputs.groups >= 0).any():
        raise InputError(f"{query.name} needs groups; the examples have none: guard worst_class_accuracy instead")
    if outputs.groups.max() >= outputs.num_groups:
        raise ValueError(
            f"groups must lie below num_groups; got {outputs.groups.max()} of {outputs.num_groups}: pass num_groups="
        )
    return _worst(query, outputs, outputs.groups, outputs.num_groups)


def _worst(query: MetricQuery, outputs: Outputs, parts: np.ndarray, count: int) -> Bound:
    """The smallest of the parts' bounds, each at the claim's own level.

    No correction for the number of parts is needed: the bound exceeds the truth only if the bound of the truly worst part
    does (an intersection-union test, Berger 1982). The point is over parts with examples, and n is the smallest part's.
    """
    hits = _hits(outputs)

    def bound(confidence: float) -> Claim:
        by_part = part_bounds(hits, parts, count, confidence=confidence)
        points = [right / n for right, n, _ in by_part if n]
        lowest = min(lower for *_, lower in by_part)
        return Claim(query.name, min(points, default=0.0), lowest, min(n for _, n, _ in by_part))

    return bound


def recall(query: MetricQuery, outputs: Outputs) -> Bound:
    """Fraction of a class's examples that are predicted as that class.

    The number of examples of the class is random, but given that number the hits are binomial. The bound is Clopper and
    Pearson's for the number in the split, so it holds conditionally and therefore also on average. Without examples the bound
    is 0.
    """
    outputs = outputs.with_target().one_per_unit()
    own = outputs.targets == class_index(query, outputs.student.shape[1])
    return _conditional_fraction(query.name, _hits(outputs), own)


def precision(query: MetricQuery, outputs: Outputs) -> Bound:
    """Fraction of the examples predicted as a class that are of that class.

    The denominator, the number of examples predicted as the class, is random. Examples are independent, so given that number
    the correct ones are binomial with the precision as their probability. The bound is Clopper and Pearson's for the number in
    the split: it holds conditionally on the number, and therefore also on average. A class that is never predicted has the
    bound 0.
    """
    outputs = outputs.with_target().one_per_unit()
    predicted = example_metrics.predicted_class(outputs.student) == class_index(query, outputs.student.shape[1])
    return _conditional_fraction(query.name, _hits(outputs), predicted)


def _conditional_fraction(metric: str, hits: np.ndarray, members: np.ndarray) -> Bound:
    """The fraction of hits among members, given their number; point and bound are 0 where there are none."""
    if not members.any():
        return lambda confidence: Claim(metric, 0.0, 0.0, 0)
    return fraction_bound(metric, hits[members])


def macro_f1(query: MetricQuery, outputs: Outputs) -> Bound:
    """Mean over classes of F1."""
    outputs = outputs.with_target().one_per_unit()
    answers = example_metrics.predicted_class(outputs.student), outputs.targets, outputs.student.shape[1]

    def bound(confidence: float) -> Claim:
        lower = bounds.macro_f1_lower(*answers, confidence=confidence)
        return Claim(query.name, bounds.macro_f1(*answers), lower, len(outputs.targets))

    return bound


def ece(query: MetricQuery, outputs: Outputs) -> Bound:
    """Expected calibration error in 15 bins of equal width."""
    outputs = outputs.with_target().one_per_unit()
    top = np.nan_to_num(example_metrics.probabilities(outputs.student).max(axis=1), nan=1.0).clip(0, 1)
    hits = _hits(outputs)

    def bound(confidence: float) -> Claim:
        upper = bounds.ece_upper(top, hits, confidence=confidence)
        return Claim(query.name, bounds.ece(top, hits), None, len(hits), upper_bound=upper)

    return bound


def brier(query: MetricQuery, outputs: Outputs) -> Bound:
    """Mean of half of Brier's sum of squares, in [0, 1]."""
    outputs = outputs.with_target()
    scores = example_metrics.brier(example_metrics.probabilities(outputs.student), outputs.targets)
    scores = outputs.means_of_units(np.nan_to_num(scores, nan=1.0))
    return mean_bound(query.name, scores, 0.0, 1.0, higher_is_better=False)


def cost(query: MetricQuery, outputs: Outputs) -> Bound:
    """Mean cost of the predictions."""
    outputs = outputs.with_target()
    classes, costs = outputs.student.shape[1], query.costs
    if costs is None or costs.shape != (classes, classes):
        raise ValueError(
            f"{query.name} needs costs [{classes}, {classes}]; got "
            f"{'none' if costs is None else list(costs.shape)}: pass costs="
        )
    scores = example_metrics.cost(outputs.student, outputs.targets, costs)
    scores = outputs.means_of_units(scores)
    return mean_bound(query.name, scores, float(costs.min()), float(costs.max()), higher_is_better=False)


def user_metric(query: MetricQuery, outputs: Outputs) -> Bound:
    """Mean of the scores in [0, 1] of a user's own function."""
    outputs = outputs.with_target()
    scores = user_scores(query.name, function_named(query.name), outputs.student, outputs.targets)
    return mean_bound(query.name, outputs.means_of_units(scores), 0.0, 1.0)


def _fraction(metric: str, hits: np.ndarray, outputs: Outputs) -> Bound:
    """The fraction of hits: that of independent examples, or the mean of the units' own fractions."""
    if _averages(outputs):
        return mean_bound(metric, outputs.means_of_units(hits), 0.0, 1.0)
    return fraction_bound(metric, hits if outputs.units is None else hits[outputs.rows_of_units()])


def _averages(outputs: Outputs) -> bool:
    """Whether to bound the mean of the units' means, rather than one example of each unit.

    Betting on means is up to 1.9 times as far from the measured value as the exact bound. A mean of s examples varies less
    than one example, by at most the square root of s. The decision depends on the sizes of units alone.
    """
    return outputs.units is not None and len(outputs.units) >= AVERAGED_SIZE * len(np.unique(outputs.units))


def _hits(outputs: Outputs, k: int = 1) -> np.ndarray:
    return np.asarray(example_metrics.in_top_k(outputs.student, outputs.targets, k))


def _teacher_logits(query: MetricQuery, outputs: Outputs) -> np.ndarray:
    if outputs.teacher is None:
        raise ValueError(f"{query.name} needs the teacher's logits; got none: pass teacher=")
    return np.asarray(outputs.teacher["logits"])
