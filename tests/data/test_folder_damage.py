"""Damaged or changing image folders, and the cache of decoded images."""

import errno
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_files import TEST, TRAIN, archive, both, contents, encoded, load, picture, seeds_of, tree

from ev3_distill.data.sources import RowFile, image_archive, load_data, row_cache
from ev3_distill.data.sources.image_decode import decode_image
from ev3_distill.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")


# Unreadable images.


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
        dataset, warnings = load(source, skip_corrupt=True)
        assert (seeds_of(dataset, size=(32, 32)), dataset.labels.tolist()) == ([0, 1, 2], [0, 1, 1])
        assert len(warnings) == 1
        assert "left out 6 of 9 that cannot be read: a/cut.png (" in warnings[0]
        assert load_data(source, skip_corrupt=True, warn=warnings.append).fingerprint == dataset.fingerprint


def test_test_rows_account_for_skipped_images(tmp_path):
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
def test_a_class_without_readable_images_is_refused(tmp_path, lost, message):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST) | dict.fromkeys(lost, b""))
    with pytest.raises(InputError, match=message):
        load(source, skip_corrupt=True)


def test_damage_in_an_archive_affects_one_member(tmp_path):
    for source in [*both(tmp_path, contents(TRAIN + TEST))][1:]:
        path = Path(source.removeprefix("folder:"))
        with zipfile.ZipFile(path) as file:
            place = file.getinfo("train/bee/2.png").header_offset + 60
        content = bytearray(path.read_bytes())
        content[place] ^= 255
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"got 1 of 6 that cannot be read: train/bee/2.png \(.*\): repair"):
            load_data(source)


def test_the_checksum_of_an_archive_detects_changed_pixels(tmp_path):
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
def test_rare_compression_methods_are_read(tmp_path, compression):
    assert seeds_of(load(archive(tmp_path / "set.zip", contents(TRAIN + TEST), compression))[0]) == [1, 0, 2, 3, 5, 4]


def test_files_without_read_permission_are_named(tmp_path, monkeypatch):
    source, read, scan = (
        tree(tmp_path / "tree", contents(TRAIN + TEST)),
        image_archive.DirectoryContainer._read,
        os.scandir,
    )

    def guarded(call, name):
        def called(*args):
            if str(args[-1]).endswith(name):
                raise PermissionError(errno.EACCES, "Permission denied", str(args[-1]))
            return call(*args)

        return called

    monkeypatch.setattr(image_archive.DirectoryContainer, "_read", guarded(read, "a.png"))
    with pytest.raises(InputError, match=r"train/ant/a.png \(Permission denied\)"):
        load_data(source)
    monkeypatch.setattr(os, "scandir", guarded(scan, "train"))
    with pytest.raises(InputError, match=r"needs permission to read its content; got .*train \(Permission denied\)"):
        load_data(source)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source, read = tree(tmp_path / "tree", contents(TRAIN + TEST)), image_archive.DirectoryContainer._read
    seen = []

    def changing(directory, name):
        seen.append(name)
        return read(directory, name) + b" " * (seen.count(name) > 1)

    monkeypatch.setattr(image_archive.DirectoryContainer, "_read", changing)
    with pytest.raises(InputError, match="must not change while it is read; got a change: run again"):
        load_data(source)


# The cache.


def counted(monkeypatch):
    """Records the calls of the decoder."""
    calls = []
    monkeypatch.setattr(
        "ev3_distill.data.sources.folder.decode_image", lambda *args: calls.append(1) or decode_image(*args)
    )
    return calls


def test_images_are_decoded_once(tmp_path, cache, monkeypatch):
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
def test_a_damaged_cache_is_created_again(tmp_path, cache, monkeypatch, name, memory):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST))
    first, _ = load(source)
    calls = counted(monkeypatch)
    DAMAGE[name](next(cache.glob("*.npy")))
    again, warnings = load(source, memory=memory)
    assert len(calls) >= 6
    np.testing.assert_array_equal(first.inputs, again.inputs[:])
    assert [sentence for sentence in warnings if "damaged: creating it again" in sentence] == warnings
    assert len(warnings) == (name != "no rows")
    done = len(calls)
    assert load(source)[1] == []
    assert len(calls) == done


def test_another_version_of_pillow_decodes_again(tmp_path, cache, monkeypatch):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST))
    first, _ = load(source)
    monkeypatch.setattr("PIL.__version__", "0.1")
    again, _ = load(source)
    assert len(list(cache.glob("*.npy"))) == 2
    assert first.fingerprint == again.fingerprint


def test_a_full_disk_leaves_no_partial_files(tmp_path, cache, monkeypatch):
    source = tree(tmp_path / "tree", contents(TRAIN + TEST))

    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(row_cache.RowWriter, "add", full)
        with pytest.raises(
            InputError, match=r"needs free space .*; got No space left on device: free some.*EV3_DISTILL_CACHE"
        ):
            load_data(source)
    assert list(cache.iterdir()) == []
    assert len(load(source)[0].labels) == 6


def test_a_cache_that_cannot_be_created_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="name another folder in the environment variable EV3_DISTILL_CACHE"):
        load_data(tree(tmp_path / "tree", contents(TRAIN + TEST)))


def test_an_interrupt_leaves_no_partial_files(tmp_path, cache):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_data(tree(tmp_path / "tree", contents(TRAIN + TEST)), progress=stop)
    assert list(cache.iterdir()) == []
