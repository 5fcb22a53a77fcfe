"""What a teacher's outputs mean: probabilities and sigmoids are named or converted, one column is refused or explained."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax
from small_network import IMAGES, STEPS, flax_network, load, onnx_file

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.teachers.output_meaning import LOGITS, PROBABILITIES, SIGMOID, meaning_of, to_logits

RNG = np.random.default_rng(0)
RAW = RNG.normal(0, 3, (200, 4)).astype(np.float32)
INPUTS = np.arange(8, dtype=np.float32).reshape(4, 2)


@pytest.mark.parametrize(
    ("outputs", "meaning"),
    [
        (RAW, LOGITS),
        (log_softmax(RAW, axis=1), LOGITS),
        (-(RAW**2), LOGITS),  # squared distances
        (4 * np.eye(4)[:, [1, 0, 2, 3]], LOGITS),
        (np.zeros((9, 3)), LOGITS),
        (softmax(RAW, axis=1), PROBABILITIES),
        (softmax(RAW, axis=1).astype(np.float16).astype(np.float32), PROBABILITIES),
        (np.eye(4), PROBABILITIES),
        (expit(RAW), SIGMOID),
        (expit(RAW[:, :1]), SIGMOID),
    ],
)
def test_what_outputs_look_like(outputs, meaning):
    assert meaning_of(outputs) == meaning


def test_conversions_by_hand():
    """log .8 and log .2; log(.8 / .2) = 1.3863 for a sigmoid, and half of it to either side for one column."""
    log4 = np.log(4)
    given = np.array([[0.8, 0.2]], np.float32)
    np.testing.assert_allclose(to_logits(given, PROBABILITIES, source="t"), np.log(given))
    np.testing.assert_allclose(to_logits(given, SIGMOID, source="t"), [[log4, -log4]], rtol=1e-5)
    np.testing.assert_array_equal(to_logits(given, "", source="t"), given)
    for stated in (PROBABILITIES, SIGMOID):
        one = to_logits(given[:, :1], stated, source="t")
        np.testing.assert_allclose(one, [[-log4 / 2, log4 / 2]], rtol=1e-5)
        np.testing.assert_allclose(softmax(one), [[0.2, 0.8]], rtol=1e-5)
    np.testing.assert_array_equal(to_logits(np.array([[3.0]]), LOGITS, source="t"), [[-1.5, 1.5]])
    certain = to_logits(np.array([[0.0, 1.0]]), PROBABILITIES, source="t")
    np.testing.assert_allclose(certain, [[np.log(1e-7), 0]])
    assert np.isfinite(to_logits(np.array([[0.0], [1.0]]), SIGMOID, source="t")).all()


@pytest.mark.parametrize("stated", [PROBABILITIES, SIGMOID])
def test_stated_probabilities_must_be_some(stated):
    with pytest.raises(
        InputError, match=rf"outputs that are {stated} lie in \[0, 1\]; t gives values from -2 to 3: omit"
    ):
        to_logits(np.array([[-2.0, 3.0]]), stated, source="t")


@pytest.fixture
def teacher(monkeypatch):
    """Loads a function as a teacher of vectors of two numbers."""

    def make(function, *, classes=0, outputs="", names=()):
        monkeypatch.setitem(sys.modules, "by_hand", SimpleNamespace(__file__="by_hand.py", f=function))
        monkeypatch.setattr("ev3_distill.teachers.kinds.python._source_file", lambda place: None)
        steps = Preprocessing(outputs=outputs, classes=names)
        own = tuple(map(str, range(classes)))
        return load("python:by_hand:f", steps=steps, shape=(2,), classes=own)

    return make


ONE_COLUMN = {"column": lambda x: x[:, :1], "vector": lambda x: x[:, 0]}


@pytest.mark.parametrize("kind", ONE_COLUMN)
@pytest.mark.parametrize(("classes", "says"), [
    (0, "at least 2; .* has one: give --teacher-input.outputs logits if it is the decision .* regression task, which"),
    (2, "class, 2; .* has one: give --teacher-input.outputs logits if it is the decision .* regression task, which"),
    (3, "class, 3; .* has one: return one logit per class, .* regression task, which ev3-distill does not offer yet"),
])  # fmt: skip
def test_one_column_is_refused(teacher, kind, classes, says):
    with pytest.raises(InputError, match=says):
        teacher(ONE_COLUMN[kind], classes=classes).outputs(INPUTS)


@pytest.mark.parametrize("kind", ONE_COLUMN)
@pytest.mark.parametrize("classes", [0, 2])
def test_one_column_of_two_classes_is_converted_on_request(teacher, kind, classes):
    loaded = teacher(ONE_COLUMN[kind], classes=classes, outputs="logits")
    half = INPUTS[:, 0] / 2
    np.testing.assert_array_equal(loaded.outputs(INPUTS)["logits"], np.stack([-half, half], axis=1))
    with pytest.raises(InputError, match=r"one column per class, 3; .* gives 2"):
        teacher(ONE_COLUMN[kind], classes=3, outputs="logits").outputs(INPUTS)


def test_whole_numbers_are_labels(teacher):
    with pytest.raises(
        InputError, match=r"a score for each class, \[B, 3\]; .* whole number .* such as the predicted class"
    ):
        teacher(lambda x: x[:, 0].astype(int), classes=3).outputs(INPUTS)


@pytest.mark.parametrize("kind", ["onnx", "flax"])
def test_one_column_of_a_file_is_refused_when_it_is_loaded(here, kind, monkeypatch):
    import small_network

    monkeypatch.setattr(small_network, "HEAD", small_network.HEAD[:, :1])
    network, variables = flax_network()
    one = dataclasses.replace(network, spec={**network.spec, "num_classes": 1})
    source = "flax:there"
    if kind == "onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(onnx_file("small.onnx"))
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
        onnx.save(model, "small.onnx")
        source = "onnx:small.onnx"
    with pytest.raises(InputError, match=r"at least 2; .* has one: give --teacher-input.outputs"):
        load(source, classes=(), load_network=lambda place: (one, variables))
    two = load(
        source,
        classes=("no", "yes"),
        steps=dataclasses.replace(STEPS, outputs="logits"),
        load_network=lambda place: (one, variables),
    )
    assert (two.num_classes, two.network) == (2, None)
    if kind == "onnx":
        logits = two.outputs(IMAGES)["logits"]
        np.testing.assert_array_equal(logits[:, 0], -logits[:, 1])


def test_the_digest_covers_a_stated_meaning_and_is_unchanged_without_one(teacher):
    function = ONE_COLUMN["column"]
    plain, stated = teacher(lambda x: x, classes=2), teacher(lambda x: x, classes=2, outputs="logits")
    converted = teacher(lambda x: x, classes=2, outputs="probabilities")
    assert plain.digest == stated.digest != converted.digest
    assert teacher(function, outputs="sigmoid").digest not in (plain.digest, converted.digest)


def test_an_unknown_meaning_is_refused():
    with pytest.raises(InputError, match="outputs must be logits, probabilities or sigmoid; got 'softmax': name one"):
        Preprocessing(outputs="softmax")


def test_minus_infinity_names_the_clip(teacher):
    with pytest.raises(InputError, match=r"logarithm of a probability of 0; clip first, as in numpy.log\(numpy.clip"):
        teacher(lambda x: np.where(np.eye(len(x), 3) > 0, 0, -np.inf), classes=3).outputs(INPUTS)
    with pytest.raises(InputError, match="check the teacher and the scale of its inputs"):
        teacher(lambda x: np.full((len(x), 3), np.nan), classes=3).outputs(INPUTS)
