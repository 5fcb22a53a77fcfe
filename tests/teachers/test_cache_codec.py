"""The codec of cached outputs: round trips, their precision, and errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ev3_distill.errors import InputError
from ev3_distill.teachers.cache.codec import CODECS, Codec, LogitsCodec

K = 5
PRECISIONS = ("float32", "float16", "top2")


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def through(precision, array, **features):
    """Encodes and decodes an array."""
    array = np.asarray(array, np.float32)
    codec = LogitsCodec(precision, {"logits": array.shape[1:], **{n: f.shape[1:] for n, f in features.items()}})
    outputs = codec.arrays({"logits": array, **features}, len(array))
    assert codec.fault(outputs) is None
    records = codec.encode(outputs)
    assert (codec.difference(records, outputs) <= codec.tolerance).all()
    return codec.decode(records)


def test_float16_of_huge_logits_keeps_offset_and_top():
    read = through("float16", [[1e6, 1e6 - 0.5, 0.0, -1e30], [3.0, 2.0, 1.0, 0.25]])["logits"]
    assert read.tolist() == [[1e6, 1e6 - 0.5, 1e6 - 65504, 1e6 - 65504], [3.0, 2.0, 1.0, 0.25]]


def test_top2_by_hand():
    read = through("top2", np.log([[0.1, 0.5, 0.07, 0.3, 0.03]]))["logits"]
    np.testing.assert_allclose(np.exp(read), [[0.2 / 3, 0.5, 0.2 / 3, 0.3, 0.2 / 3]], rtol=1e-3)
    np.testing.assert_allclose(softmax(read)[0, [0, 2, 4]].sum(), 0.2, rtol=1e-3)
    sure = through("top2", [[0.0, 500.0, -500.0, 499.0, -1000.0]])["logits"]  # a residual mass of e^-500
    np.testing.assert_allclose(sure, [[-np.log(3), 500, -np.log(3), 499, -np.log(3)]], atol=0.2)


@pytest.mark.parametrize(("classes", "size"), [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_the_smallest_index_that_holds_the_classes(classes, size):
    assert LogitsCodec("top3", {"logits": (classes,)}).dtype.itemsize == 4 + 4 + 3 * (2 + size)
    array = np.zeros((1, classes))
    array[0, -3:] = [1, 3, 2]
    np.testing.assert_allclose(through("top3", array)["logits"][0, -3:], [1, 3, 2], rtol=1e-3)


scales = st.sampled_from([1e-3, 1.0, 30.0, 1e4])
arrays = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 20), st.integers(3, 12)),
    elements=st.floats(-1, 1, width=32, allow_subnormal=False),
)


@settings(max_examples=60, deadline=None)
@given(array=arrays, scale=scales)
def test_round_trip_of_float32_is_exact(array, scale):
    array = (array * scale).astype(np.float32)
    assert through("float32", array)["logits"].tobytes() == array.tobytes()


@settings(max_examples=60, deadline=None)
@given(array=arrays, scale=scales)
def test_round_trip_of_float16(array, scale):
    array = (array * scale).astype(np.float32)
    distance = array.max(axis=1, keepdims=True) - array
    bound = distance * 2.0**-11 + np.abs(array).max() * 2.0**-22 + 2.0**-24
    assert (np.abs(through("float16", array)["logits"] - array) <= bound).all()


@settings(max_examples=100, deadline=None)
@given(array=arrays, scale=st.sampled_from([1e-3, 1.0, 30.0]), data=st.data())
def test_round_trip_of_top_k_has_the_residual_mass(array, scale, data):
    array = (array * scale).astype(np.float32)
    n, classes = array.shape
    k = data.draw(st.integers(1, classes - 1))
    read = through(f"top{k}", array)["logits"]
    assert read.shape == array.shape
    top = np.argsort(-array, axis=1, kind="stable")[:, :k]
    kth = np.take_along_axis(array, top[:, -1:], axis=1)
    for i in range(n):  # ties at the k-th may go either way
        above, at = array[i] > kth[i], array[i] == kth[i]
        assert np.abs(read[i] - array[i])[above].max(initial=0) <= 2.0**-11 * np.ptp(array[i]) + 1e-5
        mass = softmax(array[i]) @ (~above & ~at) + softmax(array[i])[at].sum() * (1 - (k - above.sum()) / at.sum())
        rest = np.sort(softmax(read[i]))[: classes - k].sum()
        np.testing.assert_allclose(rest, mass, rtol=1e-4 + 2.0**-10 * np.ptp(array[i]), atol=1e-9)
        assert np.unique(np.sort(read[i])[: classes - k]).size <= classes - k


@settings(max_examples=60, deadline=None)
@given(array=arrays, data=st.data())
def test_the_residual_mass_is_exact(array, data):
    """Without ties, and with top logits that are exact in float16, all other probabilities are exact too."""
    classes = array.shape[1]
    k = data.draw(st.integers(1, classes - 1))
    array[:, :k] = 4 + np.arange(k) / 8
    read = softmax(through(f"top{k}", array)["logits"])
    expected = softmax(array)
    np.testing.assert_allclose(read[:, :k], expected[:, :k], rtol=3e-6)
    shares = expected[:, k:].mean(axis=1, keepdims=True).repeat(classes - k, axis=1)
    np.testing.assert_allclose(read[:, k:], shares, rtol=3e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_features(precision):
    feature = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    read = through(precision, np.eye(4), middle=feature, pooled=feature[:, 0])
    np.testing.assert_allclose(read["middle"], feature, rtol=0 if precision == "float32" else 2.0**-11)
    assert read["middle"].dtype == read["pooled"].dtype == np.float32
    assert read["pooled"].shape == (4, 3)


def test_features_beyond_float16():
    outputs = {"logits": np.zeros((3, K), np.float32), "wide": np.float32([[1], [7e4], [1e5]])}
    fields = {"logits": (K,), "wide": (1,)}
    assert LogitsCodec("float32", fields).fault(outputs) is None
    assert LogitsCodec("top2", fields).fault(outputs) == (
        1,
        "wide must be within 65,504 to be cached in float16; got 1e+05",
    )


@pytest.mark.parametrize(
    ("precision", "fields", "message"),
    [
        ("float8", {"logits": (3,)}, "as float32, float16 or top<k>; got 'float8': use one"),
        ("top0", {"logits": (3,)}, "got 'top0'"),
        ("top3", {"logits": (3,)}, "k below the number of classes, 3; got top3: use float16"),
        ("float32", {"feature": (3,)}, r"logits of shape \(K,\); got {'feature': \(3,\)}"),
        ("float32", {"logits": (3, 4)}, r"logits of shape \(K,\)"),
    ],
)
def test_an_unknown_precision_is_refused(precision, fields, message):
    with pytest.raises(InputError, match=message):
        LogitsCodec(precision, fields)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_outputs_without_logits_are_stored_by_name(precision):
    """As a task with real targets needs it."""
    outputs = {"mean": np.float32([[1.5], [-3e4]]), "spread": np.float32([[[0.1, 2], [3, 4]]] * 2)}
    codec = CODECS["arrays"](precision, {name: array.shape[1:] for name, array in outputs.items()})
    assert codec.fault(outputs) is None
    records = codec.encode(outputs)
    assert records.dtype.itemsize == 5 * (4 if precision == "float32" else 2)
    for name, array in codec.decode(records).items():
        np.testing.assert_allclose(array, outputs[name], rtol=0 if precision == "float32" else 2.0**-11)
    assert (codec.difference(records, outputs) <= codec.tolerance).all()
    assert codec.difference(records, {**outputs, "mean": outputs["mean"] * 1.01}) == pytest.approx(
        [0.01, 0.01], rel=0.1
    )
    with pytest.raises(InputError, match="cached as float32 or float16; got 'top8'"):
        Codec("top8", codec.fields)
