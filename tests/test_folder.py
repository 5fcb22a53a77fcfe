import errno
import io
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ev3_distill.errors import InputError
from ev3_distill.sources import RowFile, containers, decoded, gallery, load_data
from ev3_distill.sources.form import Form, parsed
from ev3_distill.sources.pictures import Unreadable, pixels

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("EV3_DISTILL_DATA", ROOT / "../shared/data"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


def picture(seed, size=(4, 6), channels=3):
    """Pixels that the seed decides."""
    array = np.random.default_rng(seed).integers(0, 256, (*size, channels)).astype(np.uint8)
    return array[..., 0] if channels == 1 else array


def encoded(array, suffix="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, suffix, **options)
    return buffer.getvalue()


TRAIN = ["train/ant/b.png", "train/ant/a.png", "train/bee/1.PNG", "train/bee/2.png"]
TEST = ["test/bee/x.png", "test/ant/y.png"]


def contents(names, **options):
    """An image for each name, by its place in the list."""
    return {name: encoded(picture(i, **options)) for i, name in enumerate(names)}


def tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(content)
    return f"folder:{root}"


def archive(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return f"folder:{path}"


def both(tmp_path, files):
    """The same files as a directory and as archives."""
    yield tree(tmp_path / "tree", files)
    yield archive(tmp_path / "set.zip", files)
    yield archive(tmp_path / "stored.ZIP", files, zipfile.ZIP_STORED)


def load(source, **options):
    """The data set, and what was said."""
    said = []
    return load_data(source, warn=said.append, **options), said


def seeds_of(dataset, **options):
    """Which of the pictures an array holds, row by row."""
    known = {picture(seed, **options).tobytes(): seed for seed in range(20)}
    return [known[row.tobytes()] for row in dataset.inputs[:]]


# Layouts.


def test_train_and_test(tmp_path):
    for source in both(tmp_path, contents(TRAIN + TEST)):
        dataset, said = load(source)
        assert (dataset.inputs.shape, dataset.inputs.dtype) == ((6, 4, 6, 3), np.uint8)
        assert seeds_of(dataset) == [1, 0, 2, 3, 5, 4]
        assert (dataset.labels.tolist(), dataset.labels.dtype) == ([0, 0, 1, 1, 0, 1], np.int32)
        assert (dataset.num_classes, dataset.class_names) == (2, ("ant", "bee"))
        assert dataset.test_rows.tolist() == [4, 5]
        assert (dataset.source, said) == (source, [])


def test_order_is_that_of_class_names(tmp_path):
    for source in both(tmp_path, contents(["b/1.png", "a/2.png", "a b/1.png", "a/10.png"])):
        dataset, _ = load(source)
        assert (dataset.class_names, seeds_of(dataset)) == (("a", "a b", "b"), [3, 1, 2, 0])


@pytest.mark.parametrize("name", ["val", "validation", "Valid", "TEST", "testing"])
def test_other_names_of_test(tmp_path, name):
    files = {path.replace("test/", f"{name}/"): content for path, content in contents(TRAIN + TEST).items()}
    dataset, said = load(tree(tmp_path / "tree", files))
    assert (dataset.test_rows.tolist(), seeds_of(dataset), said) == ([4, 5], [1, 0, 2, 3, 5, 4], [])


def test_validation_is_left_out_beside_test(tmp_path):
    files = contents(TRAIN + TEST) | {"val/ant/1.png": encoded(picture(9)), "val/bee/1.png": encoded(picture(8))}
    dataset, said = load(tree(tmp_path / "tree", files))
    assert seeds_of(dataset) == [1, 0, 2, 3, 5, 4]
    assert len(said) == 1
    assert "left out 2 images for validation" in said[0]


@pytest.mark.parametrize("prefix", ["", "images/", "a/b/"])
def test_classes_alone(tmp_path, prefix):
    names = [f"{prefix}{name.removeprefix('train/')}" for name in TRAIN]
    for source in both(tmp_path, contents(names)):
        dataset, _ = load(source)
        assert (seeds_of(dataset), dataset.labels.tolist()) == ([1, 0, 2, 3], [0, 0, 1, 1])
        assert (dataset.test_rows, dataset.class_names) == (None, ("ant", "bee"))


def test_train_alone_and_folders_around(tmp_path):
    for source in both(tmp_path, contents([f"cifar/{name}" for name in TRAIN + TEST])):
        assert load(source)[0].test_rows.tolist() == [4, 5]
    dataset, _ = load(tree(tmp_path / "train alone", contents(TRAIN)))
    assert (dataset.test_rows, dataset.labels.tolist()) == (None, [0, 0, 1, 1])


def test_a_class_may_be_called_train(tmp_path):
    dataset, _ = load(tree(tmp_path / "tree", contents(["bus/1.png", "train/1.png", "car/1.png"])))
    assert dataset.class_names == ("bus", "car", "train")
    assert dataset.test_rows is None


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_images_alone(tmp_path, prefix):
    for source in both(tmp_path, contents([f"{prefix}b.png", f"{prefix}a.png"])):
        dataset, said = load(source)
        assert seeds_of(dataset) == [1, 0]
        assert (dataset.labels.tolist(), dataset.num_classes, dataset.class_names) == ([-1, -1], 0, ())
        assert len(said) == bool(prefix)


def test_unlabelled_train_and_test(tmp_path):
    dataset, _ = load(tree(tmp_path / "tree", contents(["train/a.png", "test/a.png", "train/b.png"])))
    assert (seeds_of(dataset), dataset.labels.tolist(), dataset.test_rows.tolist()) == ([0, 2, 1], [-1] * 3, [2])


def test_what_is_no_image_is_ignored_and_counted(tmp_path):
    hidden = {"__MACOSX/train/ant/._a.png": b"x", ".git/a.png": b"x", "train/ant/.a.png": b"x", "train/.x/a.png": b"x"}
    for source in both(tmp_path, contents(TRAIN + TEST) | hidden):
        assert load(source)[1] == []
    for source in both(
        tmp_path / "more", contents(TRAIN + TEST) | hidden | {"README.txt": b"x", "train/ant/LIST": b"x"}
    ):
        dataset, said = load(source)
        assert len(dataset.labels) == 6
        assert len(said) == 1
        assert "ignored 2 files that are no images, such as README.txt" in said[0]


def test_an_archive_within_a_directory(tmp_path):
    (tmp_path / "tree").mkdir()
    archive(tmp_path / "tree/set.zip", contents(TRAIN + TEST))
    assert seeds_of(load(f"folder:{tmp_path / 'tree'}")[0]) == [1, 0, 2, 3, 5, 4]


def test_links(tmp_path):
    tree(tmp_path / "real", contents(["a.png", "b.png"]))
    (tmp_path / "tree/bee").mkdir(parents=True)
    (tmp_path / "tree/ant").symlink_to(tmp_path / "real")
    (tmp_path / "tree/bee/c.png").symlink_to(tmp_path / "real/a.png")
    (tmp_path / "tree/bee/round.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "tree/bee/pipe.png")
    assert seeds_of(load(f"folder:{tmp_path / 'tree'}")[0]) == [0, 1, 0]
    (tmp_path / "real/.loop").symlink_to(tmp_path / "tree")
    (tmp_path / "loop/ant").mkdir(parents=True)
    (tmp_path / "loop/ant/loop").symlink_to(tmp_path / "loop")
    (tmp_path / "loop/ant/a.png").write_bytes(encoded(picture(0)))
    assert seeds_of(load(f"folder:{tmp_path / 'loop'}")[0]) == [0]


def test_members_that_point_outside_are_ignored(tmp_path):
    files = contents(TRAIN) | {"../../escape.png": b"x", "train/../../escape.png": b"x"}
    assert seeds_of(load(archive(tmp_path / "set.zip", files))[0]) == [1, 0, 2, 3]
    windows = {name.replace("/", "\\"): content for name, content in contents(TRAIN + TEST).items()}
    assert seeds_of(load(archive(tmp_path / "windows.zip", windows))[0]) == [1, 0, 2, 3, 5, 4]


X = b"never decoded"
BAD_LAYOUTS = {
    "nothing": ({}, r"must hold images \(.jpg .*\); got 0 other files: check the path"),
    "no images": ({"a.txt": X, "b/c.md": X}, "got 2 other files: check the path"),
    "class not in test": ({**contents(TRAIN), "test/ant/1.png": X}, "got none of class bee in test: add or remove it"),
    "class not in train": (
        {**contents(TRAIN + TEST), "test/cat/1.png": X, "test/dog/1.png": X},
        "same classes; got none of class cat and 1 more in train",
    ),
    "empty class": ({**contents(TRAIN), "train/cow/": b""}, "every class needs images; got train/cow/ without one"),
    "class of texts": ({**contents(["a/1.png", "b/1.png"]), "c/1.txt": X}, "got c/ without one: add some or remove it"),
    "empty test": ({**contents(TRAIN), "test/": b""}, r"must have images in train/ and test/; got test/ without one"),
    "no train": (contents(TEST), "must have images in train/ and test/; got test alone"),
    "twice": ({**contents(TRAIN), "Train/ant/1.png": X}, "must hold each split once; got Train, train: merge them"),
    "too deep": (
        contents(["x/a/1.png", "x/b/c/2.png", "y/a/3.png"]),
        r"must be laid out as .*; got y/a/3.png and x/b/c/2.png: move images, or name the folder above CLASS/",
    ),
    "beside classes": (contents(["a/1.png", "b/1.png", "2.png"]), "must be laid out as .*; got 2.png and b/1.png"),
    "beside splits": (
        contents([*TRAIN, "extra/a/1.png"]),
        "train/ and test/ alone; got extra beside them: move it away",
    ),
    "unlabelled test": (contents([*TRAIN, "test/1.png"]), "got none of images beside the class folders in train"),
    "one class": (contents(["train/a/1.png", "test/a/1.png"]), "at least 2 classes must occur; got a alone"),
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_bad_layouts(tmp_path, name):
    files, message = BAD_LAYOUTS[name]
    (tmp_path / "tree").mkdir()
    for source in both(tmp_path, files):
        with pytest.raises(InputError, match=message) as caught:
            load_data(source, warn=lambda _: None)
        assert "\n" not in str(caught.value)


def test_places_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"needs a directory or a zip file; got .*none, which is missing"):
        load_data(f"folder:{tmp_path / 'none'}")
    whole = archive(tmp_path / "set.zip", contents(TRAIN + TEST)).removeprefix("folder:")
    (tmp_path / "text.zip").write_bytes(b"text")
    (tmp_path / "half.zip").write_bytes(Path(whole).read_bytes()[:500])
    for name in ("text.zip", "half.zip"):
        with pytest.raises(InputError, match=rf"must be a whole zip file; got .*{name} .*: pack it again"):
            load_data(f"folder:{tmp_path / name}")


def test_a_name_that_occurs_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        for content in (b"a", b"b"):
            file.writestr("train/ant/1.png", content)
    with pytest.raises(InputError, match="a name must occur once; got 1 that occur again"):
        load_data(f"folder:{tmp_path / 'set.zip'}")


# Images of all sorts.


def test_formats(tmp_path):
    lossless = ["png", "bmp", "webp", "tiff", "ppm"]
    files = {f"{suffix}.{suffix}": encoded(picture(i), suffix, lossless=True) for i, suffix in enumerate(lossless)}
    dataset, _ = load(tree(tmp_path / "tree", files))
    assert dict(zip(sorted(files), seeds_of(dataset), strict=True)) == {f"{s}.{s}": i for i, s in enumerate(lossless)}
    smooth = np.tile(np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None], (1, 32, 3))
    dataset, _ = load(tree(tmp_path / "jpeg", {"1.jpg": encoded(smooth, "jpeg"), "2.JPEG": encoded(smooth, "jpeg")}))
    assert np.abs(dataset.inputs.astype(int) - smooth).max() < 8


def test_grey_and_coloured(tmp_path):
    grey = contents(["ant/a.png", "bee/b.png"], channels=1)
    dataset, _ = load(tree(tmp_path / "grey", grey))
    assert dataset.inputs.shape == (2, 4, 6, 1)
    assert seeds_of(dataset, channels=1) == [0, 1]
    for name in ("bee/z.png", "ant/0.png"):  # after the grey ones, and before them
        dataset, _ = load(tree(tmp_path / name, grey | {name: encoded(picture(2))}))
        assert dataset.inputs.shape == (3, 4, 6, 3)
        expected = {0: picture(0, channels=1), 1: picture(1, channels=1)}
        expected = [np.repeat(array[..., None], 3, axis=-1) for array in expected.values()]
        expected.insert(2 if name > "bee" else 0, picture(2))
        np.testing.assert_array_equal(dataset.inputs, expected)


def test_grey_and_coloured_in_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "_CHUNK", 60)
    files = {f"{i:02}.png": encoded(picture(i, channels=3 if i == 17 else 1)) for i in range(20)}
    told = []
    dataset, _ = load(tree(tmp_path / "tree", files), tell=lambda done, total: told.append((done, total)))
    np.testing.assert_array_equal(dataset.inputs[17], picture(17))
    for i in {*range(20)} - {17}:
        np.testing.assert_array_equal(dataset.inputs[i], np.repeat(picture(i, channels=1)[..., None], 3, axis=-1))
    assert told[-1] == (20, 20)
    assert {total for _, total in told} == {20}


AS_IT_IS = Form()


def shape_and_values(image, form=AS_IT_IS, suffix="png"):
    buffer = io.BytesIO()
    image.save(buffer, suffix)
    array = pixels(buffer.getvalue(), form)
    assert array.dtype == np.uint8
    return array.shape, array.reshape(-1, array.shape[-1]).tolist()


def test_modes():
    """Two pixels in each of the modes that files have."""
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert shape_and_values(bits) == ((1, 2, 1), [[0], [255]])
    grey_alpha = Image.fromarray(np.array([[[7, 0], [9, 255]]], np.uint8))
    assert shape_and_values(grey_alpha) == ((1, 2, 1), [[7], [9]])
    alpha = Image.fromarray(np.array([[[1, 2, 3, 0], [4, 5, 6, 255]]], np.uint8))
    assert shape_and_values(alpha) == ((1, 2, 3), [[1, 2, 3], [4, 5, 6]])
    wide = Image.fromarray(np.array([[0, 65535, 32768, 257 * 7 + 128, 257 * 7 + 129]], np.uint16))
    assert shape_and_values(wide) == ((1, 5, 1), [[0], [255], [128], [7], [8]])
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 255, 255, 0]]], np.uint8), "CMYK")
    assert shape_and_values(cmyk, suffix="tiff") == ((1, 2, 3), [[255, 255, 255], [255, 0, 0]])
    for palette, expected in ([9, 9, 9, 4, 4, 4], [[9], [4]]), ([9, 9, 9, 4, 4, 5], [[9, 9, 9], [4, 4, 5]]):
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette(palette)
        assert shape_and_values(image) == ((1, 2, len(expected[0])), expected)
    assert shape_and_values(alpha, Form(channels=1)) == ((1, 2, 1), [[2], [5]])
    assert shape_and_values(bits, Form(channels=3)) == ((1, 2, 3), [[0] * 3, [255] * 3])


@pytest.mark.parametrize(
    ("array", "message"),
    [(np.array([[0.5]], np.float32), "floats"), (np.array([[0, 65536]], np.int32), "more than 16 bits")],
)
def test_modes_without_a_scale(array, message):
    with pytest.raises(Unreadable, match=message):
        pixels(encoded(array, "tiff"), Form())


def test_no_format_that_runs_a_program():
    with pytest.raises(Unreadable, match="not an image of a known format"):
        pixels(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", Form())


# One size for all.


def test_sizes_that_differ(tmp_path):
    files = contents(TRAIN + TEST) | {"train/bee/0.png": encoded(picture(9, size=(5, 6)))}
    for source in both(tmp_path, files):
        message = "one size; got train/ant/a.png of 4x6 and train/bee/0.png of 5x6 (height x width): "
        with pytest.raises(InputError, match=re.escape(f"{message}{source},size=32 gives all that size")):
            load_data(source)
        assert load_data(f"{source},size=8").inputs.shape == (7, 8, 8, 3)
        assert load_data(f"{source},size=3x5,channels=1").inputs.shape == (7, 3, 5, 1)


def test_resizing_averages(tmp_path):
    board = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(200)
    source = tree(
        tmp_path / "tree", {"a.png": encoded(board.astype(np.uint8)), "b.png": encoded(picture(0, (8, 8), 1))}
    )
    dataset, _ = load(f"{source},size=8")
    np.testing.assert_array_equal(dataset.inputs[1, ..., 0], picture(0, (8, 8), 1))  # untouched
    assert np.abs(dataset.inputs[0, 2:-2, 2:-2].astype(int) - 100).max() <= 2  # antialiased


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("DIR", ("DIR", Form())),
        ("a,b", ("a,b", Form())),
        ("DIR,size=32", ("DIR", Form((32, 32)))),
        ("a.zip,size=32x48,channels=3", ("a.zip", Form((32, 48), 3))),
        ("a,b,channels=1", ("a,b", Form(channels=1))),
        ("a,size=3/b", ("a,size=3/b", Form())),
        ("there,size=3", ("there,size=3", Form())),
        ("there,size=3,size=4", ("there,size=3", Form((4, 4)))),
    ],
)
def test_options(place, expected):
    assert parsed(place, lambda place: place == "there,size=3") == expected


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("D,size=0", "a height and a width; got '0': try 32 or 32x48"),
        ("D,size=3x0", "a height and a width; got '3x0'"),
        ("D,size=big", "a height and a width; got 'big'"),
        ("D,channels=2", "is 1 or 3; got '2'"),
        ("D,sizes=3", "options of a source of images are size and channels; got sizes: try size=32"),
    ],
)
def test_bad_options(place, message):
    with pytest.raises(InputError, match=message):
        load_data(f"folder:{place}")


# Images that cannot be read.


def damaged():
    whole = encoded(picture(0, (32, 32)))
    return {
        "a/cut.png": whole[: len(whole) // 2],
        "b/empty.png": b"",
        "b/text.png": b"text",
        "a/size.bmp": b"BM"
        + struct.pack("<IHHI", 99, 0, 0, 54)
        + struct.pack("<IiiHH", 40, 2**30, 2**30, 1, 24)
        + b"\0" * 24,
        "a/gif.jpg": b"GIF89a",
        "b/half.jpg": encoded(picture(0, (32, 32)), "jpeg")[:400],
    }


def test_damaged_images_are_named_and_counted(tmp_path):
    whole = contents(["a/1.png", "b/1.png", "b/2.png"], size=(32, 32))
    for source in both(tmp_path, whole | damaged()):
        with pytest.raises(
            InputError, match=r"got 6 of 9 that cannot be read: .* and 1 more: repair or remove"
        ) as caught:
            load_data(source)
        for name in sorted(damaged())[:5]:
            assert f"{name} (" in str(caught.value)
        assert "\n" not in str(caught.value)
        dataset, said = load(source, skip_corrupt=True)
        assert (seeds_of(dataset, size=(32, 32)), dataset.labels.tolist()) == ([0, 1, 2], [0, 1, 1])
        assert len(said) == 1
        assert "left out 6 of 9 that cannot be read: a/cut.png (" in said[0]
        assert load_data(source, skip_corrupt=True, warn=said.append).fingerprint == dataset.fingerprint


def test_test_rows_without_the_damaged(tmp_path):
    files = contents(TRAIN + TEST)
    for name in ("train/ant/a.png", "test/ant/0.png"):
        files[name] = b""
    dataset, _ = load(tree(tmp_path / "tree", files), skip_corrupt=True)
    assert (seeds_of(dataset), dataset.test_rows.tolist()) == ([0, 2, 3, 5, 4], [3, 4])


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["train/bee/1.PNG", "train/bee/2.png"], "images of class bee must be readable; got none in train: repair"),
        (["test/ant/y.png"], "images of class ant must be readable; got none in test"),
        (TRAIN + TEST, r"some example must be readable; got none, first train/ant/a.png \(empty\): check the files"),
    ],
)
def test_a_class_that_cannot_be_read(tmp_path, lost, message):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST) | dict.fromkeys(lost, b""))
    with pytest.raises(InputError, match=message):
        load(source, skip_corrupt=True)


def test_damage_to_an_archive_is_that_of_its_member(tmp_path):
    for source in [*both(tmp_path, contents(TRAIN + TEST))][1:]:
        path = Path(source.removeprefix("folder:"))
        with zipfile.ZipFile(path) as file:
            place = file.getinfo("train/bee/2.png").header_offset + 60
        content = bytearray(path.read_bytes())
        content[place] ^= 255
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"got 1 of 6 that cannot be read: train/bee/2.png \(.*\): repair"):
            load_data(source)


def test_damage_that_the_image_cannot_tell(tmp_path):
    path = tmp_path / "set.zip"
    source = archive(
        path, {f"{name}.bmp": encoded(picture(i), "bmp") for i, name in enumerate("ab")}, zipfile.ZIP_STORED
    )
    with zipfile.ZipFile(path) as file:
        place = file.getinfo("b.bmp").header_offset + 110  # among the pixels
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"got 1 of 2 that cannot be read: b.bmp \(its bytes do not match their checksum\)"
    ):
        load_data(source)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rare_compression(tmp_path, compression):
    assert seeds_of(load(archive(tmp_path / "set.zip", contents(TRAIN + TEST), compression))[0]) == [1, 0, 2, 3, 5, 4]


def test_without_leave_to_read(tmp_path, monkeypatch):
    source, read, scan = tree(tmp_path / "tree", contents(TRAIN + TEST)), containers.Directory._bytes, os.scandir

    def guarded(call, name):
        def called(*args):
            if str(args[-1]).endswith(name):
                raise PermissionError(errno.EACCES, "Permission denied", str(args[-1]))
            return call(*args)

        return called

    monkeypatch.setattr(containers.Directory, "_bytes", guarded(read, "a.png"))
    with pytest.raises(InputError, match=r"train/ant/a.png \(Permission denied\)"):
        load_data(source)
    monkeypatch.setattr(os, "scandir", guarded(scan, "train"))
    with pytest.raises(InputError, match=r"needs leave to read what it holds; got .*train \(Permission denied\)"):
        load_data(source)


def test_a_file_that_changes_between_two_readings(tmp_path, monkeypatch):
    source, read = tree(tmp_path / "tree", contents(TRAIN + TEST)), containers.Directory._bytes
    seen = []

    def changing(directory, name):
        seen.append(name)
        return read(directory, name) + b" " * (seen.count(name) > 1)

    monkeypatch.setattr(containers.Directory, "_bytes", changing)
    with pytest.raises(InputError, match="must stay as it is while it is read; got a change: run again"):
        load_data(source)


# The fingerprint.


def test_fingerprint_tells_contents_apart(tmp_path):
    files = contents(TRAIN + TEST)
    others = [
        files,
        files | {"train/ant/a.png": encoded(picture(9))},
        {name.replace("ant/", "fly/"): content for name, content in files.items()},
        {name.replace("a.png", "c.png"): content for name, content in files.items()},
    ]
    prints = [load(tree(tmp_path / str(i), other))[0].fingerprint for i, other in enumerate(others)]
    prints += [load(f"folder:{tmp_path / '0'},{option}")[0].fingerprint for option in ("size=8", "channels=1")]
    prints += [load(archive(tmp_path / "set.zip", other))[0].fingerprint for other in others]
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in prints)
    assert load(tree(tmp_path / "again", files | {"README.md": X}))[0].fingerprint == prints[0]


def test_fingerprint_tells_what_was_left_out(tmp_path, monkeypatch):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST))
    whole, _ = load(source)

    def pickier(content, form):
        if content == encoded(picture(1)):
            raise Unreadable("not to my taste")
        return pixels(content, form)

    monkeypatch.setattr("PIL.__version__", "0.1")
    monkeypatch.setattr("ev3_distill.sources.folder.pixels", pickier)
    part, _ = load(source, skip_corrupt=True)
    assert len(part.labels) == len(whole.labels) - 1
    assert part.fingerprint != whole.fingerprint


# The cache.


def counted(monkeypatch):
    """The calls of the decoder."""
    calls = []
    monkeypatch.setattr("ev3_distill.sources.folder.pixels", lambda *args: calls.append(1) or pixels(*args))
    return calls


def test_decoded_once(tmp_path, cache, monkeypatch):
    calls = counted(monkeypatch)
    for source in both(tmp_path, contents(TRAIN + TEST)):
        first, _ = load(source)
        done = len(calls)
        again, _ = load(source)
        large, _ = load(source, memory=first.inputs.nbytes - 1)
        assert len(calls) == done > 0
        assert isinstance(large.inputs, RowFile)
        for other in (again, large):
            np.testing.assert_array_equal(first.inputs, other.inputs[:])
            assert first.fingerprint == other.fingerprint
    assert len(list(cache.iterdir())) == 6  # rows and notes of a directory and two archives
    rows = np.load(next(cache.glob("*.npy")))
    assert (rows.shape, rows.dtype) == ((6, 4, 6, 3), np.uint8)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit": flip,
    "cut": lambda path: os.truncate(path, 300),
    "empty": lambda path: path.write_bytes(b""),
    "no notes": lambda path: path.with_suffix(".json").unlink(),
    "other notes": lambda path: path.with_suffix(".json").write_text("[]"),
    "half the notes": lambda path: os.truncate(path.with_suffix(".json"), 20),
    "no rows": lambda path: path.unlink(),
}


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_cache_is_made_anew(tmp_path, cache, monkeypatch, name, memory):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST))
    first, _ = load(source)
    calls = counted(monkeypatch)
    DAMAGE[name](next(cache.glob("*.npy")))
    again, said = load(source, memory=memory)
    assert len(calls) >= 6
    np.testing.assert_array_equal(first.inputs, again.inputs[:])
    assert [sentence for sentence in said if "damaged: made anew" in sentence] == said
    assert len(said) == (name != "no rows")
    done = len(calls)
    assert load(source)[1] == []
    assert len(calls) == done


def test_another_pillow_decodes_anew(tmp_path, cache, monkeypatch):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST))
    first, _ = load(source)
    monkeypatch.setattr("PIL.__version__", "0.1")
    again, _ = load(source)
    assert len(list(cache.glob("*.npy"))) == 2
    assert first.fingerprint == again.fingerprint


def test_a_disk_that_fills(tmp_path, cache, monkeypatch):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST))

    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(decoded.RowWriter, "add", full)
        with pytest.raises(
            InputError, match=r"needs room .*; got No space left on device: free some.*EV3_DISTILL_CACHE"
        ):
            load_data(source)
    assert list(cache.iterdir()) == []
    assert len(load(source)[0].labels) == 6


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="name another folder in the environment variable EV3_DISTILL_CACHE"):
        load_data(tree(tmp_path / "tree", contents(TRAIN + TEST)))


def test_a_run_that_is_stopped_leaves_nothing(tmp_path, cache):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_data(tree(tmp_path / "tree", contents(TRAIN + TEST)), tell=stop)
    assert list(cache.iterdir()) == []


# Real size.


def test_decoding_and_reading_take_no_memory(tmp_path):
    """600 images become 118 MB of pixels, of which less than 60 MB are resident at any time."""
    image = encoded(np.zeros((256, 256, 3), np.uint8))
    source = archive(tmp_path / "set.zip", {f"{label}/{i:03}.png": image for label in "ab" for i in range(300)})
    code = f"""
import resource
from ev3_distill.sources import load_data
import PIL.Image; PIL.Image.init()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
data = load_data({source!r}, memory=1 << 20)
for start in range(0, 600, 50): data.inputs[start : start + 50]
print(data.inputs.nbytes, (peak() - before) << 10)
"""
    environment = os.environ | {"EV3_DISTILL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    size, grown = map(int, done.stdout.split())
    assert size == 600 * 256 * 256 * 3
    assert grown < 60 << 20


def test_cifar10(tmp_path):
    """The test part of it, and a look at the whole archive's layout."""
    path = FOLDER / "cifar10_jpeg.zip"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set EV3_DISTILL_DATA to a folder that has it")
    with zipfile.ZipFile(path) as file:
        names = [name for name in file.namelist() if name.endswith("7.jpg")]
        source = archive(tmp_path / "part.zip", {name: file.read(name) for name in names})
    cifar = load_data(source)
    assert (cifar.inputs.shape, len(cifar.test_rows)) == ((6000, 32, 32, 3), 1000)
    assert cifar.class_names == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    assert np.bincount(cifar.labels).tolist() == [600] * 10
    np.testing.assert_allclose(cifar.inputs.mean(axis=(0, 1, 2)) / 255, [0.491, 0.482, 0.447], atol=0.01)
