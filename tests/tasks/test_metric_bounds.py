"""Claims from outputs: points are the metrics, bounds cover the truth, and logits without a prediction count as wrong."""

import math

import numpy as np
import pytest
from scipy import stats

from ev3_distill.certify.bounds import clopper_pearson_lower, mean_lower, mean_upper
from ev3_distill.certify.certificate import median_bound
from ev3_distill.errors import InputError
from ev3_distill.tasks.classification.example_metrics import in_top_k, predicted_class, probabilities
from ev3_distill.tasks.classification.user_metrics import function_named, read_costs
from ev3_distill.tasks.metrics import METRICS, find_metric
from ev3_distill.tasks.outputs import Outputs, bounds_of

RNG = np.random.default_rng(0)
LABELS = RNG.integers(5, size=400)
LOGITS = (RNG.normal(size=(400, 5)) + 2 * np.eye(5)[LABELS]).astype(np.float32)
TEACHER = (RNG.normal(size=(400, 5)) + 3 * np.eye(5)[LABELS]).astype(np.float32)
OUTPUTS = Outputs(LOGITS, LABELS, {"logits": TEACHER}, RNG.integers(3, size=400), 3)
ONE_HOT = np.eye(5, dtype=bool)[LABELS]
COSTS = np.array([[0, 1, 1, 1, 4], [1, 0, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 1], [9, 1, 1, 1, -1.0]])


SINGLE = [name for name, row in METRICS.items() if row.bound and not row.pattern]
FAMILIES = ("top2_accuracy", "drop(top3_accuracy)", "precision(3)", "recall(3)")


def claim_of(metric, outputs=OUTPUTS, confidence=0.9, costs=COSTS, class_names=()):
    return bounds_of([metric], outputs, costs=costs, class_names=class_names)[metric](confidence)


@pytest.mark.parametrize("metric", [*SINGLE, *FAMILIES])
def test_bound_is_on_the_worse_side_of_the_point(metric):
    claim, row = claim_of(metric), find_metric(metric).row
    assert claim.metric == metric
    assert (claim.upper_bound is None) == row.higher_is_better
    assert (claim.lower_bound is not None) == row.higher_is_better
    wide, narrow = (claim_of(metric, confidence=confidence) for confidence in (0.99, 0.6))
    if row.higher_is_better:
        assert wide.lower_bound <= claim.lower_bound <= narrow.lower_bound <= claim.point
    else:
        assert wide.upper_bound >= claim.upper_bound >= narrow.upper_bound >= claim.point


@pytest.mark.parametrize("metric", ["f1", "params", "latency_ms"])
def test_metrics_without_a_bound_on_examples_are_refused(metric):
    with pytest.raises(ValueError, match="a bound needs a metric that is measured on examples"):
        bounds_of([metric], OUTPUTS)


def test_points_agree_with_scikit_learn():
    from sklearn import metrics

    answers = LOGITS.argmax(1)
    point = {name: claim_of(name).point for name in SINGLE}
    assert point["accuracy"] == pytest.approx(metrics.accuracy_score(LABELS, answers))
    assert point["agreement"] == pytest.approx((answers == TEACHER.argmax(1)).mean())
    assert point["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(LABELS, answers))
    assert point["worst_class_accuracy"] == pytest.approx(metrics.recall_score(LABELS, answers, average=None).min())
    assert point["macro_f1"] == pytest.approx(metrics.f1_score(LABELS, answers, average="macro"))
    assert point["brier"] == pytest.approx(
        sum(
            metrics.brier_score_loss(of_class, p)
            for of_class, p in zip(ONE_HOT.T, probabilities(LOGITS).T, strict=True)
        )
        / 2,
        rel=1e-5,
    )
    for k in (2, 3):
        assert claim_of(f"top{k}_accuracy").point == pytest.approx(metrics.top_k_accuracy_score(LABELS, LOGITS, k=k))
    groups = [(answers == LABELS)[OUTPUTS.groups == g].mean() for g in range(3)]
    assert point["worst_group_accuracy"] == pytest.approx(min(groups))


def test_bounds_agree_with_hand_computation():
    hits = LOGITS.argmax(1) == LABELS
    assert claim_of("accuracy").lower_bound == clopper_pearson_lower(hits.sum(), 400, confidence=0.9)
    top = in_top_k(LOGITS, LABELS, 2).sum()
    assert claim_of("top2_accuracy").lower_bound == clopper_pearson_lower(top, 400, confidence=0.9)
    worst = min(clopper_pearson_lower(hits[of_class].sum(), of_class.sum(), confidence=0.9) for of_class in ONE_HOT.T)
    assert claim_of("worst_class_accuracy").lower_bound == worst
    paid = COSTS[LABELS, LOGITS.argmax(1)]
    claim = claim_of("cost")
    assert claim.point == pytest.approx(paid.mean())
    assert claim.upper_bound == mean_upper(paid, -1, 9, confidence=0.9)
    for costs in (None, COSTS[:4]):
        with pytest.raises(ValueError, match="needs costs"):
            claim_of("cost", costs=costs)


def test_accuracy_drop_agrees_with_hand_computation():
    # of 100: both right 80, only the teacher 10, only the student 4, neither 6
    labels = np.zeros(100, int)
    teacher = np.eye(2)[np.repeat([0, 0, 1, 1], [80, 10, 4, 6])]
    student = np.eye(2)[np.repeat([0, 1, 0, 1], [80, 10, 4, 6])]
    claim = claim_of("drop(accuracy)", Outputs(student, labels, {"logits": teacher}))
    assert (claim.point, claim.lower_bound, claim.n) == (pytest.approx(0.06), None, 100)
    lost = stats.binomtest(10, 100, alternative="less").proportion_ci(0.95, method="exact").high
    won = stats.binomtest(4, 100, alternative="greater").proportion_ci(0.95, method="exact").low
    assert claim.upper_bound == pytest.approx(lost - won, rel=1e-6)
    # of the two greatest of two logits the label is always one
    assert claim_of("drop(top2_accuracy)", Outputs(student, labels, {"logits": teacher})).point == 0
    with pytest.raises(ValueError, match="needs the teacher"):
        claim_of("drop(accuracy)", Outputs(student, labels))


def test_bound_of_the_accuracy_drop_covers_the_truth():
    rng = np.random.default_rng(0)
    draws = rng.choice(4, p=[0.85, 0.07, 0.03, 0.05], size=(400, 500))  # both right, lost, won, both wrong
    labels = np.zeros(500, int)
    bounds = [
        claim_of(
            "drop(accuracy)", Outputs(np.eye(2)[row % 2], labels, {"logits": np.eye(2)[row // 2]}), 0.95
        ).upper_bound
        for row in draws
    ]
    assert (np.array(bounds) < 0.04).mean() <= 0.08  # 0.05 and 2.8 standard errors


def test_worst_class_agrees_with_hand_computation():
    labels, answers = np.repeat([0, 1], [10, 20]), np.repeat([0, 1, 1, 0], [9, 1, 15, 5])
    claim = claim_of("worst_class_accuracy", Outputs(np.eye(2)[answers], labels))
    assert (claim.point, claim.n) == (0.75, 10)
    assert claim.lower_bound == min(clopper_pearson_lower(k, n, confidence=0.9) for k, n in ((9, 10), (15, 20)))
    absent = claim_of("worst_class_accuracy", Outputs(np.eye(3)[answers], labels))
    assert (absent.point, absent.lower_bound, absent.n) == (0.75, 0, 0)


def test_bound_of_the_worst_class_covers_the_truth():
    """Ten classes, the worst with 80 %: the bound exceeds that in at most 5 % of splits, however close the others are."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 60)
    for others in (0.8, 0.82, 0.99):
        truth = np.array([0.8, *[others] * 9])
        bounds = []
        for _ in range(400):
            answers = np.where(rng.random(600) < truth[labels], labels, (labels + 1) % 10)
            bounds.append(claim_of("worst_class_accuracy", Outputs(np.eye(10)[answers], labels), 0.95).lower_bound)
        assert (np.array(bounds) > 0.8).mean() <= 0.08  # 0.05 and 2.8 standard errors


def test_worst_group_needs_groups():
    for groups in (None, np.full(400, -1)):
        with pytest.raises(InputError, match=r"needs groups; .*: guard worst_class_accuracy"):
            claim_of("worst_group_accuracy", OUTPUTS._replace(groups=groups))
    some = OUTPUTS._replace(groups=np.where(LABELS < 2, 0, -1))
    assert claim_of("worst_group_accuracy", some._replace(num_groups=1)).n == (LABELS < 2).sum()
    absent = claim_of("worst_group_accuracy", some._replace(num_groups=2))
    assert (absent.n, absent.lower_bound) == (0, 0)
    with pytest.raises(ValueError, match="pass num_groups="):
        claim_of("worst_group_accuracy", OUTPUTS._replace(num_groups=2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_without_a_prediction_count_against_the_student(bad):
    """One class, always right except for logits without a prediction: nan or +inf somewhere, or -inf everywhere."""
    labels, logits = np.zeros(100, int), np.tile([9.0, 0.0], (100, 1))
    logits[:20] = bad
    teacher = np.tile([9.0, 0.0], (100, 1))
    outputs = Outputs(logits, labels, {"logits": teacher}, labels, 1)
    assert (predicted_class(logits)[:20] == -1).all()
    expected = {"accuracy": 0.8, "agreement": 0.8, "worst_class_accuracy": 0.8, "worst_group_accuracy": 0.8,
                "balanced_accuracy": 0.8, "macro_f1": 8 / 9 / 2, "brier": 0.2, "top2_accuracy": 0.8,
                "drop(accuracy)": 0.2, "cost": 0.6}  # fmt: skip
    costs = np.array([[0.0, 3.0], [1.0, 0.0]])
    points = {name: claim_of(name, outputs, costs=costs).point for name in (*expected, "ece")}
    assert points == pytest.approx(expected | {"ece": 0.2}, abs=2e-4)
    # no student agrees with a teacher that predicts no class, not even one that predicts none either
    assert claim_of("agreement", outputs._replace(teacher={"logits": logits})).point == 0.8
    assert claim_of("drop(accuracy)", outputs._replace(teacher={"logits": logits})).point == 0


def test_one_nan_or_inf_voids_a_prediction_but_minus_inf_does_not():
    logits = np.array([[5.0, np.nan], [5.0, np.inf], [5.0, -np.inf]])
    assert predicted_class(logits).tolist() == [-1, -1, 0]
    assert probabilities(logits)[2].tolist() == [1, 0]


def test_ties_go_to_the_first_classes():
    logits = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    for label, k, hit in ((0, 1, [1, 0]), (1, 1, [0, 1]), (1, 2, [1, 1]), (2, 2, [0, 1]), (0, 3, [1, 1])):
        assert in_top_k(logits, np.full(2, label), k).tolist() == [bool(x) for x in hit]


def test_metrics_of_labels_use_labeled_examples_only():
    labels = np.where(np.arange(400) < 300, LABELS, -1)
    some = OUTPUTS._replace(targets=labels)
    first = Outputs(LOGITS[:300], LABELS[:300], {"logits": TEACHER[:300]}, OUTPUTS.groups[:300], 3)
    for metric in (*SINGLE, *FAMILIES):
        if metric != "agreement":
            assert claim_of(metric, some) == claim_of(metric, first)
    assert claim_of("agreement", some).n == 400
    with pytest.raises(InputError, match="needs labeled examples"):
        claim_of("ece", OUTPUTS._replace(targets=np.full(400, -1)))


def test_scale_of_logits_changes_calibration_but_not_accuracy():
    """Twice the logits are the true log-odds, twenty times are overconfident; the predictions are the same."""
    sure = OUTPUTS._replace(student=20 * LOGITS)
    assert claim_of("accuracy", sure) == claim_of("accuracy")
    calibrated = OUTPUTS._replace(student=2 * LOGITS)
    assert claim_of("ece", calibrated).point < 0.1 < 0.17 < min(claim_of("ece").point, claim_of("ece", sure).point)
    assert claim_of("brier", calibrated).point < min(claim_of("brier").point, claim_of("brier", sure).point)
    huge = OUTPUTS._replace(student=np.float32(1e30) * LOGITS)
    wrong = 1 - claim_of("accuracy").point
    assert claim_of("ece", huge).point == pytest.approx(wrong)
    assert claim_of("brier", huge).point == pytest.approx(wrong)


def test_bound_of_latency_is_an_order_statistic():
    claim = median_bound("latency_ms", np.arange(1.0, 102))(0.95)
    assert (claim.metric, claim.point, claim.n, claim.lower_bound) == ("latency_ms", 51, 101, None)
    assert claim.upper_bound == 60  # P[Binomial(101, 1/2) >= 60] = 0.037, >= 59 is 0.057


# Metrics that are user functions.

OWN = """
import numpy as np

LIMIT = 3


def near(logits, labels):
    return 1 - np.abs(logits.argmax(1) - labels) / 4


def greedy(logits, labels):
    return 2 * (logits.argmax(1) == labels)


def one(logits, labels):
    return 1.0


def ranks(logits, labels):
    return logits.max(1).argsort().argsort() / len(logits)


def broken(logits, labels):
    return logits / labels.missing
"""


@pytest.fixture
def user_metrics(here):
    (here / "own_metric.py").write_text(OWN)


def test_user_metric_agrees_with_hand_computation(user_metrics):
    expected = 1 - np.abs(LOGITS.argmax(1) - LABELS) / 4
    claim = claim_of("own_metric:near")
    assert claim.point == pytest.approx(expected.mean())
    assert claim.lower_bound == mean_lower(expected, 0, 1, confidence=0.9)
    without_prediction = LOGITS.copy()
    without_prediction[0] = np.nan
    assert claim_of("own_metric:near", OUTPUTS._replace(student=without_prediction)).point == pytest.approx(
        (expected.sum() - expected[0]) / 400
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_metric:far", r"importable MODULE:FUNCTION; got 'own_metric:far', which fails with AttributeError"),
        ("no_such_metric:near", r"fails with ModuleNotFoundError"),
        ("own_metric:LIMIT", r"MODULE:FUNCTION; got .own_metric:LIMIT., which is of type int"),
        ("own_metric:greedy", r"scores of a metric must lie in \[0, 1\]; own_metric:greedy returns 2: rescale"),
        ("own_metric:one", r"must return scores \[N\], here \[400\]; own_metric:one returns \[\]"),
        ("own_metric:ranks", r"independently of the others; own_metric:ranks scores the first 200 of 400"),
        ("own_metric:broken", r"own_metric:broken fails with AttributeError: .*missing"),
    ],
)
def test_unusable_user_metrics_are_rejected(user_metrics, name, message):
    with pytest.raises(InputError, match=message):
        claim_of(name)


def test_function_named_imports_from_the_working_directory(user_metrics):
    assert function_named("own_metric:near")(LOGITS, LABELS).shape == (400,)


# Costs.


def test_read_costs(here):
    (here / "costs.csv").write_text("0,1\n2.5,-1\n")
    assert read_costs("costs.csv", 2).tolist() == [[0, 1], [2.5, -1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("0,1\n2,x\n", "cannot be read"),
        ("0,1\n", r"2 x 2; costs.csv has 1 x 2: fix it"),
        ("0,1\nnan,0\n", r"costs.csv has 2 x 2, not finite: fix it"),
    ],
)
def test_unusable_costs_are_rejected(here, content, message):
    if content is not None:
        (here / "costs.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_costs(here / "costs.csv" if content is None else "costs.csv", 2)


def test_bound_of_latency_is_infinite_for_few_passes():
    assert median_bound("latency_ms", np.ones(4))(0.95).upper_bound == math.inf
    assert median_bound("latency_ms", np.ones(5))(0.95).upper_bound == 1


# Precision and recall of one class.

ANSWERS = np.repeat([0, 1, 1, 0, 2], [9, 1, 15, 5, 2])  # predictions
TRUTH = np.repeat([0, 0, 1, 1, 1], [9, 1, 15, 5, 2])  # labels: class 0 has 10 examples, class 1 has 22
OF_CLASSES = Outputs(np.eye(4)[ANSWERS], TRUTH)


@pytest.mark.parametrize(
    ("metric", "hits", "n"),
    [
        ("recall(0)", 9, 10),
        ("recall(1)", 15, 22),
        ("precision(0)", 9, 14),
        ("precision(1)", 15, 16),
        ("precision(2)", 0, 2),
    ],
)
def test_precision_and_recall_agree_with_hand_computation(metric, hits, n):
    claim = claim_of(metric, OF_CLASSES)
    assert (claim.metric, claim.point, claim.n) == (metric, hits / n, n)
    assert claim.lower_bound == clopper_pearson_lower(hits, n, confidence=0.9)


def test_precision_and_recall_agree_with_scikit_learn():
    from sklearn import metrics

    answers = LOGITS.argmax(1)
    for k in range(5):
        assert claim_of(f"recall({k})").point == pytest.approx(metrics.recall_score(k == LABELS, answers == k))
        assert claim_of(f"precision({k})").point == pytest.approx(metrics.precision_score(k == LABELS, answers == k))


def test_bound_is_zero_for_a_class_that_never_occurs_or_is_never_predicted():
    for metric in ("recall(2)", "recall(3)", "precision(3)"):
        claim = claim_of(metric, OF_CLASSES)
        assert (claim.point, claim.lower_bound, claim.n) == (0, 0, 0)


def test_class_name_takes_precedence_over_class_number():
    names = ("cat", "0", "wild dog", "x")
    assert claim_of("recall(cat)", OF_CLASSES, class_names=names).n == 10
    assert claim_of("recall(0)", OF_CLASSES, class_names=names).n == 22
    assert claim_of("precision(wild dog)", OF_CLASSES, class_names=names).n == 2
    assert claim_of("precision(1)", OF_CLASSES, class_names=names).n == 16
    for argument in ("bird", "4", "-1", "1.0"):
        with pytest.raises(
            InputError, match=rf"needs a class .* got '{argument}': use one of cat, 0, wild dog, x, or a"
        ):
            claim_of(f"recall({argument})", OF_CLASSES, class_names=names)


def test_examples_without_prediction_or_label_do_not_count_for_precision():
    logits, labels = np.eye(2)[[0, 0, 1, 0]], np.array([0, 0, 0, -1])
    logits[0] = np.nan
    claim = claim_of("precision(0)", Outputs(logits, labels))
    assert (claim.point, claim.n) == (1, 1)
    assert claim_of("recall(0)", Outputs(logits, labels)).point == pytest.approx(1 / 3)


def test_bounds_of_precision_and_recall_cover_the_truth():
    """40 examples, about 8 of the class and 9 predicted as it: both denominators are random, and often small."""
    rng = np.random.default_rng(0)
    joint = np.array([0.14, 0.06, 0.08, 0.72])  # of the class and predicted so, missed, false alarm, neither
    truth = {"recall(1)": 0.14 / 0.20, "precision(1)": 0.14 / 0.22}
    above = dict.fromkeys(truth, 0)
    for draw in rng.choice(4, p=joint, size=(2000, 40)):
        outputs = Outputs(np.eye(2)[np.isin(draw, (0, 2)).astype(int)], (draw < 2).astype(int))
        for metric, value in truth.items():
            above[metric] += claim_of(metric, outputs, 0.9).lower_bound > value
    assert all(count <= stats.binom.isf(0.001, 2000, 0.1) for count in above.values()), above
    assert all(count >= 0.03 * 2000 for count in above.values()), above  # and is not needlessly loose
