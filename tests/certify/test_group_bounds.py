"""Bounds that count groups: units of several examples that resemble each other."""

import dataclasses

import numpy as np
import pytest

from ev3_distill.certify.bounds import clopper_pearson_lower, difference_upper, mean_lower, mean_upper
from ev3_distill.certify.certificate import COVERED_GROUPS, Units
from ev3_distill.monitor.sentences import claim_line, units_sentence
from ev3_distill.tasks.classification.task import classification
from ev3_distill.tasks.outputs import Outputs, bounds_of
from ev3_distill.training.certify_run import CertificateRequest, certificate_of


def outputs(hits, units, classes=2):
    """A student that is right where `hits` are 1; label 0 everywhere."""
    hits = np.asarray(hits)
    predicted = np.where(hits, 0, 1)
    labels = np.zeros(len(hits), np.int32)
    teacher = {"logits": np.eye(classes, dtype=np.float32)[labels]}
    return Outputs(np.eye(classes, dtype=np.float32)[predicted], labels, teacher, units=np.asarray(units))


def test_a_mean_over_examples_becomes_the_mean_over_groups():
    sealed = outputs([1, 1, 0, 1, 0, 0, 0, 0, 0], [7, 7, 7, 7, 2, 2, 5, 5, 5])
    claims = {
        name: bound(0.9) for name, bound in bounds_of(("accuracy", "agreement", "drop(accuracy)"), sealed).items()
    }
    means = np.array([0.0, 0.0, 0.75])
    assert claims["accuracy"].n == 3
    assert claims["accuracy"].point == pytest.approx(0.25)
    assert claims["accuracy"].lower_bound == mean_lower(means, 0, 1, confidence=0.9)
    assert claims["agreement"].lower_bound == claims["accuracy"].lower_bound
    assert claims["drop(accuracy)"].upper_bound == pytest.approx(mean_upper(1 - means, -1, 1, confidence=0.9))


def test_small_groups_have_the_exact_bound_of_one_example_each():
    """A data set with a few duplicates loses little: 3 of 40 groups have two examples."""
    hits = np.arange(43) % 10 > 0
    sealed = outputs(hits, np.minimum(np.arange(43), 39))
    right = int(sealed.one_per_unit().student[:, 0].sum())
    claims = {
        name: bound(0.9) for name, bound in bounds_of(("accuracy", "agreement", "drop(accuracy)"), sealed).items()
    }
    for name in ("accuracy", "agreement"):
        assert claims[name].n == 40
        assert claims[name].lower_bound == clopper_pearson_lower(right, 40, confidence=0.9)
    assert claims["drop(accuracy)"].upper_bound == difference_upper(40 - right, 0, 40, confidence=0.9)


def test_other_metrics_see_one_example_of_each_group():
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(50), 10)
    sealed = outputs(rng.random(50)[units] < 0.9, units)
    alone = sealed.one_per_unit()
    assert alone.units is None
    assert len(alone.targets) == 50
    for name, bound in bounds_of(
        ("macro_f1", "balanced_accuracy", "worst_class_accuracy", "ece", "recall(0)"), sealed
    ).items():
        assert dataclasses.asdict(bound(0.95)) == dataclasses.asdict(bounds_of([name], alone)[name](0.95))
        assert bound(0.95).n <= 50


def test_the_example_of_a_group_is_drawn_uniformly_and_always_the_same():
    units = np.repeat(np.arange(2000), 4)
    place = Outputs(np.zeros((8000, 2)), np.arange(8000) % 4, units=units)
    first, again = place.one_per_unit(), place.one_per_unit()
    np.testing.assert_array_equal(first.targets, again.targets)
    assert (abs(np.bincount(first.targets) - 500) < 80).all()


def test_copies_of_examples_prove_nothing_more():
    """Ten copies of each of 40 examples give the bound of 40 examples, where counting examples would give that of 400."""
    hits = np.arange(40) < 36
    units = np.repeat(np.arange(40), 10)
    copied = bounds_of(["accuracy"], outputs(hits[units], units))["accuracy"](0.95)
    single = mean_lower(hits.astype(float), 0, 1, confidence=0.95)
    assert copied.lower_bound == pytest.approx(single)
    assert (
        copied.lower_bound
        < clopper_pearson_lower(36, 40, confidence=0.95)
        < clopper_pearson_lower(360, 400, confidence=0.95)
    )


def test_bounds_of_groups_hold_where_groups_differ():
    """Each group is wholly right or wholly wrong; the truth is 0.5."""
    rng = np.random.default_rng(1)
    wrong, by_examples = 0, 0
    units = np.repeat(np.arange(30), 10)
    for _ in range(300):
        hits = (rng.random(30) < 0.5)[units]
        wrong += bounds_of(["accuracy"], outputs(hits, units))["accuracy"](0.95).lower_bound > 0.5
        by_examples += clopper_pearson_lower(int(hits.sum()), 300, confidence=0.95) > 0.5
    assert wrong <= 15
    assert by_examples > 60


def test_a_certificate_says_how_many_groups_there_were():
    request = CertificateRequest(classification(2), ["accuracy"], 0.95)
    certificate = certificate_of(outputs([1] * 12, np.repeat(np.arange(4), 3)), request)
    assert certificate.units == Units("groups", 4, 12)
    assert certificate.covered == COVERED_GROUPS
    content = certificate.as_dict()
    assert content["units"] == {"of": "groups", "number": 4, "examples": 12}
    assert "100.00% of 4 groups" in claim_line(content["claims"][0], content)
    assert units_sentence(content).startswith(
        "The bounds count 4 groups of 12 examples; accuracy is that on an average example"
    )
    assert units_sentence({"claims": []}) == ""
