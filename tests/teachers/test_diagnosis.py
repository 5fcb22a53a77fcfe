"""Diagnosis names errors in preprocessing and class order; good and weak teachers raise no false alarm."""

import dataclasses
import hashlib
import itertools
import sys
import types
import zlib

import numpy as np
import pytest
from conftest import SHARED

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.teachers import load_teacher
from ev3_distill.teachers.diagnosis.diagnose import _interval, _screens, diagnose
from ev3_distill.teachers.diagnosis.findings import LEVEL, Diagnosis, is_better, p_value
from ev3_distill.teachers.diagnosis.repairs import pairs, repairs

K = 6
NAMES = tuple(f"class {i}" for i in range(K))
RNG = np.random.default_rng(3)
PATTERNS = RNG.random((K, 6, 6, 3)) * np.array([1.0, 0.6, 0.3])  # colors differ, so that their order matters
CENTRE = PATTERNS.mean(axis=0)


def data(n, *, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, n)
    images = np.clip(PATTERNS[labels] + rng.normal(0, noise, (n, 6, 6, 3)), 0, 1)
    return np.rint(images * 255).astype(np.uint8), labels.astype(np.int32)


def nearest(prepared):
    """A teacher that expects (x - 0.5) / 0.25 and saturates: logits are negative squared distances to the patterns."""
    pixels = np.clip(prepared, -2, 2) * 0.25 + 0.5
    return -((pixels[:, None] - PATTERNS[None]) ** 2).sum(axis=(2, 3, 4)) * 3


RIGHT = {"mean": (0.5,), "std": (0.25,)}


@pytest.fixture
def teacher(monkeypatch):
    """Makes a teacher of a function behind a preprocessing."""

    def make(steps=None, function=nearest, shape=(6, 6, 3)):
        module = types.ModuleType("in_memory")
        module.f = function
        monkeypatch.setitem(sys.modules, "in_memory", module)
        options = Preprocessing(**(RIGHT if steps is None else steps))
        return load_teacher(
            "python:in_memory:f", preprocessing=options, input_shape=shape, num_classes=K, class_names=NAMES
        )

    return make


def test_a_good_teacher_has_no_remedy(teacher):
    images, labels = data(800)
    found = diagnose(teacher(), images, labels, NAMES)
    assert found.accuracy > 0.95
    assert found.remedy is None
    assert found.n == 800
    assert found.low < found.accuracy <= found.high
    assert found.lines() == [
        f"teacher python:in_memory:f: accuracy {found.accuracy:.1%} on 800 labeled examples (95 % interval {found.low:.1%} to "
        f"{found.high:.1%}; the largest class alone: {found.chance:.1%})"
    ]


ERRORS = {
    "order": ({"order": "BGR"}, {"order": "RGB"}),
    "bytes": ({"scale": 255.0}, {"scale": 1.0}),
    "tiny": ({"scale": 1 / 255}, {"scale": 1.0}),
    "layout": ({"layout": "NWHC"}, {"layout": "NHWC"}),
    "inverted": ({"scale": -1.0, "mean": (-0.5,)}, {"scale": 1.0, "mean": (0.5,)}),
    "classes": ({"classes": (*NAMES[1:], NAMES[0])}, {"classes": NAMES}),
    "two classes": ({"classes": (NAMES[1], NAMES[0], *NAMES[2:])}, {"classes": NAMES}),
    "two mistakes": ({"order": "BGR", "layout": "NWHC"}, {"order": "RGB", "layout": "NHWC"}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_named_with_the_options_that_undo_it(teacher, name):
    wrong, right = ERRORS[name]
    images, labels = data(1000)
    faulty = teacher({**RIGHT, **wrong})
    found = diagnose(faulty, images, labels, NAMES)
    assert found.remedy is not None
    changes = found.remedy.changes
    assert {key: pytest.approx(value) if key in ("scale", "mean") else value for key, value in right.items()} == dict(
        changes
    )
    assert found.remedy.after > 0.95 > found.accuracy
    assert found.remedy.p_value <= LEVEL
    repaired = faulty.with_preprocessing(dataclasses.replace(faulty.preprocessing, **changes))
    assert diagnose(repaired, images, labels, NAMES).remedy is None
    assert f"warning: with {found.remedy.name}" in found.lines()[-1]
    assert found.remedy.option in found.lines()[-1]
    for field in right:
        assert f"--teacher-input.{field} " in found.remedy.option


def test_a_teacher_near_chance_is_reported(teacher):
    images, labels = data(600)
    found = diagnose(teacher(function=lambda x: np.tile(np.arange(K), (len(x), 1))), images, labels, NAMES)
    assert found.near_chance
    assert found.remedy is None
    assert "NEAR CHANCE" in found.lines()[1]
    assert "no other class order" in found.lines()[2]


def test_a_constant_teacher_on_unbalanced_data_has_no_remedy(teacher):
    """Another class order would only reach the accuracy of the largest class."""
    images, labels = data(2000)
    keep = (labels == 0) | (np.arange(2000) % 5 == 0)
    constant = teacher(function=lambda x: np.tile(np.arange(K), (len(x), 1)))
    found = diagnose(constant, images[keep], labels[keep], NAMES)
    assert found.chance > 0.4
    assert found.remedy is None


def test_weak_teachers_raise_no_alarm(teacher):
    """60 teachers know 0, 30 or 60 % of the answers with any preprocessing, and guess the others anew with each."""
    images, labels = data(400)
    label_of = {row.tobytes(): label for row, label in zip(images, labels, strict=True)}
    plain, alarms = teacher(), 0
    for seed in range(60):
        knows = (0.0, 0.3, 0.6)[seed % 3]
        guesses = np.random.default_rng(seed).normal(size=(9973, K)).astype(np.float32)
        luck = np.random.default_rng(seed + 1000).random(9973)

        def behind(steps, knows=knows, guesses=guesses, luck=luck, plain=plain):
            """Guesses what the teacher does not know from a hash of the example and the preprocessing."""

            def outputs(batch):
                rows = [zlib.crc32(row.tobytes() + repr(steps).encode()) % 9973 for row in batch]
                right = np.array([label_of[row.tobytes()] for row in batch])
                knows_it = np.array([zlib.crc32(row.tobytes()) % 9973 for row in batch])
                return {"logits": guesses[rows] + 20 * np.eye(K)[right] * (luck[knows_it] < knows)[:, None]}

            return dataclasses.replace(plain, outputs=outputs, preprocessing=steps, with_preprocessing=behind)

        found = diagnose(behind(Preprocessing(**RIGHT)), images, labels, NAMES, seed=seed)
        alarms += found.remedy is not None
        assert found.accuracy == pytest.approx(knows + (1 - knows) / K, abs=0.1)
    assert alarms == 0


def test_the_order_of_many_classes_is_reported_without_names(teacher):
    images, labels = data(100)
    wrong = teacher({**RIGHT, "classes": NAMES[::-1]})
    few = slice(0, 28)  # too few for a list of names
    found = diagnose(wrong, images[few], labels[few], NAMES)
    assert found.remedy is not None
    assert found.remedy.changes == {}
    assert found.lines()[-1].endswith("give the names of its outputs, in their order, with --teacher-input.classes")


def test_examples_without_labels_are_left_out(teacher):
    images, labels = data(300)
    some = labels.copy()
    some[:200] = -1
    assert diagnose(teacher(), images, some, NAMES).n == 100
    none = diagnose(teacher(), images, np.full(300, -1), NAMES)
    assert (none.n, none.remedy, none.near_chance) == (0, None, False)
    assert none.lines()[0].startswith(
        "teacher python:in_memory:f: no labeled examples, so its accuracy is unknown. Its 6 "
    )


def test_it_uses_a_limited_number_of_examples_read_by_rows(teacher):
    images, labels = data(500)

    class Rows:
        shape, dtype, reads = images.shape, images.dtype, []

        def __getitem__(self, rows):
            self.reads.append(rows)
            return images[rows]

    rows = Rows()
    assert diagnose(teacher(), rows, labels, NAMES, limit=120).n == 120
    assert [len(part) for part in rows.reads] == [120]
    assert (np.diff(rows.reads[0]) > 0).all()


def test_probabilities_are_reported(teacher):
    def softmax(prepared):
        logits = nearest(prepared)
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    images, labels = data(200)
    found = diagnose(teacher(function=softmax), images, labels, NAMES)
    assert found.probabilities
    assert "remove the softmax" in found.lines()[-1]


def test_a_member_of_an_ensemble_is_diagnosed_alone(teacher):
    images, labels = data(500)
    fine, wrong = teacher(), teacher({**RIGHT, "order": "BGR"})
    both = dataclasses.replace(
        fine,
        outputs=lambda x: {"logits": (fine.outputs(x)["logits"] + wrong.outputs(x)["logits"]) / 2},
        with_preprocessing=None,
        members=(fine, wrong),
    )
    found = diagnose(both, images, labels, NAMES)
    assert found.remedy is None
    assert [member.remedy is None for member in found.members] == [True, False]
    assert found.lines()[-1].endswith('in a TOML file beside it, order = "RGB"')


def test_a_failing_teacher_is_an_input_error(teacher):
    def raises(prepared):
        raise KeyError("weights")

    images, labels = data(100)
    with pytest.raises(InputError, match="fails with KeyError"):
        diagnose(teacher(function=raises), images, labels, NAMES)


def test_vectors_and_sequences_have_fewer_repairs():
    steps = Preprocessing()
    assert [len(group) for group in repairs(steps, (7,), pixels=False)] == [0, 0, 0]
    assert [len(group) for group in repairs(steps, (7, 2), pixels=False)] == [0, 1, 0]
    grey = repairs(steps, (8, 8, 1), pixels=True)
    assert [repair.name for repair in grey[-1]][-1] == "MNIST's mean and std"
    colour = repairs(steps, (8, 8, 3), pixels=True)
    assert [len(group) for group in colour] == [1, 3, 8]
    for repair in [*itertools.chain(*colour), *pairs(colour)]:
        assert dataclasses.replace(steps, **repair.changes) != steps  # all are preprocessing options


def test_interval_and_p_value_by_hand():
    """Clopper-Pearson 8 of 10: (0.4439, 0.9748); McNemar of 9 wins and 1 loss: 11 / 1024."""
    np.testing.assert_allclose(_interval(8, 10), (0.4439, 0.9748), atol=1e-4)
    assert _interval(0, 10)[0] == 0
    assert _interval(10, 10)[1] == 1
    before, after = np.array([False] * 9 + [True] * 5), np.array([True] * 9 + [False] + [True] * 4)
    assert p_value(before, after) == pytest.approx(11 / 1024)
    assert p_value(before, before) == 1


def outcomes(wins, losses, both, neither):
    before = np.repeat([False, True, True, False], [wins, losses, both, neither])
    return before, np.repeat([True, False, True, False], [wins, losses, both, neither])


def test_what_confirms_a_repair():
    """A gain of 0.03, p <= 0.001 and a skill of 0.1: each of them decides alone."""
    assert is_better(*outcomes(40, 0, 500, 460), chance=0.1)  # a gain of 0.04
    assert not is_better(*outcomes(20, 0, 500, 480), chance=0.1)  # a gain of 0.02, p = 1e-6
    assert is_better(*outcomes(11, 0, 20, 20), chance=0.1)  # p = 0.0005
    assert is_better(*outcomes(10, 0, 20, 20), chance=0.1)  # p = 0.00098
    assert not is_better(*outcomes(9, 0, 20, 20), chance=0.1)  # p = 0.00195
    assert is_better(*outcomes(100, 0, 50, 850), chance=0.01)  # a skill of 0.14
    assert not is_better(*outcomes(60, 0, 10, 930), chance=0.01)  # a skill of 0.06


def test_a_teacher_near_chance_has_a_skill_below_a_tenth():
    kept = {"source": "s", "low": 0.9, "high": 1.0, "chance": 0.2, "n": 10_000}
    assert Diagnosis(accuracy=0.27, **kept | {"low": 0.26}).near_chance  # 0.0875
    assert not Diagnosis(accuracy=0.33, **kept | {"low": 0.32}).near_chance  # 0.1625


def counting_teacher(template, images, labels, hit_rate):
    """A teacher whose hit rate is a function of its preprocessing, and the examples on which each repaired one ran."""
    label_of = {row.tobytes(): label for row, label in zip(images, labels, strict=True)}
    counts = []

    def behind(steps, count):
        rate = hit_rate(steps)

        def outputs(batch):
            count[0] += len(batch)
            truth = np.array([label_of[row.tobytes()] for row in batch])
            luck = np.array([zlib.crc32(row.tobytes()) % 997 / 997 for row in batch])
            return {"logits": np.eye(K)[np.where(luck < rate, truth, (truth + luck * 1e4).astype(int) % K)]}

        def repaired(steps):
            counts.append([0])
            return behind(steps, counts[-1])

        return dataclasses.replace(template, outputs=outputs, preprocessing=steps, with_preprocessing=repaired)

    return behind(Preprocessing(**RIGHT), [0]), counts


def test_a_candidate_runs_on_more_examples_as_long_as_it_looks_better(teacher):
    """On 16 where it is hopeless, on 64 where it is no better, on 256 where the gain is small; else on the test examples."""
    images, labels = data(1000)
    start = Preprocessing(**RIGHT)

    def run(accuracy, gain):
        """The number of examples on which candidates ran, for candidates of a gain."""
        synthetic, counts = counting_teacher(
            teacher(), images, labels, lambda steps: accuracy + gain * (steps != start)
        )
        diagnose(synthetic, images, labels, NAMES)
        return {count for (count,) in counts if count}

    assert run(0.9, -0.5) == {16}
    assert run(0.9, -0.36) == {64}
    assert run(0.8, -0.1) == {64}
    assert run(0.5, 0.4) >= {1000}
    assert _screens(1000) == (16, 64, 256)
    assert _screens(40) == (10, 10, 20)


def test_the_test_examples_judge_the_three_best_candidates(teacher):
    """Ten or more repairs gain the same, and the test examples must not select among so many."""
    images, labels = data(1000)
    start = Preprocessing(**RIGHT)
    synthetic, counts = counting_teacher(teacher(), images, labels, lambda steps: 0.5 + 0.4 * (steps != start))
    assert diagnose(synthetic, images, labels, NAMES).remedy is not None
    ran = [count for (count,) in counts]
    assert sum(count >= 256 for count in ran) >= 10
    assert ran.count(1000) == 3


def test_three_repairs_at_most_are_combined(teacher):
    """Each factor of 255 gains as much as the one before."""
    images, labels = data(1000)
    factors = {255.0**power: 0.1 + 0.12 * power for power in range(8)}
    synthetic, _ = counting_teacher(teacher(), images, labels, lambda steps: factors.get(steps.scale or 1.0, 0.0))
    remedy = diagnose(synthetic, images, labels, NAMES).remedy
    assert remedy is not None
    assert remedy.changes == {"scale": 255.0**3}


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def real(cifar):
    """The real teacher, which remembers its outputs for each preprocessing."""
    images, labels, classes = cifar
    path = SHARED.parent / "teachers" / "cifar10_resnet56.onnx"
    if not path.is_file():
        pytest.skip(f"the real teacher is missing: {path.name}")
    steps = Preprocessing(**IMAGENET)
    loaded = load_teacher(
        f"onnx:{path}", preprocessing=steps, input_shape=(32, 32, 3), num_classes=10, class_names=classes
    )
    known = {}

    def remembering(now):
        def outputs(batch):
            key = (now.digest, hashlib.sha256(batch.tobytes()).digest())
            if key not in known:
                known[key] = now.outputs(batch)
            return known[key]

        return dataclasses.replace(
            now, outputs=outputs, with_preprocessing=lambda steps: remembering(now.with_preprocessing(steps))
        )

    return remembering(loaded), images, labels, classes


def test_the_real_teacher_has_no_remedy(real):
    teacher, images, labels, classes = real
    found = diagnose(teacher, images, labels, classes)
    assert found.remedy is None
    assert found.accuracy >= 0.86
    assert len(found.lines()) == 1


REAL = {
    "channel order": ({**IMAGENET, "order": "BGR"}, {"order": "RGB"}),
    "scale": ({**IMAGENET, "scale": 255.0}, {"scale": 1.0}),
    "mean and std": ({}, {**IMAGENET, "scale": 1.0}),
    "class order": (None, None),
}


@pytest.mark.parametrize("name", REAL)
def test_each_error_with_the_real_teacher_is_named(real, name):
    teacher, images, labels, classes = real
    wrong, right = REAL[name]
    if wrong is None:
        cat, dog = classes.index("cat"), classes.index("dog")
        order = list(classes)
        order[cat], order[dog] = order[dog], order[cat]
        wrong, right = {**IMAGENET, "classes": tuple(order)}, {"classes": classes}
    found = diagnose(teacher.with_preprocessing(Preprocessing(**wrong)), images, labels, classes)
    assert found.remedy is not None
    assert dict(found.remedy.changes) == right
    assert found.remedy.after > 0.84


def test_a_wrong_layout_of_the_real_teacher_is_refused(real):
    with pytest.raises(InputError, match=r"in layout NHWC: give --teacher-input\.layout NCHW"):
        real[0].with_preprocessing(Preprocessing(**IMAGENET, layout="NHWC"))
