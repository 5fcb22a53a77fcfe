"""Goals: scores average to the metric as scikit-learn computes it, their spread is its standard error, p-values are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from ev3_distill.tasks.classification import example_scores
from ev3_distill.tasks.classification.example_scores import top_k
from ev3_distill.tasks.classification.split_scores import BINS
from ev3_distill.tasks.classification.steering import goal
from ev3_distill.tasks.metrics import steers
from ev3_distill.types import Batch

K = 5
STEERING = (
    *("accuracy", "agreement", "balanced_accuracy", "worst_class_accuracy", "macro_f1", "ece", "brier"),
    *("drop(accuracy)", "top2_accuracy", "precision(1)", "recall(3)"),
)
LOWER_IS_BETTER = ("ece", "brier", "drop(accuracy)")


def examples(n=400, seed=0, sharpness=1.5):
    """Logits [N, K] that are often right, and a split with rare classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(K, n, p=[0.4, 0.3, 0.2, 0.06, 0.04])
    hot = np.eye(K)[labels]
    logits, teacher = (sharpness * (hot * 1.5 + rng.normal(size=(n, K))) for _ in range(2))
    index, teacher = jnp.arange(n, dtype=jnp.int32), {"logits": jnp.asarray(teacher, jnp.float32)}
    split = Batch(jnp.zeros((n, 1)), jnp.asarray(labels, jnp.int32), teacher, index, jnp.ones(n))
    return jnp.asarray(logits, jnp.float32), split


def ece(q, hits):
    """Expected calibration error, computed bin by bin in a loop."""
    own_bin = np.minimum((q * BINS).astype(int), BINS - 1)
    return sum(abs((hits - q)[own_bin == b].sum()) for b in range(BINS)) / len(q)


def reference(metric, logits, split):
    """The metric in its own units, by scikit-learn or by a loop."""
    logits, labels, teacher = (
        np.asarray(logits, np.float64),
        np.asarray(split.targets),
        np.asarray(split.teacher["logits"]),
    )
    predicted, q = logits.argmax(1), np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    recalls = metrics.recall_score(labels, predicted, average=None, labels=range(K))
    return {
        "accuracy": lambda: metrics.accuracy_score(labels, predicted),
        "agreement": lambda: metrics.accuracy_score(teacher.argmax(1), predicted),
        "balanced_accuracy": lambda: metrics.balanced_accuracy_score(labels, predicted),
        "worst_class_accuracy": recalls.min,
        "macro_f1": lambda: metrics.f1_score(labels, predicted, average="macro"),
        "ece": lambda: ece(q.max(1), predicted == labels),
        "brier": lambda: ((q - np.eye(K)[labels]) ** 2).sum(1).mean() / 2,
        "drop(accuracy)": lambda: (teacher.argmax(1) == labels).mean() - (predicted == labels).mean(),
        "precision(1)": lambda: metrics.precision_score(labels == 1, predicted == 1),
        "recall(3)": lambda: recalls[3],
        "top2_accuracy": lambda: metrics.top_k_accuracy_score(labels, logits, k=2),
    }[metric]()


@pytest.mark.parametrize("metric", STEERING)
def test_mean_of_the_scores_is_the_metric(metric):
    for seed in range(3):
        logits, split = examples(seed=seed)
        sign = -1 if metric in LOWER_IS_BETTER else 1
        scores = jax.jit(goal(metric, 0.5).score)(logits, split)
        assert scores.shape == split.targets.shape
        assert float(scores.mean()) == pytest.approx(sign * reference(metric, logits, split), abs=2e-5)


@pytest.mark.parametrize("metric", STEERING)
def test_spread_of_the_scores_is_the_standard_error_of_the_metric(metric):
    """Their standard error, against the metric's own spread over 2,000 splits."""
    score = goal(metric, 0.5).score
    whole, split = examples(n=400 * 2000, seed=1)
    pieces = jax.tree.map(lambda x: x.reshape(2000, 400, *x.shape[1:]), (whole, split))
    scores = np.asarray(jax.lax.map(lambda piece: score(*piece), pieces, batch_size=100))
    spread = scores.mean(axis=1).std()
    claimed = np.median(scores.std(axis=1)) / np.sqrt(400)
    if metric in (
        "ece",
        "worst_class_accuracy",
    ):  # a sum of absolute values, a minimum: of a narrower spread than a line's
        assert spread < claimed < 2 * spread
    else:
        assert claimed == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("metric", STEERING)
def test_student_with_nan_logits_meets_no_goal(metric):
    logits, split = examples()
    for broken in (jnp.full_like(logits, jnp.nan), logits.at[3].set(jnp.nan)):
        one = goal(metric, 0.0 if metric not in LOWER_IS_BETTER else 1.0)
        mean = float(one.score(broken, split).mean())
        sound = float(one.score(logits, split).mean())
        # Dropping one example may reduce the calibration error.
        assert np.isnan(mean) or mean <= sound + 1e-6 or metric == "ece"
    assert not float(goal(metric, 0.3).p_value(jnp.full_like(logits, jnp.nan), split)) <= 0.05


def test_focus_is_the_worst_class():
    logits, split = examples()
    hits = np.asarray(example_scores.accuracy(logits, split))
    labels = np.asarray(split.targets)
    worst = min(range(K), key=lambda k: hits[labels == k].mean())
    one = goal("worst_class_accuracy", 0.5)
    assert int(one.focus(logits, split)) == worst
    np.testing.assert_array_equal(one.comparison(logits, split, jnp.int32(worst)), hits)
    np.testing.assert_array_equal(one.strata(logits, split)[0], labels)


@pytest.mark.parametrize(
    ("metric", "hypothesis"),
    [
        ("accuracy", "the accuracy is higher than the champion's"),
        ("drop(accuracy)", "the drop(accuracy) is lower than the champion's"),
        ("worst_class_accuracy", "the accuracy on every class is higher than the champion's on class {focus}"),
        ("macro_f1", "the balanced accuracy is higher than the champion's; macro_f1 itself is not tested"),
        ("ece", "the Brier score is lower than the champion's; ece itself is not tested"),
        (
            "precision(1)",
            "the mean of [predicted] ([label] - 0.5) is higher than the champion's; precision(1) itself is not tested",
        ),
    ],
)
def test_goal_names_the_hypothesis_of_its_test(metric, hypothesis):
    assert goal(metric, 0.5).hypothesis == hypothesis


@pytest.mark.parametrize("metric", STEERING)
def test_every_goal_names_a_hypothesis(metric):
    assert "than the champion's" in goal(metric, 0.5).hypothesis


def test_absent_classes_do_not_count():
    logits, split = examples()
    few = split._replace(targets=jnp.where(split.targets == 4, 0, split.targets))
    hits, labels = np.asarray(example_scores.accuracy(logits, few)), np.asarray(few.targets)
    shares = [hits[labels == k].mean() for k in range(4)]
    assert float(goal("worst_class_accuracy", 0.5).score(logits, few).mean()) == pytest.approx(min(shares), abs=1e-5)
    assert float(goal("balanced_accuracy", 0.5).score(logits, few).mean()) == pytest.approx(np.mean(shares), abs=1e-5)


@pytest.mark.parametrize("least", [0.5, 0.8, 0.9])
def test_p_value_of_a_fraction_is_the_exact_binomial_tail(least):
    logits, split = examples()
    hits = np.asarray(example_scores.accuracy(logits, split))
    p_value = float(goal("accuracy", least).p_value(logits, split))
    assert p_value == pytest.approx(stats.binom.sf(hits.sum() - 1, len(hits), least), rel=1e-3, abs=1e-6)


def test_p_value_of_the_worst_class_is_the_largest_of_all_classes():
    logits, split = examples()
    hits, labels = np.asarray(example_scores.accuracy(logits, split)), np.asarray(split.targets)
    tests = [stats.binom.sf(hits[labels == k].sum() - 1, (labels == k).sum(), 0.4) for k in range(K)]
    assert float(goal("worst_class_accuracy", 0.4).p_value(logits, split)) == pytest.approx(max(tests), rel=1e-3)


@pytest.mark.parametrize("metric", STEERING)
def test_p_value_is_small_for_met_goals_and_large_for_missed_ones(metric):
    logits, split = examples(n=2000, sharpness=2.0)
    value = reference(metric, logits, split)
    easy, hard = (value - 0.15, value + 0.15) if metric not in LOWER_IS_BETTER else (value + 0.15, value - 0.15)
    assert float(goal(metric, easy).p_value(logits, split)) < 0.05
    assert float(goal(metric, hard).p_value(logits, split)) > 0.5


def test_top_1_accuracy_is_accuracy():
    logits, split = examples()
    np.testing.assert_array_equal(top_k(1)(logits, split), example_scores.accuracy(logits, split))
    assert float(top_k(K)(logits, split).mean()) == 1


def test_goal_requires_a_metric_that_training_can_steer():
    assert all(steers(metric) for metric in STEERING)
    assert not any(steers(metric) for metric in ("params", "latency_ms", "topk_accuracy", "accurate"))
    with pytest.raises(ValueError, match=r"a goal needs one of the metrics accuracy, .*; got 'params'"):
        goal("params", 3)


def test_worst_group_agrees_with_hand_computation():
    logits, split = examples()
    groups = np.random.default_rng(1).integers(0, 4, len(split.targets)) * 3  # group numbers may have gaps
    of_groups = split._replace(group=jnp.asarray(groups, jnp.int32))
    hits = np.asarray(example_scores.accuracy(logits, split))
    shares = {g: hits[groups == g].mean() for g in set(groups.tolist())}
    one = goal("worst_group_accuracy", 0.5)
    assert float(one.score(logits, of_groups).mean()) == pytest.approx(min(shares.values()), abs=1e-5)
    assert shares[int(one.focus(logits, of_groups))] == pytest.approx(min(shares.values()))
    tests = [stats.binom.sf(hits[groups == g].sum() - 1, (groups == g).sum(), 0.5) for g in shares]
    assert float(one.p_value(logits, of_groups)) == pytest.approx(max(tests), rel=1e-3)
    with pytest.raises(ValueError, match="the split has none: give the data a column `groups`"):
        one.score(logits, split)


def test_mean_cost_agrees_with_hand_computation():
    logits, split = examples()
    costs = np.random.default_rng(2).uniform(0, 5, (K, K))
    one = goal("cost", 1.5, costs=costs)
    paid = costs[np.asarray(split.targets), np.asarray(logits).argmax(1)]
    np.testing.assert_allclose(one.score(logits, split), -paid, rtol=1e-5)
    assert one.threshold == -1.5
    compared = np.asarray(one.comparison(logits, split, jnp.int32(0)))
    np.testing.assert_allclose(compared, 1 - (paid - costs.min()) / np.ptp(costs), atol=1e-5)
    certain = goal("cost", 1.5, costs=costs).smooth(1e6 * logits, split)
    np.testing.assert_allclose(certain, -paid, rtol=1e-3)
    with pytest.raises(ValueError, match=r"\(cost with its table\); got 'cost'"):
        goal("cost", 1.5)


def test_user_metric_runs_under_jit_and_is_nan_for_broken_logits(tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text(
        "def margin(logits, labels):\n    return (logits[range(len(labels)), labels] > 0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    logits, split = examples()
    one = goal("my_metric:margin", 0.5)
    want = np.asarray(logits)[range(400), np.asarray(split.targets)] > 0
    np.testing.assert_array_equal(jax.jit(one.score)(logits, split), want.astype(np.float32))
    broken = np.asarray(jax.jit(one.score)(logits.at[3, 0].set(jnp.nan), split))
    assert np.isnan(broken[3])
    assert np.isfinite(np.delete(broken, 3)).all()


def test_calibration_error_uses_fifteen_bins():
    """Pairs of a hit and a miss cancel within a bin of width 1/15 and not between two of them."""
    labels = np.array([0, 1])

    def error(*confidences):
        logits = jnp.log(jnp.array([[q, 1 - q] for q in confidences], jnp.float32))
        arrays = {"targets": jnp.asarray(labels), "inputs": None, "teacher": {}, "index": None, "weight": None}
        return -float(goal("ece", 0.1).score(logits, Batch(**arrays)).mean())

    assert error(0.61, 0.65) == pytest.approx((0.65 - 0.39) / 2, abs=1e-5)  # both in (9/15, 10/15)
    assert error(0.65, 0.68) == pytest.approx((0.68 + 0.35) / 2, abs=1e-5)  # in neighboring bins
