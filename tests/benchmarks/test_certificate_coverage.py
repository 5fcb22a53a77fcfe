"""The coverage suite: each example has one split, promises are judged by the others, a broken certificate is detected."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ev3_distill import benchmarks
from ev3_distill.benchmarks import certificate_coverage, datasets
from ev3_distill.errors import InputError
from ev3_distill.training.trainer import Distillation

SIZES = {"explore": 5, "assess": 3, "sealed": 2}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Two runs per seed with one compiled program, and a small teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(certificate_coverage.RUNS, "smoke", 2)
        patch.setitem(certificate_coverage.ARMS, "smoke", (("ce",),))
        patch.setattr(certificate_coverage, "TEACHER", "mlp:hidden=32")
        yield
    certificate_coverage._population.cache_clear()


@pytest.fixture(scope="module")
def population_and_seen(small):
    """The population that runs share, and the inputs of the three splits that the teacher was trained on."""
    seen, complete = [], Distillation.complete

    def recording(self, pools, *args, **kwargs):
        seen.extend([pools.explore.examples.inputs, pools.assess.inputs, pools.decide.inputs])
        return complete(self, pools, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "complete", recording)
        certificate_coverage._population.cache_clear()
        return certificate_coverage._population("smoke"), seen


def test_each_example_is_assigned_to_one_split():
    dealt = certificate_coverage.deal(30, SIZES, "truth", np.random.default_rng([0, 1]))
    assert {name: len(rows) for name, rows in dealt.items()} == {**SIZES, "truth": 20}
    assert sorted(np.concatenate(list(dealt.values()))) == list(range(30))


def test_assignment_depends_on_seed_and_run_and_is_uniform():
    def sealed(*key):
        return tuple(certificate_coverage.deal(30, SIZES, "truth", np.random.default_rng(key))["sealed"])

    assert sealed(0, 1) == sealed(0, 1) != sealed(1, 0)
    counts = np.bincount([row for run in range(1500) for row in sealed(0, run)], minlength=30)
    assert abs(counts - 100).max() < 50  # 5 standard deviations


def test_runs_never_see_the_teachers_training_examples(population_and_seen):
    population, seen = population_and_seen
    own = {image.tobytes() for split in seen for image in np.asarray(split)}
    others = {image.tobytes() for image in population.inputs}
    assert (len(own), len(others), own & others) == (400, 1397, set())
    assert 0.6 < (population.teacher.argmax(axis=1) == population.labels).mean() < 1


def test_best_validation_score_is_that_of_the_first_best_student_on_assess():
    def state(iteration):
        current = SimpleNamespace(variables=f"student {iteration}")
        return SimpleNamespace(current=current, clock=SimpleNamespace(iteration=iteration))

    scores = [0.5, 0.75, 0.25, 0.75, 0.5]
    run = SimpleNamespace(
        begin=lambda pools, seed: SimpleNamespace(current=SimpleNamespace(variables="initial")),
        run=lambda pools, start, budget: (
            (state(i), SimpleNamespace(current_score=np.float32(score))) for i, score in enumerate(scores)
        ),
        evaluator=SimpleNamespace(select=lambda pools, state: ("champion", f"champion at {state.clock.iteration}")),
    )
    pools = SimpleNamespace(assess=SimpleNamespace(index=np.zeros(8)))
    ended = certificate_coverage._train(run, pools, 0, 100)
    assert ended == ("champion", "champion at 4", 4, "student 1", 6)


def test_promises_instead_of_a_certificate():
    accuracy = {"metric": "accuracy", "point": 0.9, "lower_bound": 0.8, "truth": 0.85}
    best, bounded, sealed = certificate_coverage.instead(6, 8, 0.7, accuracy)
    assert (best["lower_bound"], best["truth"]) == (0.75, 0.7)
    assert bounded["lower_bound"] == pytest.approx(0.4003, abs=1e-4)  # P[Bin(8, .4003) >= 6] = .05
    assert bounded["truth"] == 0.7
    assert (sealed["lower_bound"], sealed["truth"]) == (0.9, 0.85)


def test_truth_matches_a_hand_computation():
    predicted, teacher, labels = [0, 0, 1, 1, 2, 0], [0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]
    answers = certificate_coverage.Predictions(np.eye(3)[predicted], np.eye(3)[teacher], np.array(labels))
    assert certificate_coverage._truth(answers) == pytest.approx(
        {"accuracy": 5 / 6, "agreement": 4 / 6, "worst_class_accuracy": 0.5, "drop(accuracy)": 0}
    )


@pytest.fixture(scope="module")
def population():
    """8,000 examples: a teacher with 95 % accuracy, and a student with 90 %, with 80 % in one class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=8000)

    def logits(right):
        predicted = np.where(rng.random(len(labels)) < right, labels, (labels + rng.integers(1, 10, len(labels))) % 10)
        return np.eye(10, dtype=np.float32)[predicted]

    return certificate_coverage.Predictions(logits(np.where(labels == 3, 0.8, 0.91)), logits(0.95), labels)


def _rows(population, runs=150):
    """Rows of runs that all deliver the same student."""
    rows, sizes = [], {"sealed": 500}
    for run in range(runs):
        dealt = certificate_coverage.deal(len(population.labels), sizes, "truth", np.random.default_rng([1, run]))
        sealed, truth = (certificate_coverage.Predictions(*(x[rows_] for x in population)) for rows_ in dealt.values())
        claims = certificate_coverage.promised(sealed, truth)
        rows.append({"sealed": 500, "truth": 7500, "claims": claims, "instead": []})
    return rows


def _verdict(rows):
    return certificate_coverage.table(rows).rpartition(": ")[2]


def test_sound_certificate_is_confirmed(population):
    assert _verdict(_rows(population)) == "held."


def test_bounds_that_are_two_points_too_high_are_detected(population, monkeypatch):
    sound = certificate_coverage._certified

    def broken(sealed):
        return [
            claim | {"lower_bound": claim["lower_bound"] + 0.02} if "lower_bound" in claim else claim
            for claim in sound(sealed)
        ]

    monkeypatch.setattr(certificate_coverage, "_certified", broken)
    assert _verdict(_rows(population)) == "missed."


@pytest.mark.parametrize("metric", certificate_coverage.CLAIMS)
def test_one_false_claim_fails_the_suite(population, metric):
    """Whatever the other claims say."""
    rows = _rows(population, runs=5)
    for row in rows:
        (claim,) = (claim for claim in row["claims"] if claim["metric"] == metric)
        claim["truth"] += 0.3 if "upper_bound" in claim else -0.3
    assert _verdict(rows) == "missed."


@pytest.mark.parametrize(
    ("held", "trials", "text"),
    [
        (286, 300, "held"),  # the lower limit is 92.3 %
        (285, 300, "held, but the interval reaches below"),  # 91.9 %
        (284, 300, "missed"),
        (20, 20, "held, but the interval reaches below"),
    ],
)
def test_verdict_compares_coverage_with_its_limit(held, trials, text):
    assert certificate_coverage.verdict(certificate_coverage.statistics.proportion(held, trials)) == text


def test_table_pools_promises_over_runs():
    def row(accuracy, drop, score):
        return {
            "sealed": 500,
            "truth": 60_000,
            "claims": [
                {"metric": "accuracy", "point": 0.9, "lower_bound": 0.875, "n": 500, "truth": accuracy},
                {"metric": "drop(accuracy)", "point": 0.0, "upper_bound": 0.0625, "n": 500, "truth": drop},
            ],
            "instead": [{"metric": "best validation score", "lower_bound": score, "truth": accuracy}],
        }

    text = certificate_coverage.table([row(0.875, 0.0, 0.9375), row(0.9375, 0.125, 0.9375), row(0.75, 0.125, 0.75)])
    assert "| `accuracy` | 66.7 (9.4 to 99.2) | 2.08 ± " in text and " | 12.50 |" in text  # 0, -6.25 and 12.5
    assert "| `drop(accuracy)` | 33.3 (0.8 to 90.6) | 2.08 ± " in text and " | 6.25 |" in text  # -6.25, 6.25 and 6.25
    assert "| all claims together | 33.3 (0.8 to 90.6) |  |  |" in text
    assert "| best validation score | 66.7 (9.4 to 99.2) | 2.08 ± " in text  # 6.25, 0 and 0
    assert "Of 3 runs, each certified on 500 examples, with the truth on 60,000 others" in text
    assert "(accuracies from 75.0 to 93.8 %)" in text
    assert text.endswith("with a lower limit of at least 92 %: missed.")


def test_resumed_suite_has_the_same_rows_table_and_plot(population_and_seen, tmp_path, capsys):
    benchmarks.run_suite("coverage", seeds=2, size="smoke", out=tmp_path)
    path = tmp_path / "rows.jsonl"
    head, *lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [(row["seed"], row["run"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all([claim["metric"] for claim in row["claims"]] == list(certificate_coverage.CLAIMS) for row in rows)
    assert all(row["truth"] == 1797 - 400 - 400 - 3 * 150 for row in rows)
    assert all(60 <= row["budget"] <= 150 for row in rows)
    assert len({row["claims"][0]["truth"] for row in rows}) == 4
    printed = capsys.readouterr().out
    drawn = (tmp_path / "plot.svg").read_bytes()
    assert b"<svg" in drawn
    path.write_text("".join([head, *lines[:2], lines[3]]))
    benchmarks.run_suite("coverage", seeds=2, size="smoke", out=tmp_path)
    *_, last = path.read_text().splitlines(keepends=True)
    assert last == lines[2]  # the same run
    assert capsys.readouterr().out == printed
    assert (tmp_path / "plot.svg").read_bytes() == drawn
    assert (
        list(certificate_coverage.collect(seeds=2, size="smoke", done=[(s, r) for s in range(2) for r in range(2)]))
        == []
    )


def test_promises_are_about_the_delivered_student(population_and_seen):
    """Repeats the run from its seed."""
    (row,) = certificate_coverage.collect(seeds=1, size="smoke", done=[(0, 1)])
    population, _ = population_and_seen
    rng = np.random.default_rng([0, 0])
    rng.integers(1), rng.integers(1), rng.uniform()  # student, arms, budget
    seed = int(rng.integers(2**31))
    dealt = certificate_coverage.deal(len(population.labels), certificate_coverage.SPLIT_SIZES["smoke"], "truth", rng)
    network, _ = certificate_coverage._network("mlp:hidden=8", (8, 8, 1), 10)
    distillation = certificate_coverage._distillation("mlp:hidden=8", ("ce",), (8, 8, 1), 10)
    pools = certificate_coverage._pools(population, dealt, seed)
    assert np.array_equal(pools.decide.index, dealt["decide"])
    which, variables = distillation.evaluator.select(pools, distillation.complete(pools, seed, budget=row["budget"]))
    right = {}
    for name in ("sealed", "truth"):
        logits = jax.jit(lambda x: network.apply(variables, x, train=False)[0])(population.inputs[dealt[name]])
        right[name] = float(np.mean(np.argmax(logits, axis=1) == population.labels[dealt[name]]))
    assert row["which"] == which
    accuracy = row["claims"][0]
    assert (accuracy["point"], accuracy["truth"]) == pytest.approx((right["sealed"], right["truth"]))
    assert accuracy["lower_bound"] < right["sealed"]


def test_full_size_without_mnist_is_an_input_error(monkeypatch):
    monkeypatch.setattr(datasets, "source_of", lambda name: None)
    with pytest.raises(InputError, match=r"needs mnist\.npz"):
        list(certificate_coverage.collect(seeds=1, size="full"))
