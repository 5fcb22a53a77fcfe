"""Data sets prepared by TensorFlow Datasets. The tests write them in its format, without TensorFlow."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from ev3_distill.data.sources import RowFile, load_data
from ev3_distill.errors import InputError


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    return tmp_path / "prepared"


@pytest.fixture
def tfds():
    pytest.importorskip("array_record", reason="the extra tfds is not installed")
    return pytest.importorskip("tensorflow_datasets", reason="the extra tfds is not installed")


def picture(seed, size=(4, 6)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def encoded(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def serialized(example):
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    for name, value in example.items():
        feature = message.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif np.asarray(value).dtype.kind == "f":
            feature.float_list.value.extend(np.ravel(value).tolist())
        else:
            feature.int64_list.value.extend(np.ravel(value).tolist())
    return message.SerializeToString()


def prepare(root, features, splits, *, name="toy/1.0.0", supervised=("image", "label"), file_format="array_record"):
    """Writes a data set of one shard per split."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import dataset_info, naming
    from tensorflow_datasets.core import splits as splits_lib

    folder = root / name
    folder.mkdir(parents=True)
    identity = dataset_info.DatasetIdentity(
        name=name.split("/")[0], version=tfds.core.Version(folder.name), data_dir=str(folder), module_name="toy"
    )
    info = dataset_info.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict(features), supervised_keys=supervised
    )
    info.set_file_format(file_format)
    infos = []
    for split, examples in splits.items():
        template = naming.ShardedFileTemplate(
            dataset_name=identity.name, data_dir=folder, split=split, filetype_suffix=file_format
        )
        path = str(template.sharded_filepath(shard_index=0, num_shards=1))
        writer = ArrayRecordWriter(path, "group_size:1")
        for example in examples:
            writer.write(serialized(example))
        writer.close()
        infos.append(splits_lib.SplitInfo(split, [len(examples)], 1, filename_template=template))
    info.set_splits(splits_lib.SplitDict(infos))
    info.write_to_directory(folder)
    return folder


def image_features(tfds, names=("ant", "bee")):
    image = tfds.features.Image(shape=(None, None, 3))
    return {"id": tfds.features.Text(), "image": image, "label": tfds.features.ClassLabel(names=list(names))}


def image_examples(seeds):
    return [{"id": b"x", "image": encoded(picture(seed)), "label": seed % 2} for seed in seeds]


SPLITS = {"train": image_examples(range(5)), "test": image_examples([7, 8]), "extra": image_examples([9])}


def test_images_are_read(tfds, root):
    prepare(root, image_features(tfds), SPLITS)
    dataset = load_data("tfds:toy")
    np.testing.assert_array_equal(dataset.inputs, [picture(seed) for seed in (0, 1, 2, 3, 4, 7, 8)])
    assert (dataset.inputs.dtype, dataset.labels.dtype) == (np.uint8, np.int32)
    assert (dataset.labels.tolist(), dataset.test_rows.tolist()) == ([0, 1, 0, 1, 0, 1, 0], [5, 6])
    assert (dataset.num_classes, dataset.class_names, dataset.source) == (2, ("ant", "bee"), "tfds:toy")
    assert "tensorflow" not in sys.modules


def test_images_are_decoded_once(tfds, root, monkeypatch):
    prepare(root, image_features(tfds), SPLITS)
    first = load_data("tfds:toy:1.0.0")
    monkeypatch.setattr("ev3_distill.data.sources.tfds._example", None)
    again, large = load_data("tfds:toy"), load_data("tfds:toy", memory=0)
    assert isinstance(large.inputs, RowFile)
    for other in (again, large):
        np.testing.assert_array_equal(first.inputs, other.inputs[:])
        np.testing.assert_array_equal(first.labels, other.labels)
        assert first.fingerprint == other.fingerprint


def test_versions_and_configs_are_selected(tfds, root):
    for name, seed in {"toy/big/1.0.0": 0, "toy/small/1.0.0": 2, "toy/small/2.0.0": 4}.items():
        prepare(root, image_features(tfds), {"train": image_examples([seed, seed + 1])}, name=name)
    for source, seed in {"toy/big": 0, "toy/small:1.0.0": 2, "toy/small": 4}.items():
        dataset = load_data(f"tfds:{source}")
        np.testing.assert_array_equal(dataset.inputs, [picture(seed), picture(seed + 1)])
        assert dataset.test_rows is None


def test_validation_replaces_a_missing_test_split(tfds, root):
    prepare(root, image_features(tfds), {"train": SPLITS["train"], "validation": SPLITS["test"]})
    assert load_data("tfds:toy").test_rows.tolist() == [5, 6]


def test_different_contents_have_different_fingerprints(tfds, root):
    names, prints = ("ant", "bee"), []
    for i, (labels, test) in enumerate([(names, "test"), (("ant", "cat"), "test"), (names, "extra")]):
        prepare(
            root, image_features(tfds, labels), {"train": SPLITS["train"], "test": SPLITS[test]}, name=f"toy/{i}.0.0"
        )
        prints.append(load_data(f"tfds:toy:{i}.0.0").fingerprint)
    prints.append(load_data("tfds:toy:0.0.0,size=8").fingerprint)
    assert len(set(prints)) == 4


def test_image_options_apply(tfds, root):
    prepare(root, image_features(tfds), {"train": [*SPLITS["train"], *image_examples([1])]})
    assert load_data("tfds:toy,size=8x9,channels=1").inputs.shape == (6, 8, 9, 1)


def test_images_of_different_sizes_are_refused(tfds, root):
    examples = [*SPLITS["train"], {"id": b"", "image": encoded(picture(0, (5, 6))), "label": 0}]
    prepare(root, image_features(tfds), {"train": examples})
    with pytest.raises(InputError, match=r"got train\[0\] of 4x6 and train\[5\] of 5x6 .*: tfds:toy,size=32 gives all"):
        load_data("tfds:toy")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3,), np.float32), ((2, 3), np.float32), ((4,), np.int64), ((2,), np.uint8)]
)
def test_arrays_are_read(tfds, root, shape, dtype):
    values = np.random.default_rng(0).integers(0, 100, (6, *shape)).astype(dtype)
    features = {
        "features": tfds.features.Tensor(shape=shape, dtype=dtype),
        "class": tfds.features.ClassLabel(num_classes=3),
    }
    examples = [{"features": value, "class": i % 3} for i, value in enumerate(values)]
    prepare(root, features, {"train": examples}, supervised=("features", "class"))
    dataset = load_data("tfds:toy")
    assert dataset.inputs.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    np.testing.assert_array_equal(dataset.inputs, values)
    assert (dataset.labels.tolist(), dataset.class_names) == ([0, 1, 2, 0, 1, 2], ("0", "1", "2"))


def test_labels_are_optional(tfds, root):
    features = {"image": tfds.features.Image(shape=(None, None, 3)), "size": tfds.features.Scalar(dtype=np.int64)}
    examples = [{"image": encoded(picture(seed)), "size": 3} for seed in range(3)]
    prepare(root, features, {"train": examples}, supervised=None)
    warnings = []
    dataset = load_data("tfds:toy", warn=warnings.append)
    assert (dataset.labels.tolist(), dataset.num_classes, dataset.class_names) == ([-1, -1, -1], 0, ())
    assert warnings == ["tfds:toy has no class labels: it is used without labels"]


def test_hidden_test_labels_become_missing(tfds, root):
    hidden = [example | {"label": -1} for example in SPLITS["test"]]
    prepare(root, image_features(tfds), {"train": SPLITS["train"], "test": hidden})
    assert load_data("tfds:toy").labels.tolist() == [0, 1, 0, 1, 0, -1, -1]


def test_damaged_examples_are_named_or_skipped(tfds, root):
    examples = [*SPLITS["train"], {"id": b"", "image": b"text", "label": 1}]
    prepare(root, image_features(tfds), {"train": examples, "test": SPLITS["test"]})
    with pytest.raises(
        InputError, match=r"got 1 of 8 that cannot be read: train\[5\] \(not an image of a known format\)"
    ):
        load_data("tfds:toy")
    dataset = load_data("tfds:toy", skip_corrupt=True, warn=lambda _: None)
    assert (dataset.labels.tolist(), dataset.test_rows.tolist()) == ([0, 1, 0, 1, 0, 1, 0], [5, 6])


def test_nonfinite_numbers_are_refused(tfds, root):
    features = {"x": tfds.features.Tensor(shape=(2,), dtype=np.float32), "y": tfds.features.ClassLabel(num_classes=2)}
    prepare(root, features, {"train": [{"x": [1.0, np.inf], "y": 0}, {"x": [1.0, 2.0], "y": 1}]}, supervised=("x", "y"))
    with pytest.raises(InputError, match=r"train\[0\] \(it holds nan or infinity\)"):
        load_data("tfds:toy")


# Missing parts.

PREPARE = r"pip install 'ev3-distill\[tfds-prepare\]' and run: tfds build {} --file_format=array_record"


@pytest.mark.parametrize("name", ["nonesuch", "mnist", "toy:3.0.0", "toy/other", "../toy"])
def test_a_data_set_that_is_not_prepared_is_refused(tfds, root, name):
    prepare(root, image_features(tfds), SPLITS)
    with pytest.raises(InputError, match=rf"got {name}, but no such files in {root}: {PREPARE.format(name)}") as caught:
        load_data(f"tfds:{name}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tfds, root):
    folder = prepare(root, image_features(tfds), SPLITS)
    next(folder.glob("*test*")).unlink()
    with pytest.raises(
        InputError, match=rf"got toy, but no {folder}/toy-test.array_record-.*: {PREPARE.format('toy')}"
    ):
        load_data("tfds:toy")


def test_a_format_without_random_access_is_refused(tfds, root):
    prepare(root, image_features(tfds), SPLITS, file_format="tfrecord")
    with pytest.raises(InputError, match=rf"as array_record; got toy in another .*{PREPARE.format('toy')} --overwrite"):
        load_data("tfds:toy")


def test_other_splits_and_features_are_refused(tfds, root):
    prepare(root, image_features(tfds), {"dev": SPLITS["train"]}, name="dev/1.0.0")
    with pytest.raises(InputError, match="must have a split named train; got dev: name another set"):
        load_data("tfds:dev")
    prepare(root, {"text": tfds.features.Text()}, {"train": [{"text": b"x"}]}, name="text/1.0.0", supervised=None)
    with pytest.raises(InputError, match="must have images or arrays; got text: name another set"):
        load_data("tfds:text")


def test_the_missing_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorflow_datasets"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    message = r"got no module tensorflow_datasets: pip install 'ev3-distill\[tfds\]'"
    with pytest.raises(InputError, match=message):
        load_data("tfds:toy")
