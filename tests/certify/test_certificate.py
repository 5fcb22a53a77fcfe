"""The certificate divides the error probability among claims and students, so that its claims hold jointly."""

import json

import numpy as np
import pytest
from scipy.stats import binom

from ev3_distill.certify.bounds import clopper_pearson_lower
from ev3_distill.certify.certificate import Certificate, Claim, equal_shares, make_certificate
from ev3_distill.errors import InputError
from ev3_distill.tasks.classification.tables import Parts, accuracy_by
from ev3_distill.tasks.outputs import Outputs, bounds_of


def test_claims_divide_the_level_equally():
    right, agreed = np.repeat([1, 0], [90, 10]), np.repeat([True, False], [97, 3])
    certificate = make_certificate({"accuracy": right, "agreement": agreed}, confidence=0.9)
    assert certificate == Certificate(
        0.9,
        (
            Claim("accuracy", 0.9, clopper_pearson_lower(90, 100, confidence=0.95), 100),
            Claim("agreement", 0.97, clopper_pearson_lower(97, 100, confidence=0.95), 100),
        ),
    )
    alone = make_certificate({"accuracy": right}, confidence=0.9).claims[0]
    assert alone.lower_bound == pytest.approx(clopper_pearson_lower(90, 100, confidence=0.9), rel=1e-12)
    assert alone.lower_bound > certificate.claims[0].lower_bound


def test_certificate_from_bounds_of_outputs():
    logits, labels = np.eye(2)[np.repeat([0, 1], [90, 10])], np.zeros(100, int)
    outputs = Outputs(logits, labels, {"logits": np.eye(2)[labels]})
    certificate = make_certificate(bounds_of(["accuracy", "brier", "accuracy"], outputs), confidence=0.9)
    assert [claim.metric for claim in certificate.claims] == ["accuracy", "brier"]
    assert certificate.claims[0].lower_bound == clopper_pearson_lower(90, 100, confidence=0.95)
    uneven = make_certificate(
        bounds_of(["accuracy", "agreement"], outputs), confidence=0.9, shares={"accuracy": 0.9, "agreement": 0.1}
    )
    levels = [claim.lower_bound for claim in uneven.claims]
    assert levels == [pytest.approx(clopper_pearson_lower(90, 100, confidence=c)) for c in (0.91, 0.99)]


def test_joint_coverage_of_exclusive_metrics():
    # An example is right for at most one of two metrics: far from independent, all outcomes enumerable.
    n, confidence, each = 12, 0.8, 0.9
    bounds = np.array([clopper_pearson_lower(k, n, confidence=each) for k in range(n + 1)])
    for p in np.linspace(0.01, 0.49, 25):
        first = np.arange(n + 1)
        held = 0.0
        for k in first[bounds <= p]:
            second = np.arange(n - k + 1)
            held += binom.pmf(k, n, p) * binom.pmf(second, n - k, p / (1 - p))[bounds[second] <= p].sum()
        assert held >= confidence


def test_bounds_hold_for_whichever_of_two_students_is_delivered():
    """Enumerates all outcomes of delivering the first if its bound reaches the threshold, else the second.

    Without the division of the level, the error probability is exceeded.
    """
    n, confidence, threshold = 30, 0.9, 0.6

    def broken(among):
        scores = (np.repeat([1, 0], [k, n - k]) for k in range(n + 1))
        certificates = (make_certificate({"accuracy": right}, confidence=confidence, among=among) for right in scores)
        bounds = np.array([certificate.claims[0].lower_bound for certificate in certificates])
        worst = 0.0
        for wanted in np.linspace(0.4, 0.99, 60):
            for other in np.linspace(0.4, 0.99, 60):
                of_wanted, of_other = (binom.pmf(np.arange(n + 1), n, p) for p in (wanted, other))
                first = bounds >= threshold
                false = of_wanted[first & (bounds > wanted)].sum()
                false += of_wanted[~first].sum() * of_other[bounds > other].sum()
                worst = max(worst, false)
        return worst

    assert broken(2) <= 1 - confidence < broken(1)


def test_tables_divide_their_level_among_students():
    outputs = Outputs(np.eye(2)[[0, 0, 0, 1, 1, 0]], np.array([0, 0, 0, 0, 1, 1]))
    table = accuracy_by(outputs, Parts("class", outputs.targets, ["a", "b"]), confidence=0.9, among=2)
    expected = [clopper_pearson_lower(k, n, confidence=1 - 0.1 / 4) for k, n in ((3, 4), (1, 2))]
    assert [row[2] for row in table.rows] == pytest.approx(expected)
    assert table.confidence == 0.9


def test_all_claims_hold_jointly():
    """All metrics at once, on splits of a known population."""
    rng = np.random.default_rng(0)
    labels = np.arange(30_000) % 3
    logits = rng.normal(size=(30_000, 3)) + 2 * np.eye(3)[labels]
    teacher = rng.normal(size=(30_000, 3)) + 3 * np.eye(3)[labels]
    whole = Outputs(logits, labels, {"logits": teacher}, rng.integers(2, size=30_000), 2)
    costs = 1 - np.eye(3)
    metrics = [
        *("accuracy", "agreement", "top2_accuracy", "balanced_accuracy", "worst_class_accuracy", "macro_f1"),
        *("worst_group_accuracy", "drop(accuracy)", "ece", "brier", "cost", "precision(0)", "recall(2)"),
    ]
    truth = {name: claim(0.5).point for name, claim in bounds_of(metrics, whole, costs=costs).items()}
    failed = 0
    for _ in range(100):
        rows = rng.integers(30_000, size=200)
        split = Outputs(logits[rows], labels[rows], {"logits": teacher[rows]}, whole.groups[rows], 2)
        claims = make_certificate(bounds_of(metrics, split, costs=costs), confidence=0.8).claims
        lower = [claim.lower_bound is None or claim.lower_bound <= truth[claim.metric] for claim in claims]
        upper = [claim.upper_bound is None or claim.upper_bound >= truth[claim.metric] for claim in claims]
        failed += not all(lower + upper)
    assert failed <= binom.isf(0.001, 100, 0.2)


def test_as_dict_is_json():
    data = make_certificate({"accuracy": np.ones(20, np.float32)}).as_dict()
    assert json.loads(json.dumps(data)) == data
    assert set(data) == {"confidence", "claims"}
    assert data["confidence"] == 0.95
    assert data["claims"] == [
        {"metric": "accuracy", "point": 1.0, "lower_bound": pytest.approx(0.05 ** (1 / 20)), "n": 20}
    ]


def test_json_has_the_upper_bound_in_place_of_the_lower():
    logits = np.eye(2)[np.zeros(10, int)]
    claims = make_certificate(bounds_of(["brier"], Outputs(logits, np.zeros(10, int)))).as_dict()["claims"]
    assert set(claims[0]) == {"metric", "point", "upper_bound", "n"}


@pytest.mark.parametrize("score", [[0.5, 1], [2, 0], [np.nan, 1], [[0, 1], [1, 1]], 1])
def test_rejects_scores_that_are_not_zeros_and_ones(score):
    with pytest.raises(ValueError, match="vector of 0 and 1"):
        make_certificate({"accuracy": np.array(score)})


def test_rejects_no_examples_and_no_metrics():
    with pytest.raises(InputError, match="at least one example"):
        make_certificate({"accuracy": np.zeros(0)})
    with pytest.raises(ValueError, match="at least one metric"):
        make_certificate({})


# Tables.


def test_table_of_classes_by_hand():
    labels, answers = np.repeat([0, 1, -1], [10, 20, 5]), np.repeat([0, 1, 1, 0, 0], [9, 1, 15, 5, 5])
    table = accuracy_by(
        Outputs(np.eye(3)[answers], labels), Parts("class", labels, ("ant", "bee", "cat")), confidence=0.9
    )
    each = 1 - 0.1 / 3
    assert table.rows == (
        ("ant", 0.9, clopper_pearson_lower(9, 10, confidence=each), 10),
        ("bee", 0.75, clopper_pearson_lower(15, 20, confidence=each), 20),
        ("cat", None, 0.0, 0),
    )
    tables = Certificate(0.9, (), (table,)).as_dict()["tables"]
    assert tables == json.loads(json.dumps(tables))
    assert tables[0]["rows"][2] == {"name": "cat", "point": None, "lower_bound": 0.0, "n": 0}
    assert (tables[0]["of"], tables[0]["metric"], tables[0]["confidence"]) == ("class", "accuracy", 0.9)


def test_bounds_of_a_table_hold_jointly():
    rng = np.random.default_rng(0)
    truth, labels = np.array([0.5, 0.7, 0.9, 0.97, 0.99]), np.arange(300) % 5
    failed = 0
    for _ in range(400):
        answers = np.where(rng.random(300) < truth[labels], labels, (labels + 1) % 5)
        table = accuracy_by(Outputs(np.eye(5)[answers], labels), Parts("class", labels, "abcde"), confidence=0.8)
        failed += any(bound > p for (*_, bound, _), p in zip(table.rows, truth, strict=True))
    assert failed <= binom.isf(0.001, 400, 0.2)


def test_equal_shares_sum_to_one():
    assert sum(equal_shares(["a", "b", "c"]).values()) == pytest.approx(1)
