"""Image folders and archives: layouts, fingerprints, and data sets of realistic size."""

import os
import re
import socket
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_files import TEST, TRAIN, archive, both, contents, encoded, load, picture, seeds_of, tree

from ev3_distill.data.sources import load_data
from ev3_distill.data.sources.image_decode import decode_image
from ev3_distill.data.sources.unreadable import Unreadable
from ev3_distill.errors import InputError

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("EV3_DISTILL_DATA", ROOT / "../shared/data"))


pytestmark = pytest.mark.usefixtures("cache")


# Layouts.


def test_train_and_test_folders_become_splits(tmp_path):
    for source in both(tmp_path, contents(TRAIN + TEST)):
        dataset, warnings = load(source)
        assert (dataset.inputs.shape, dataset.inputs.dtype) == ((6, 4, 6, 3), np.uint8)
        assert seeds_of(dataset) == [1, 0, 2, 3, 5, 4]
        assert (dataset.labels.tolist(), dataset.labels.dtype) == ([0, 0, 1, 1, 0, 1], np.int32)
        assert (dataset.num_classes, dataset.class_names) == (2, ("ant", "bee"))
        assert dataset.test_rows.tolist() == [4, 5]
        assert (dataset.source, warnings) == (source, [])


def test_classes_are_numbered_alphabetically(tmp_path):
    for source in both(tmp_path, contents(["b/1.png", "a/2.png", "a b/1.png", "a/10.png"])):
        dataset, _ = load(source)
        assert (dataset.class_names, seeds_of(dataset)) == (("a", "a b", "b"), [3, 1, 2, 0])


@pytest.mark.parametrize("name", ["val", "validation", "Valid", "TEST", "testing"])
def test_folders_of_test_may_have_other_names(tmp_path, name):
    files = {path.replace("test/", f"{name}/"): content for path, content in contents(TRAIN + TEST).items()}
    dataset, warnings = load(tree(tmp_path / "tree", files))
    assert (dataset.test_rows.tolist(), seeds_of(dataset), warnings) == ([4, 5], [1, 0, 2, 3, 5, 4], [])


def test_validation_images_are_ignored_if_there_are_test_images(tmp_path):
    files = contents(TRAIN + TEST) | {"val/ant/1.png": encoded(picture(9)), "val/bee/1.png": encoded(picture(8))}
    dataset, warnings = load(tree(tmp_path / "tree", files))
    assert seeds_of(dataset) == [1, 0, 2, 3, 5, 4]
    assert len(warnings) == 1
    assert "left out 2 images for validation" in warnings[0]


@pytest.mark.parametrize("prefix", ["", "images/", "a/b/"])
def test_class_folders_without_splits(tmp_path, prefix):
    names = [f"{prefix}{name.removeprefix('train/')}" for name in TRAIN]
    for source in both(tmp_path, contents(names)):
        dataset, _ = load(source)
        assert (seeds_of(dataset), dataset.labels.tolist()) == ([1, 0, 2, 3], [0, 0, 1, 1])
        assert (dataset.test_rows, dataset.class_names) == (None, ("ant", "bee"))


def test_train_folder_alone_and_enclosing_folders(tmp_path):
    for source in both(tmp_path, contents([f"cifar/{name}" for name in TRAIN + TEST])):
        assert load(source)[0].test_rows.tolist() == [4, 5]
    dataset, _ = load(tree(tmp_path / "train alone", contents(TRAIN)))
    assert (dataset.test_rows, dataset.labels.tolist()) == (None, [0, 0, 1, 1])


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    dataset, _ = load(tree(tmp_path / "tree", contents(["bus/1.png", "train/1.png", "car/1.png"])))
    assert dataset.class_names == ("bus", "car", "train")
    assert dataset.test_rows is None


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_images_without_class_folders_have_no_labels(tmp_path, prefix):
    for source in both(tmp_path, contents([f"{prefix}b.png", f"{prefix}a.png"])):
        dataset, warnings = load(source)
        assert seeds_of(dataset) == [1, 0]
        assert (dataset.labels.tolist(), dataset.num_classes, dataset.class_names) == ([-1, -1], 0, ())
        assert len(warnings) == bool(prefix)


def test_splits_without_class_folders_have_no_labels(tmp_path):
    dataset, _ = load(tree(tmp_path / "tree", contents(["train/a.png", "test/a.png", "train/b.png"])))
    assert (seeds_of(dataset), dataset.labels.tolist(), dataset.test_rows.tolist()) == ([0, 2, 1], [-1] * 3, [2])


def test_other_files_are_ignored_with_a_warning(tmp_path):
    hidden = {"__MACOSX/train/ant/._a.png": b"x", ".git/a.png": b"x", "train/ant/.a.png": b"x", "train/.x/a.png": b"x"}
    for source in both(tmp_path, contents(TRAIN + TEST) | hidden):
        assert load(source)[1] == []
    for source in both(
        tmp_path / "more", contents(TRAIN + TEST) | hidden | {"README.txt": b"x", "train/ant/LIST": b"x"}
    ):
        dataset, warnings = load(source)
        assert len(dataset.labels) == 6
        assert len(warnings) == 1
        assert "ignored 2 files that are not images, such as README.txt" in warnings[0]


def test_a_directory_may_hold_one_archive(tmp_path):
    (tmp_path / "tree").mkdir()
    archive(tmp_path / "tree/set.zip", contents(TRAIN + TEST))
    assert seeds_of(load(f"folder:{tmp_path / 'tree'}")[0]) == [1, 0, 2, 3, 5, 4]


def test_links_are_followed_once(tmp_path):
    tree(tmp_path / "real", contents(["a.png", "b.png"]))
    (tmp_path / "tree/bee").mkdir(parents=True)
    (tmp_path / "tree/ant").symlink_to(tmp_path / "real")
    (tmp_path / "tree/bee/c.png").symlink_to(tmp_path / "real/a.png")
    (tmp_path / "tree/bee/round.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "tree/bee/self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "tree/bee/pipe.png")
    dataset, warnings = load(f"folder:{tmp_path / 'tree'}")
    assert seeds_of(dataset) == [0, 1, 0]
    assert len(warnings) == 2
    assert "left out 3 entries that are not files, such as bee/pipe.png (FIFO)" in warnings[0]
    assert (
        "followed 2 symbolic links, such as ant; 1 files occur more than once by a link, such as bee/c.png"
        in warnings[1]
    )
    (tmp_path / "real/.loop").symlink_to(tmp_path / "tree")
    (tmp_path / "loop/ant").mkdir(parents=True)
    (tmp_path / "loop/ant/loop").symlink_to(tmp_path / "loop")
    (tmp_path / "loop/ant/a.png").write_bytes(encoded(picture(0)))
    dataset, warnings = load(f"folder:{tmp_path / 'loop'}")
    assert seeds_of(dataset) == [0]
    assert "left out 1 entries that are not files, such as ant/loop (link to a folder around it)" in warnings[0]
    assert not any("symbolic links" in line for line in warnings)


def test_special_files_are_left_out_without_blocking(tmp_path):
    source = tree(tmp_path / "tree", contents(["a.png", "b.png"]))
    (tmp_path / "tree/device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "tree/socket.png"))
        dataset, warnings = load(source)
    assert seeds_of(dataset) == [0, 1]
    assert len(warnings) == 1
    assert "left out 2 entries that are not files, such as device.png (device)" in warnings[0]
    os.mkfifo(tmp_path / "pipe")
    for source, message in (("folder", "pipe, which is neither"), ("npz", "does not exist or is not a file")):
        with pytest.raises(InputError, match=message):
            load_data(f"{source}:{tmp_path / 'pipe'}")


def test_links_in_an_archive_are_left_out(tmp_path):
    source = archive(tmp_path / "set.zip", contents(["a.png", "b.png"]))
    link = zipfile.ZipInfo("c.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "a") as file:
        file.writestr(link, "a.png")
    dataset, warnings = load(source)
    assert seeds_of(dataset) == [0, 1]
    assert len(warnings) == 1
    assert "left out 1 entries that are not files, such as c.png (symbolic link)" in warnings[0]


def test_images_with_other_suffixes_are_told(tmp_path):
    others = {"c": encoded(picture(2)), "d.dat": encoded(picture(3), "jpeg"), "e.heic": b"x", "notes.txt": b"x"}
    heif = b"\0\0\0\x18ftypheic" + bytes(8)
    for source in both(tmp_path, contents(["a.png", "b.png"]) | others | {"f.bin": heif, "g.bin": bytes(40)}):
        dataset, warnings = load(source)
        assert seeds_of(dataset) == [0, 1]
        assert len(warnings) == 2
        assert re.search(r"ignored 4 images whose suffix is not one of \.jpg .*, such as c: convert", warnings[0])
        assert "ignored 2 files that are not images, such as g.bin" in warnings[1]
    with pytest.raises(InputError, match=r"got 4 other files, such as the image c: convert them to PNG, or give them"):
        load_data(tree(tmp_path / "alone", others))


def test_archive_members_outside_the_archive_are_ignored(tmp_path):
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
        "only train/ and test/; got extra beside them: move it away",
    ),
    "unlabelled test": (contents([*TRAIN, "test/1.png"]), "got none of images beside the class folders in train"),
    "one class": (contents(["train/a/1.png", "test/a/1.png"]), "at least 2 classes must occur; got a alone"),
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_bad_layouts_are_refused(tmp_path, name):
    files, message = BAD_LAYOUTS[name]
    (tmp_path / "tree").mkdir()
    for source in both(tmp_path, files):
        with pytest.raises(InputError, match=message) as caught:
            load_data(source, warn=lambda _: None)
        assert "\n" not in str(caught.value)


def test_missing_or_damaged_places_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"needs a directory or a zip file; got .*none, which does not exist"):
        load_data(f"folder:{tmp_path / 'none'}")
    whole = archive(tmp_path / "set.zip", contents(TRAIN + TEST)).removeprefix("folder:")
    (tmp_path / "text.zip").write_bytes(b"text")
    (tmp_path / "half.zip").write_bytes(Path(whole).read_bytes()[:500])
    for name in ("text.zip", "half.zip"):
        with pytest.raises(InputError, match=rf"must be a complete zip file; got .*{name} .*: pack it again"):
            load_data(f"folder:{tmp_path / name}")


def test_repeated_names_in_an_archive_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        for content in (b"a", b"b"):
            file.writestr("train/ant/1.png", content)
    with pytest.raises(InputError, match="a name must occur once; got 1 that occur again"):
        load_data(f"folder:{tmp_path / 'set.zip'}")


# The fingerprint.


def test_different_contents_have_different_fingerprints(tmp_path):
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


def test_skipped_images_change_the_fingerprint(tmp_path, monkeypatch):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST))
    whole, _ = load(source)

    def pickier(content, form):
        if content == encoded(picture(1)):
            raise Unreadable("not to my taste")
        return decode_image(content, form)

    monkeypatch.setattr("PIL.__version__", "0.1")
    monkeypatch.setattr("ev3_distill.data.sources.folder.decode_image", pickier)
    part, _ = load(source, skip_corrupt=True)
    assert len(part.labels) == len(whole.labels) - 1
    assert part.fingerprint != whole.fingerprint


# Real size.


def test_decoding_and_reading_need_little_memory(tmp_path):
    """600 images become 118 MB of pixels, of which less than 60 MB are resident at any time."""
    image = encoded(np.zeros((256, 256, 3), np.uint8))
    source = archive(tmp_path / "set.zip", {f"{label}/{i:03}.png": image for label in "ab" for i in range(300)})
    code = f"""
import resource
from ev3_distill.data.sources import load_data
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


def test_cifar10_archive_loads(tmp_path):
    """The test images, and the layout of the whole archive."""
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
