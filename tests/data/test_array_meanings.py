"""Arrays of npz files that are not what their shape says: layouts, token ids, text and float labels, blank images."""

import re

import numpy as np
import pytest
from image_files import load

from ev3_distill.data.sources import load_data
from ev3_distill.data.sources.array_shapes import warn_of_token_ids
from ev3_distill.errors import InputError
from ev3_distill.students.registry import build

pytestmark = pytest.mark.usefixtures("cache")
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(6, 3)).astype(np.float32)
LABELS = np.arange(6) % 2


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "a,b.npz", **arrays)
        return f"npz:{tmp_path / 'a,b.npz'}"

    return write


# Labels.


def test_text_labels_are_class_names(save):
    labels = np.array(["cat", "ant", "cat", "bee", "ant", "bee"])
    dataset = load_data(save(inputs=ROWS, labels=labels))
    assert (dataset.class_names, dataset.num_classes) == (("ant", "bee", "cat"), 3)
    assert (dataset.labels.tolist(), dataset.labels.dtype) == ([2, 0, 2, 1, 0, 1], np.int32)
    in_bytes = load_data(save(inputs=ROWS, labels=np.char.encode(labels, "utf-8")))
    assert (in_bytes.class_names, in_bytes.labels.tolist()) == (dataset.class_names, dataset.labels.tolist())
    named = load_data(save(inputs=ROWS, labels=labels, class_names=["cat", "dog", "bee", "ant"]))
    assert (named.class_names, named.labels.tolist()) == (("cat", "dog", "bee", "ant"), [0, 3, 0, 2, 3, 2])


def test_text_labels_of_both_parts_are_numbered_together(save):
    parts = {"train_inputs": ROWS[:4], "test_inputs": ROWS[4:], "train_labels": ["b", "a", "b", "a"]}
    dataset = load_data(save(**parts, test_labels=["c", "b"]))
    assert (dataset.class_names, dataset.labels.tolist()) == (("a", "b", "c"), [1, 0, 1, 0, 2, 1])
    with pytest.raises(InputError, match=r"train and test must have one type; got <U1 and int64: save both as text"):
        load_data(save(**parts, test_labels=[0, 1]))


def test_spellings_of_a_text_label_are_one_class(save):
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    for names in ({}, {"class_names": [nfd, "bar"]}):
        dataset = load_data(save(inputs=ROWS, labels=[nfc, nfd, "bar", nfc, nfd, "bar"], **names))
        assert sorted(dataset.class_names) == ["bar", nfc]
        assert [dataset.class_names[label] for label in dataset.labels] == [nfc, nfc, "bar"] * 2


def test_truth_values_are_classes(save):
    dataset = load_data(save(inputs=ROWS, labels=LABELS == 1))
    assert (dataset.labels.tolist(), dataset.class_names) == (LABELS.tolist(), ("0", "1"))


ONE_HOT = np.eye(2)[LABELS]
BAD_LABELS = {
    "fractions": (LABELS + 0.5, r"got float64 such as 0.5 in row 0: numbers that are not whole are .* regression"),
    "whole": (LABELS * 1.0, r"got float64 of whole numbers: if they number classes, save labels.astype\('int32'\)"),
    "nan": (np.where(LABELS, np.nan, 1.0), r"got float64 with nan in row 1: leave out"),
    "one-hot": (ONE_HOT, r"one class per example; got \[6, 3\] and \[6, 2\], which is one-hot: save labels.argmax"),
    "column": (LABELS[:, None], r"got \[6, 3\] and \[6, 1\]: save labels\[:, 0\]"),
    "multi-label": (np.ones((6, 2), int), "zeros and ones: several classes per example are not supported"),
    "probabilities": (ONE_HOT * 0.5 + 0.25, r"which are probabilities: save labels.argmax\(axis=1\); .*logits:FILE"),
    "matrix": (ONE_HOT * 7, "save one number per example"),
    "ids": (list("abcdef"), "must be classes that recur; got 6 different texts in as many rows, such as 'a'"),
    "ids and none": (["", *"abcde"], "must be classes that recur; got 5 different texts in as many rows, such as 'a'"),
    "latin": (np.array([b"\xe4", b"a"] * 3), "must be UTF-8 text"),
    "complex": (LABELS * 1j, "must be integers or text; got complex128: save the number or the name"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_are_refused_with_their_way_out(save, name):
    labels, message = BAD_LABELS[name]
    with pytest.raises(InputError, match=message) as caught:
        load_data(save(inputs=ROWS, labels=labels))
    if name != "whole":
        assert "astype" not in str(caught.value)


def test_text_labels_beside_other_class_names_are_refused(save):
    with pytest.raises(InputError, match=r"one of class_names; got 'c' and 1 more: add it"):
        load_data(save(inputs=ROWS, labels=list("abcdab"), class_names=["a", "b"]))


# Layout of images.


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_channels_first_is_an_option(save, memory, dtype):
    nchw = RNG.integers(0, 2, (6, 3, 5, 7)).astype(dtype)
    source = save(inputs=nchw, labels=LABELS)
    with pytest.raises(
        InputError, match=r"must be \[N, H, W, C\]; got inputs \[6, 3, 5, 7\].*a,b.npz,layout=nchw; .*nhwc"
    ):
        load_data(source)
    for layout, expected in (("nchw", nchw.transpose(0, 2, 3, 1)), ("NHWC", nchw)):
        dataset = load_data(f"{source},layout={layout}", memory=memory)
        np.testing.assert_array_equal(dataset.inputs[:], expected)
        assert dataset.source == f"{source},layout={layout}"
    same = load_data(save(inputs=nchw.transpose(0, 2, 3, 1), labels=LABELS))
    assert load_data(f"{save(inputs=nchw, labels=LABELS)},layout=nchw", memory=memory).fingerprint == same.fingerprint


@pytest.mark.parametrize("shape", [(5, 7, 3), (3, 4, 4), (1, 9, 3), (16, 16, 8), (5, 7, 1), (3, 3, 1)])
def test_channels_last_is_not_mistaken(save, shape):
    inputs = RNG.integers(0, 256, (6, *shape)).astype(np.uint8)
    assert load_data(save(inputs=inputs, labels=LABELS)).inputs.shape == (6, *shape)


def test_bad_options_of_npz_are_refused(save):
    source = save(inputs=ROWS, labels=LABELS)
    with pytest.raises(InputError, match="layout of npz:FILE is one of nhwc, nchw; got 'chw'"):
        load_data(f"{source},layout=chw")
    with pytest.raises(InputError, match="the options of npz:FILE are layout and labels; got size"):
        load_data(f"{source},size=8")
    with pytest.raises(InputError, match=r"layout is an option of images with 4 axes; got inputs \[6, 3\]"):
        load_data(f"{source},layout=nchw")


# Token ids.


def texts(n=200, length=32, vocabulary=30_000, *, padded):
    ids = (vocabulary ** RNG.uniform(0.3, 1, (n, length))).astype(np.int64)  # frequent words have small ids
    ids[:, 0] = 101
    if padded:
        ids[np.arange(length) >= RNG.integers(4, length, (n, 1))] = 0
    return ids


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("memory", [None, 0])
def test_token_ids_are_told(save, padded, memory):
    ids = texts(padded=padded)
    _, warnings = load(save(inputs=ids, labels=np.arange(200) % 2), memory=memory)
    assert len(warnings) == 1
    assert re.search(r"a,b.npz: inputs looks like token ids: \[N, 32\] integers from 0 to \d+ .*sequences", warnings[0])
    assert load(save(inputs=ids.astype(np.float32), labels=np.arange(200) % 2))[1] == []


def test_arrays_of_token_ids_are_refused_by_name(save):
    with pytest.raises(InputError, match=r"got input_ids, and no student reads token ids: save their embeddings, as"):
        load_data(save(input_ids=texts(padded=True), labels=np.arange(200) % 2))
    with pytest.raises(
        InputError, match=r"sequences must be numbers \[N, L, C\]; .*: save the embeddings of token ids"
    ):
        load_data(save(sequences=texts(padded=True), labels=np.arange(200) % 2))


def quantities():
    n = 300
    walk = np.cumsum(RNG.normal(size=(n, 40)), axis=1)
    yield "time series", (walk - walk.min()) * 100
    ranges = np.array([90, 16, 100_000, 4000, 99, 1_500_000, 40, 2, 7, 5])
    yield "table", RNG.uniform(size=(n, 10)) * ranges
    yield "counts", RNG.poisson(3, (n, 50))
    yield "negative", RNG.integers(-1000, 1000, (n, 20))
    smooth = np.repeat(np.repeat(RNG.uniform(0, 4095, (n, 3, 3)), 4, axis=1), 4, axis=2)
    yield "flattened 12-bit images", smooth.reshape(n, -1)
    yield "few columns", RNG.integers(0, 9999, (n, 4))
    yield "genes", RNG.negative_binomial(0.5, 1 / (1 + 10 ** RNG.uniform(0, 4, 40)), (n, 40))


@pytest.mark.parametrize(("name", "array"), list(quantities()))
def test_integers_that_are_quantities_are_not_told(name, array):
    warnings = []
    warn_of_token_ids(name, array.astype(np.int64), warnings.append)
    assert warnings == []


# Values.


def test_examples_that_are_all_the_same_are_told(save):
    _, warnings = load(save(inputs=np.full((6, 3), 0.5), labels=LABELS))
    assert len(warnings) == 1
    assert "all of 6 examples are the same, so nothing can be learned" in warnings[0]


def test_blank_images_are_told(save):
    images = RNG.integers(0, 256, (20, 4, 4)).astype(np.uint8)
    images[0] = 7
    labels = np.arange(20) % 2
    assert load(save(inputs=images, labels=labels))[1] == []
    images[1] = 0
    _, warnings = load(save(inputs=images, labels=labels))
    assert len(warnings) == 1
    assert "2 of 20 examples are blank, one value in all pixels" in warnings[0]


@pytest.mark.parametrize("family", ["convnet1d", "transformer"])
def test_students_of_sequences_name_their_array(family):
    with pytest.raises(InputError, match=r"got shape \[8, 8, 1\]: save the array as `sequences` \[N, L, C\], or use"):
        build({"family": family, "input_shape": [8, 8, 1], "num_classes": 2})
