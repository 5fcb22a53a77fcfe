"""Data sources: names, the built-in digits, and npz files."""

import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ev3_distill.data.sources import KINDS, Dataset, RowFile, load_data, npz
from ev3_distill.errors import InputError

FOLDER = Path(os.environ.get("EV3_DISTILL_DATA", Path(__file__).parents[2] / "../shared/data"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(folder, *, write=np.savez, **arrays):
    write(folder / "set.npz", **arrays)
    return f"npz:{folder / 'set.npz'}"


def example_arrays(n=12, shape=(4, 3)):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, *shape)).astype(np.uint8), np.arange(n, dtype=np.uint8) % 3


# Naming a source.


@pytest.mark.parametrize(
    "source", ["mnist", "npz:", "npz", "digits:8", "digits:", "", "csv:a.csv", "set.npz", "folder:"]
)
def test_unknown_sources_are_refused(source):
    message = f"a data source is digits, npz:FILE, folder:DIR, folder:FILE.zip or tfds:NAME; got {source!r}: name one"
    with pytest.raises(InputError, match=re.escape(message)):
        load_data(source)


def test_every_kind_is_listed():
    assert list(KINDS) == ["digits", "npz", "folder", "tfds"]


# Digits.


def test_digits_load():
    digits = load_data("digits")
    assert isinstance(digits, Dataset)
    assert digits.inputs.shape == (1797, 8, 8, 1)
    assert (digits.inputs.dtype, digits.labels.dtype) == (np.float32, np.int32)
    assert (digits.inputs.min(), digits.inputs.max()) == (0, 1)
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (digits.num_classes, digits.class_names) == (10, tuple("0123456789"))
    assert digits.test_rows is None
    assert digits.source == "digits"
    # Runs of earlier versions are resumed by it.
    assert digits.fingerprint == "b1928e6c218481fdd34e37bb6ffd58ff76e98463514c32426c308c265f737f70"


def test_digits_equal_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits, theirs = load_data("digits"), load_digits()
    np.testing.assert_array_equal(digits.inputs[..., 0] * 16, theirs.images)
    np.testing.assert_array_equal(digits.labels, theirs.target)
    assert digits.class_names == tuple(map(str, theirs.target_names))


# Arrays.


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("x", "y"), [("inputs", "labels"), ("image", "label")])
def test_arrays_of_an_npz_file(tmp_path, x, y, write):
    inputs, labels = example_arrays()
    source = save(tmp_path, write=write, **{x: inputs, y: labels})
    dataset = load_data(source)
    assert dataset.inputs.shape == (12, 4, 3, 1)
    assert (dataset.inputs.dtype, dataset.labels.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(dataset.inputs[..., 0], inputs)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert (dataset.num_classes, dataset.class_names) == (3, ("0", "1", "2"))
    assert (dataset.source, dataset.test_rows) == (source, None)


def halves(inputs, labels, x="image", y="label"):
    return {f"train_{x}": inputs[:8], f"train_{y}": labels[:8], f"test_{x}": inputs[8:], f"test_{y}": labels[8:]}


@pytest.mark.parametrize(("x", "y"), [("inputs", "labels"), ("image", "label")])
def test_arrays_with_test_examples_of_their_own(tmp_path, x, y):
    inputs, labels = example_arrays()
    dataset = load_data(save(tmp_path, **halves(inputs, labels, x, y)))
    np.testing.assert_array_equal(dataset.test_rows, [8, 9, 10, 11])
    np.testing.assert_array_equal(dataset.inputs[..., 0], inputs)
    np.testing.assert_array_equal(dataset.labels, labels)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(5,), (4, 3, 2)])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16, ">f4", np.bool_])
def test_other_shapes_and_numbers_become_float32(tmp_path, shape, dtype, order):
    inputs = np.arange(12 * np.prod(shape)).reshape(12, *shape).astype(dtype, order=order)
    dataset = load_data(save(tmp_path, inputs=inputs, labels=np.arange(12) % 2), warn=lambda _: None)
    assert dataset.inputs.dtype == np.dtype(np.float32)
    np.testing.assert_array_equal(dataset.inputs, inputs.astype(np.float32))


def test_bytes_beside_floats_become_floats(tmp_path):
    inputs, labels = example_arrays()
    parts = halves(inputs, labels)
    parts["test_image"] = np.float32(parts["test_image"] / 255)
    dataset = load_data(save(tmp_path, **parts))
    np.testing.assert_array_equal(dataset.inputs[..., 0], inputs.astype(np.float32) / np.float32(255))


def test_sequences_keep_their_axes(tmp_path):
    inputs, labels = example_arrays()
    assert load_data(save(tmp_path, sequences=inputs, labels=labels)).inputs.shape == (12, 4, 3)
    parts = halves(inputs / 255, labels, "sequences", "labels")
    assert load_data(save(tmp_path, **parts)).inputs.shape == (12, 4, 3)
    with pytest.raises(InputError, match=r"sequences must be numbers \[N, L, C\]; got uint8 \[12, 4\]"):
        load_data(save(tmp_path, sequences=inputs[..., 0], labels=labels))


def test_groups_are_numbered_by_name(tmp_path):
    inputs, labels = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6) % 2
    assert load_data(save(tmp_path, inputs=inputs, labels=labels)).groups is None
    named = load_data(save(tmp_path, inputs=inputs, labels=labels, groups=["old", "new", "old", "old", "new", "new"]))
    assert (named.groups.tolist(), named.group_names) == ([1, 0, 1, 1, 0, 0], ("new", "old"))
    numbers = load_data(save(tmp_path, inputs=inputs, labels=labels, groups=[7, 7, 7, 3, 3, 3]))
    assert (numbers.groups.tolist(), numbers.group_names) == ([1, 1, 1, 0, 0, 0], ("3", "7"))
    assert len({named.fingerprint, numbers.fingerprint}) == 2
    parts = {f"{part}_image": inputs.reshape(6, 2, 1) for part in ("train", "test")}
    parts |= {f"{part}_label": labels for part in ("train", "test")}
    apart = load_data(save(tmp_path, **parts, train_groups=[0] * 6, test_groups=[1] * 6))
    assert apart.groups.tolist() == [0] * 6 + [1] * 6


def test_class_names_are_read(tmp_path):
    inputs, labels = example_arrays()
    dataset = load_data(save(tmp_path, inputs=inputs, labels=labels, class_names=["ant", "bee", "cat", "dog"]))
    assert (dataset.num_classes, dataset.class_names) == (4, ("ant", "bee", "cat", "dog"))


def test_other_arrays_are_not_read(tmp_path):
    inputs, labels = example_arrays()
    load_data(save(tmp_path, inputs=inputs, labels=labels, notes=np.array([{}], object)))


def test_different_contents_have_different_fingerprints(tmp_path):
    inputs, labels = example_arrays()
    other_inputs, other_labels = inputs.copy(), labels.copy()
    other_inputs[5, 2, 1] ^= 1
    other_labels[5] = 1 - other_labels[5] % 2
    contents = [
        {"inputs": inputs, "labels": labels},
        {"inputs": inputs.reshape(12, 3, 4), "labels": labels},
        {"inputs": other_inputs, "labels": labels},
        {"inputs": inputs, "labels": other_labels},
        {"inputs": inputs},
        halves(inputs, labels),
    ]
    prints = [load_data(save(tmp_path, **arrays)).fingerprint for arrays in contents]
    assert len(set(prints)) == len(prints)
    assert load_data(save(tmp_path, image=inputs, label=labels.astype(np.int64))).fingerprint == prints[0]


def test_mnist_loads():
    path = FOLDER / "mnist.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set EV3_DISTILL_DATA to a folder that has it")
    mnist = load_data(f"npz:{path}")
    assert (mnist.inputs.shape, mnist.inputs.dtype) == ((70_000, 28, 28, 1), np.uint8)
    assert (mnist.inputs.min(), mnist.inputs.max(), mnist.num_classes) == (0, 255, 10)
    np.testing.assert_array_equal(mnist.test_rows, np.arange(60_000, 70_000))


# Without labels.


@pytest.mark.parametrize("x", ["inputs", "image"])
def test_labels_are_optional(tmp_path, x):
    inputs, _ = example_arrays()
    dataset = load_data(save(tmp_path, **{x: inputs}))
    assert dataset.labels.dtype == np.int32
    assert (dataset.labels.tolist(), dataset.num_classes, dataset.class_names) == ([-1] * 12, 0, ())
    assert dataset.test_rows is None


def test_labels_are_optional_beside_names_and_splits(tmp_path):
    inputs, _ = example_arrays()
    named = load_data(save(tmp_path, inputs=inputs, class_names=["ant", "bee"]))
    assert (set(named.labels.tolist()), named.num_classes, named.class_names) == ({-1}, 2, ("ant", "bee"))
    without = load_data(save(tmp_path, inputs=inputs, labels=np.full(12, -1)))
    assert (set(without.labels.tolist()), without.num_classes) == ({-1}, 0)
    split = load_data(save(tmp_path, train_inputs=inputs[:9], test_inputs=inputs[9:]))
    assert (set(split.labels.tolist()), split.test_rows.tolist()) == ({-1}, [9, 10, 11])


@pytest.mark.parametrize("names", ["inputs label", "train_image test_image test_label", "inputs train_labels"])
def test_labels_without_matching_inputs_are_refused(tmp_path, names):
    inputs, labels = example_arrays()
    arrays = {name: labels if "label" in name else inputs for name in names.split()}
    with pytest.raises(InputError, match=r"must hold inputs and labels .*: rename or add arrays"):
        load_data(save(tmp_path, **arrays))


# Larger than memory.


def assert_same(one, other):
    assert one.inputs.shape == other.inputs.shape
    assert one.inputs.dtype == other.inputs.dtype
    np.testing.assert_array_equal(one.inputs[:], other.inputs[:])
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.fingerprint == other.fingerprint


LARGE = {
    "bytes": np.random.default_rng(0).integers(0, 256, (12, 4, 3)).astype(np.uint8),
    "floats": np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32),
    "doubles": np.random.default_rng(0).normal(size=(12, 2, 2, 2)),
}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("split", [False, True])
def test_large_inputs_stay_on_disk(tmp_path, cache, name, write, split):
    inputs, labels = LARGE[name], example_arrays()[1]
    arrays = halves(inputs, labels) if split else {"inputs": inputs, "labels": labels}
    source = save(tmp_path, write=write, **arrays)
    small = load_data(source)
    large = load_data(source, memory=small.inputs.nbytes - 1)
    assert isinstance(small.inputs, np.ndarray)
    assert isinstance(large.inputs, RowFile)
    assert_same(small, large)
    ready = write is np.savez and name != "doubles"  # then the rows are read where they lie
    assert len(list(cache.rglob("*.npy"))) == (not ready)
    assert_same(small, load_data(source, memory=0))  # once more, from the cache
    assert isinstance(load_data(source, memory=small.inputs.nbytes).inputs, np.ndarray)


def test_a_replaced_file_is_converted_again(tmp_path):
    for inputs in (LARGE["doubles"], LARGE["doubles"] + 1):
        source = save(tmp_path, inputs=inputs, labels=example_arrays()[1])
        np.testing.assert_array_equal(load_data(source, memory=0).inputs[:], inputs.astype(np.float32))


def test_large_files_are_converted_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "_CHUNK", 100)
    for name, inputs in LARGE.items():
        source = save(tmp_path, inputs=inputs, labels=example_arrays()[1])
        small = load_data(source)
        np.testing.assert_array_equal(
            small.inputs.reshape(inputs.shape), inputs.astype(small.inputs.dtype), err_msg=name
        )
        assert_same(small, load_data(source, memory=0))


def test_large_arrays_in_column_order_are_refused(tmp_path):
    inputs = np.asfortranarray(LARGE["floats"])
    source = save(tmp_path, inputs=inputs, labels=example_arrays()[1])
    np.testing.assert_array_equal(load_data(source).inputs, inputs)
    with pytest.raises(InputError, match=r"must be stored in row order; .*: save them with numpy.ascontiguousarray"):
        load_data(source, memory=100)


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_nonfinite_inputs_are_refused_in_every_chunk(tmp_path, monkeypatch, memory, write):
    monkeypatch.setattr(npz, "_CHUNK", 100)
    inputs, labels = LARGE["floats"].copy(), example_arrays()[1]
    inputs[10, 3] = np.inf
    with pytest.raises(InputError, match="inputs must be finite; got nan or infinity in row 10: repair"):
        load_data(save(tmp_path, write=write, inputs=inputs, labels=labels), memory=memory)
    with pytest.raises(InputError, match="test_image must be finite; got nan or infinity in row 2: repair"):
        load_data(save(tmp_path, write=write, **halves(inputs, labels)), memory=memory)


# Bad files.


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(InputError, match="does not exist or is not a file: check the path"):
            load_data(f"npz:{path}")


@pytest.mark.parametrize("memory", [None, 0])
def test_damaged_files_are_refused(tmp_path, memory):
    inputs, labels = example_arrays(n=400)
    np.savez_compressed(tmp_path / "whole.npz", inputs=inputs, labels=labels)
    np.savez(tmp_path / "plain.npz", inputs=inputs, labels=labels)
    np.save(tmp_path / "one.npy", inputs)
    whole, plain = (tmp_path / "whole.npz").read_bytes(), (tmp_path / "plain.npz").read_bytes()
    middle = len(whole) // 2
    broken = {
        "empty": b"",
        "text": b"label,pixel\n1,2\n",
        "truncated": whole[:middle],
        "damaged": whole[:middle] + b"\0" * 64 + whole[middle + 64 :],
        "plain damaged": plain[:1000] + bytes([plain[1000] ^ 1]) + plain[1001:],
        "npy": (tmp_path / "one.npy").read_bytes(),
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"must be a complete npz file; got one that cannot be read"):
            load_data(f"npz:{tmp_path / name}", memory=memory)


def test_a_header_larger_than_its_array_is_refused(tmp_path):
    header = np.lib.format.magic(1, 0) + (118).to_bytes(2, "little")
    about = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 1000), }"
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as file:
        file.writestr("inputs.npy", header + about.ljust(117) + b"\n" + b"\0" * 1000)
    with pytest.raises(InputError, match="inputs is not as long as its header says"):
        load_data(f"npz:{tmp_path / 'set.npz'}")


IMAGES, CLASSES = example_arrays()
NAN = np.zeros((12, 4), np.float32)
NAN[7, 1] = np.nan
BAD_ARRAYS = {
    "no arrays": ({}, "got no array: rename or add"),
    "other arrays": ({"x": IMAGES, "y": CLASSES}, "must hold inputs and labels .*; got x, y: rename or add"),
    "no inputs": ({"labels": CLASSES}, "; got labels: rename"),
    "no test part": ({"train_image": IMAGES, "train_label": CLASSES}, "; got train_image, train_label: rename"),
    "objects": ({"inputs": IMAGES, "labels": np.array([{}] * 12)}, "got Python objects in 'labels'"),
    "object inputs": ({"inputs": np.array([{}] * 12), "labels": CLASSES}, "got Python objects in 'inputs'"),
    "lengths": ({"inputs": IMAGES, "labels": CLASSES[:11]}, r"same length .*; got \[12, 4, 3\] and \[11\]"),
    "one-hot": (
        {"inputs": IMAGES, "labels": np.eye(12, dtype=int)},
        r"got .* and \[12, 12\], which is one-hot",
    ),
    "float labels": ({"image": IMAGES, "label": CLASSES * 1.0}, "label must be integers or text; got float64 of whole"),
    "negative": ({"inputs": IMAGES, "labels": CLASSES.astype(int) - 2}, "an example has none; got -2 in row 0"),
    "beyond names": (
        {"inputs": IMAGES, "labels": CLASSES, "class_names": ["a", "b"]},
        "below the number of class_names, 2; got 2 in row 2",
    ),
    "huge label": ({"inputs": IMAGES, "labels": CLASSES * np.uint64(2**62)}, f"got label {2**63} among 12 examples"),
    "names are numbers": (
        {"inputs": IMAGES, "labels": CLASSES, "class_names": np.arange(3)},
        r"class_names must be text \[K\]; got int64 \[3\]",
    ),
    "few groups": (
        {"inputs": IMAGES, "labels": CLASSES, "groups": CLASSES[:5]},
        r"groups must be an integer or a text for each example, \[12\]; got uint8 \[5\]: fix or remove them",
    ),
    "groups of a part": (
        {
            "train_image": IMAGES,
            "train_label": CLASSES,
            "test_image": IMAGES,
            "test_label": CLASSES,
            "train_groups": CLASSES,
        },
        r"\[12, 12\]; got no test_groups",
    ),
    "real groups": ({"inputs": IMAGES, "labels": CLASSES, "groups": CLASSES * 0.5}, r"got float64 \[12\]"),
    "one class": ({"inputs": IMAGES, "labels": CLASSES * 0 + 3}, "at least 2 classes must occur; got label 3 alone"),
    "nan": ({"inputs": NAN, "labels": CLASSES}, "inputs must be finite; got nan or infinity in row 7"),
    "overflow": ({"inputs": np.eye(12) * 1e300, "labels": CLASSES}, "nan or infinity in row 0"),
    "no examples": ({"inputs": IMAGES[:0], "labels": CLASSES[:0]}, r"at least one example; got shape \[0, 4, 3\]"),
    "numbers": ({"inputs": np.arange(12), "labels": CLASSES}, r"inputs must be numbers .*; got int64 \[12\]"),
    "text": ({"inputs": np.full((12, 2), "a"), "labels": CLASSES}, "inputs must be numbers .*; got <U1"),
    "two shapes": (
        {"train_image": IMAGES, "train_label": CLASSES, "test_image": IMAGES[:, 1:], "test_label": CLASSES},
        r"must have one shape; got .*\(4, 3, 1\).*\(3, 3, 1\)",
    ),
    "empty test part": (
        {"train_image": IMAGES, "train_label": CLASSES, "test_image": IMAGES[:0], "test_label": CLASSES[:0]},
        "test_image must hold at least one example",
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path, name):
    arrays, message = BAD_ARRAYS[name]
    with pytest.raises(InputError, match=message):
        load_data(save(tmp_path, **arrays))
