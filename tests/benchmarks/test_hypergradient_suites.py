"""The suites on hypergradients, rotation, tuning and example weights: their measurements and their tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ev3_distill.benchmarks import (
    example_weights,
    hypergradient_cost,
    hypergradient_methods,
    hypergradient_one_dimension,
    problems,
    rotation_angle,
    tuned_arm,
)
from ev3_distill.data.sources import load_data


@pytest.fixture(scope="module")
def one_dimensional():
    return list(hypergradient_one_dimension.collect(seeds=1, size="smoke", done=[]))


def test_exact_methods_match_the_true_hypergradient_in_one_dimension(one_dimensional):
    names = [row["contender"] for row in one_dimensional]
    done = [("one dimension", name, 0) for name in names] + [("trajectory", "K = 2", 0), ("trajectory", "K = 10", 0)]
    assert list(hypergradient_one_dimension.collect(seeds=1, size="smoke", done=done)) == []
    lams = hypergradient_one_dimension.LAMBDAS
    for name in names:
        if "Newton" in name or "steps" in name:
            mean, std, n = hypergradient_one_dimension.moments(one_dimensional, name)
            np.testing.assert_allclose(
                mean, hypergradient_one_dimension.truth(lams), atol=2e-3 if "guided" in name else 1e-4
            )
            assert std.max() < 1e-3 and n == 4
    text = hypergradient_one_dimension.table(one_dimensional)
    assert "| jvp at x*, Newton's rate | 0.00" in text and "4 trials at each of 20 lambdas" in text
    paths = next(row for row in one_dimensional if row["question"] == "trajectory")
    assert np.shape(paths["evograd"]) == np.shape(paths["truth"]) == (5, 6, 2)
    assert paths["truth"][0][0] == paths["evograd"][0][0] == pytest.approx((-1.8, 0.2))


def test_closed_form_equals_its_integral_by_quadrature():
    """Over x from N(0, 1): -(1 / tau) <v, covariance of copy and slope> under Gaussian weights, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    for lam in (0.1, 1.0, 2.0):
        precision = 5 + 4 * lam
        mean = (4 + nodes) / precision
        slope = -2 * 2 * (mean - 0.5) * 2 * mean / precision  # cov(x, x^2) = 2 mean variance
        np.testing.assert_allclose(
            weights @ slope / weights.sum(), hypergradient_one_dimension.closed_form(lam), rtol=1e-9
        )


def rows_of_costs():
    times = dict.fromkeys(["plain KD", "jvp", hypergradient_cost.REVERSE], 0.1)
    steps = {
        f"{hypergradient_cost.EVERY} steps of plain KD": 0.5,
        f"{hypergradient_cost.EVERY} steps of tuned KD": 0.65,
    }
    sizes = dict.fromkeys(["plain KD", "guided", hypergradient_cost.FEW, "mixed mode"], 10 * 2**20)
    sizes |= {"jvp": 11 * 2**20, hypergradient_cost.MANY: 2**24, hypergradient_cost.REVERSE: 30 * 2**20}
    return [
        {"question": "memory", "contender": "resnet8", "seed": 0, "params": 1000, "temporary": sizes},
        *({"question": "time", "contender": "resnet8", "seed": i, "seconds": times | steps} for i in range(3)),
        *(
            {
                "question": "cosine", "contender": "10 steps", "seed": i,
                "cosine": {"jvp": 1.0, "guided": 0.98, "evograd, K = 2": 0.01},
                "weights": {"jvp": 1.0, "guided": 0.97, "evograd, K = 2": 0.001},
                "ratio": {"jvp": 1.0, "guided": 1.1, "evograd, K = 2": 90.0},
            } for i in range(2)
        ),
    ]  # fmt: skip


def test_table_compares_methods_with_their_targets(one_dimensional):
    rows = one_dimensional + rows_of_costs()
    text = hypergradient_methods.table(rows)
    assert "jvp / plain KD: 1.10, target ≤ 1.15: held" in text
    assert "jvp / reverse over reverse: 0.37, target ≤ 0.5: held" in text
    assert "evograd, K = 64 / evograd, K = 2: 1.60, target ≤ 1.05: missed" in text
    assert "jvp / reverse over reverse: 1.00 (1.00 to 1.00), target ≤ 0.7: missed" in text
    assert "5 steps of tuned KD / 5 steps of plain KD: 1.30 (1.30 to 1.30), target ≤ 1.4: held" in text
    assert "jvp: least 1.00000, target ≥ 0.999: held; guided: least 0.98000, target ≥ 0.99: missed" in text
    assert len(hypergradient_methods.plot(rows).axes) == 9


def test_rotation_matches_pillow_and_has_a_derivative():
    rng = np.random.default_rng(0)
    image = np.asarray(
        Image.fromarray(rng.integers(0, 256, (7, 7), np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)
    )
    turned = rotation_angle.rotate(jnp.asarray(image, jnp.float32)[None], jnp.radians(30.0))[0]
    want = np.asarray(Image.fromarray(image).rotate(30, Image.Resampling.BILINEAR), float)
    inside = np.hypot(*np.meshgrid(*[np.arange(28) - 13.5] * 2)) < 12
    assert np.abs(turned - want)[inside].max() < 1.5
    still = rotation_angle.rotate(jnp.asarray(image, jnp.float32)[None], jnp.float32(0))[0]
    np.testing.assert_allclose(still, image, atol=1e-3)
    slope = jax.jvp(lambda a: rotation_angle.rotate(jnp.asarray(image, jnp.float32)[None], a).sum(), (0.5,), (1.0,))[1]
    assert jnp.isfinite(slope)


def test_rotation_table_judges_angle_and_accuracy():
    rows = [
        {"contender": name, "seed": i, "angle": angle, "last": angle, "accuracy": right, "path": [0.0, angle]}
        for name, angle, right in (("plain", 0.0, 0.82), ("carried", 29.5, 0.982))
        for i in range(2)
    ]
    text = rotation_angle.table(rows)
    assert "| carried | 29.50 ± 0.00 | 29.50 ± 0.00 | 98.20 ± 0.00 |" in text
    assert "30 ± 2 degrees with a spread of at most 2: held; at least 98.1 %: held" in text
    assert rotation_angle.table([]) == "MNIST is missing."
    assert len(rotation_angle.plot(rows).axes) == 1


def test_tuning_table_pairs_gains_over_the_best_cell():
    rows = [
        {"data": "mnist", "contender": name, "seed": i, "assess": right, "accuracy": right + 0.001 * i}
        for name, right in (
            *((tuned_arm._cell(cell), 0.94 if cell == (4.0, 0.9) else 0.9) for cell in tuned_arm.cells("full")),
            ("default, longer", 0.95),
        )
        for i in range(3)
    ]
    for start in tuned_arm.STARTS:
        for name in (tuned_arm._from(start), f"frozen, {tuned_arm._from(start)}"):
            found = {"temperature": 3.0, "mix": 0.6}
            rows += [
                {"data": "mnist", "contender": name, "seed": i, "assess": 0, "accuracy": 0.939 + 0.001 * i, **found}
                for i in range(3)
            ]
    text = tuned_arm.table(rows)
    assert text.startswith("**mnist**, 3 seeds") and text.count("**") == 2
    assert "the best cell (T = 4, mix 0.9)" in text
    assert "-0.10 (-0.10 to -0.10) over the best cell (T = 4, mix 0.9)" in text
    assert "Target ≥ -0.2 over the best cell: held" in text
    assert "temperature 3.00, mix 0.60" in text


def test_labels_are_flipped_to_two_classes_with_the_documented_rate():
    """Two of five labels are wrong, and each class is mistaken for two others, evenly."""
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 10, 20_000), jnp.int32)
    flipped = np.asarray(example_weights.flip(labels, 3))
    wrong = flipped != labels
    np.testing.assert_allclose(wrong.mean(), 0.4, atol=0.02)
    for label in range(10):
        taken, counts = np.unique(flipped[wrong & (labels == label)], return_counts=True)
        assert len(taken) == 2 and label not in taken and abs(counts[0] / counts.sum() - 0.5) < 0.07
    assert (flipped == example_weights.flip(labels, 3)).all() and (flipped != example_weights.flip(labels, 4)).any()


def test_misled_teacher_takes_three_classes_for_the_next():
    labels = jnp.arange(10)
    says = 9 * jnp.eye(10)[None] + jnp.arange(10.0)  # [V, N, K]: right, with a second-best class
    misled = example_weights.mislead(says, labels)
    wanted = [label + 1 if label in example_weights.MISLED else label for label in range(10)]
    assert misled[0].argmax(-1).tolist() == wanted
    np.testing.assert_array_equal(jnp.sort(misled, -1), jnp.sort(says, -1))  # the same values
    sound = np.setdiff1d(np.arange(10), example_weights.MISLED)
    np.testing.assert_array_equal(misled[0, sound], says[0, sound])


def test_auroc_matches_hand_computed_values():
    positive = np.array([True, True, False, False])
    assert example_weights.auroc(np.array([4.0, 3.0, 2.0, 1.0]), positive) == 1
    assert example_weights.auroc(np.array([1.0, 2.0, 3.0, 4.0]), positive) == 0
    assert example_weights.auroc(np.array([3.0, 1.0, 2.0, 0.0]), positive) == 0.75
    assert example_weights.auroc(np.ones(4), positive) == 0.5


def test_example_weights_measure_every_missing_contender(monkeypatch):
    subject = example_weights.SUBJECTS["smoke"]._replace(steps=20)
    monkeypatch.setitem(example_weights.SUBJECTS, "smoke", subject)
    digits = load_data("digits")
    says = 6 * np.eye(10, dtype=np.float32)[digits.labels]
    monkeypatch.setattr(problems, "problem", lambda name, cost: (digits, lambda seed: says))
    rows = list(example_weights.collect(seeds=1, size="smoke", done=[("labels", "labels as given, longer", 0)]))
    named = [(row["wrong"], row["contender"]) for row in rows]
    wanted = [(wrong, name) for wrong, names in example_weights.CONTENDERS.items() for name in names]
    assert named == [key for key in wanted if key != ("labels", "labels as given, longer")]
    steps = {row["contender"]: row["steps"] for row in rows}
    assert steps["KD, misled, longer"] == 28 and steps["weights"] == 20
    areas = {key: row.get("auroc") for key, row in zip(named, rows, strict=True)}
    assert areas["teacher", "KD, misled"] == 1  # the teacher's loss on right labels
    assert areas["labels", "right labels"] is None is areas["labels", "known labels alone"]
    assert 0 <= areas["labels", "weights"] <= 1


def test_example_weights_table_pairs_gains_and_judges_auroc():
    def row(wrong, contender, seed, accuracy, **more):
        return {"wrong": wrong, "contender": contender, "seed": seed, "accuracy": accuracy, "steps": 100} | more

    rows = [
        row(wrong, name, seed, 0.9 + 0.01 * (name == "weights") + 0.001 * seed, **({"auroc": 0.89 + 0.01 * seed}))
        for wrong, names in example_weights.CONTENDERS.items()
        for name in names
        for seed in range(3)
    ]
    text = example_weights.table(rows)
    assert "| weights | 91.10 ± 0.25 | 0.900 ± 0.025 | 100 |" in text
    assert "1.00 (1.00 to 1.00) over labels as given (target > 0: held)" in text
    assert "1.00 (1.00 to 1.00) over KD, misled (target > 0: held)" in text
    assert text.count("Their smallest AUROC: 0.890, target ≥ 0.9: missed.") == 2
