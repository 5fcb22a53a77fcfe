"""Class names: normal form, pairing by name, names in archives, and labels that are ids."""

import json
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
from image_files import archive, contents, load, tree

from ev3_distill.data.class_names import (
    absent_classes,
    match_classes,
    name_classes,
    pairing_warnings,
    untrained_classes_warning,
)
from ev3_distill.data.sources import load_data
from ev3_distill.data.sources.dataset import Dataset
from ev3_distill.errors import InputError
from ev3_distill.training import run_dir

COMPOSED, DECOMPOSED = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")

pytestmark = pytest.mark.usefixtures("cache")


def dataset(labels, names, test_rows=None):
    labels = np.array(labels, np.int32)
    return Dataset(np.zeros((len(labels), 2), np.float32), labels, len(names), tuple(names), test_rows, "npz:x", "")


@pytest.mark.parametrize(
    ("labels", "names", "student", "expected"),
    [
        ([0, 1, 1], ("cat", "dog"), ("ant", "cat", "cow", "dog"), [1, 3, 3]),
        ([0, 1], (DECOMPOSED, "tea"), ("tea", COMPOSED), [1, 0]),
        ([0, 1], (COMPOSED, "tea"), ("tea", DECOMPOSED), [1, 0]),  # of an older run
        ([2, 0], ("cat", "not the student's", "dog"), ("dog", "cat"), [0, 1]),  # which does not occur
        ([0, 2, -1], ("0", "1", "2"), ("0", "1", "2", "3"), [0, 2, -1]),
        ([0, 1], ("0", "1"), ("cat", "dog", "cow"), [0, 1]),  # positions
        (
            [2, 10],
            tuple(map(str, range(11))),
            ("0", "1", "10", "2"),
            [3, 2],
        ),  # folders named by numbers, sorted as text
        ([17, 57], tuple(map(str, range(58))), ("17", "37", "57"), [0, 2]),
        ([1, 3], tuple(map(str, range(4))), ("1", "2", "3"), [0, 2]),
    ],
)
def test_labels_are_paired_by_name(labels, names, student, expected):
    matched = match_classes(dataset(labels, names), student)
    assert matched.labels.tolist() == expected
    assert matched.labels.dtype == np.int32
    assert (matched.num_classes, matched.class_names) == (len(student), student)


@pytest.mark.parametrize(
    ("labels", "names", "student", "text"),
    [
        ([0, 1], ("cat", "cow"), ("cat", "dog"), "npz:x has cow, the student knows cat, dog: rename"),
        ([0, 1], ("cat", "dog"), ("0", "1"), "numbers and no names"),
        ([0, 2], ("0", "1", "2"), ("0", "1"), "npz:x has 2, the student knows 0, 1"),
        ([0, 2], ("0", "1", "2"), ("cat", "dog"), "npz:x has 0, 2"),
        ([0, 1, 2], ("0", "1", "2"), ("1", "2", "3"), "npz:x has 0, the student knows 1, 2, 3"),  # ids, not positions
        ([0, 1], ("a", "b"), ("a", "b", "a"), None),  # of an older run: the same names in the same order
        ([0, 1], ("b", "a"), ("a", "b", "a"), "npz:x has a"),
        ([*range(7)], tuple("abcdefg"), ("x", "y"), "a, b, c, d, e and 2 more"),
    ],
)
def test_classes_that_the_student_does_not_know_are_refused_by_name(labels, names, student, text):
    if text is None:
        assert match_classes(dataset(labels, names), student).labels.tolist() == labels
        return
    with pytest.raises(InputError, match=text):
        match_classes(dataset(labels, names), student)


def test_a_pairing_tells_assumptions_and_absent_classes():
    numbers, student = dataset([0, 1], ("0", "1")), ("cat", "dog", "cow")
    by_position, absent = pairing_warnings(numbers, match_classes(numbers, student))
    assert "taken in the student's order: 0 is cat, 1 is dog" in by_position
    assert "no example of 1 of the student's 3 classes (cow)" in absent
    named = dataset([0, 1], ("dog", "cat"))
    assert pairing_warnings(named, match_classes(named, ("cat", "dog"))) == []
    assert absent_classes(match_classes(named, student)) == ["cow"]
    ids = dataset([17, 37], tuple(map(str, range(38))))
    assert pairing_warnings(ids, match_classes(ids, ("17", "37"))) == []


def test_classes_that_never_occur_in_training_are_told():
    assert untrained_classes_warning(dataset([0, 1], ("0", "1"))) == ""
    assert untrained_classes_warning(dataset([-1, -1], ("cat", "dog"))) == ""
    ids = untrained_classes_warning(dataset([17, 57], tuple(map(str, range(58)))))
    assert "56 of 58 classes never occur in training (0, 1, 2, 3, 4 and 51 more)" in ids
    assert "give npz:x,labels=ids" in ids
    assert "1 of 2 classes never occur in training (dog)" in untrained_classes_warning(
        dataset([0, 0, 1], ("cat", "dog"), np.array([2]))
    )
    assert "only a teacher can tell them" in untrained_classes_warning(dataset([0, -1, 2], ("cat", "dog", "cow")))


def test_data_without_labels_take_names_from_elsewhere():
    unlabeled = dataset([-1, -1], ())
    named = name_classes(unlabeled, ("cat", DECOMPOSED))
    assert (named.class_names, named.num_classes) == (("cat", COMPOSED), 2)
    assert name_classes(unlabeled, ()) is unlabeled
    for other in (named, dataset([0, 1], ("0", "1"))):
        assert name_classes(other, ("a", "b")) is other


def test_a_resumed_run_needs_its_class_names(tmp_path):
    """The fingerprint of an npz file does not cover them."""
    given = {"fingerprint": "f", "class_names": ["cat", "dog"], "format": run_dir.FORMAT}
    (tmp_path / "given.json").write_text(json.dumps(given))
    assert run_dir.read_inputs(tmp_path, "f", ("cat", "dog")) == run_dir.read_inputs(tmp_path, "f") == given
    for names, text in ((("dog", "cat"), "got 'dog' where 'cat' was"), (("cat",), "got 'None' where 'dog' was")):
        with pytest.raises(InputError, match=text):
            run_dir.read_inputs(tmp_path, "f", names)
    (tmp_path / "given.json").write_text(json.dumps({"fingerprint": "f", "format": run_dir.FORMAT}))
    assert run_dir.read_inputs(tmp_path, "f", ("dog", "cat"))["fingerprint"] == "f"


# Names in folders and archives.


def test_folder_names_have_one_normal_form(tmp_path):
    files = contents([f"train/{COMPOSED}/1.png", f"test/{DECOMPOSED}/2.png", "train/tea/3.png", "test/tea/4.png"])
    for source in (tree(tmp_path / "tree", files), archive(tmp_path / "set.zip", files)):
        data, warnings = load(source)
        assert (data.class_names, data.labels.tolist(), warnings) == ((COMPOSED, "tea"), [0, 1, 0, 1], [])


def test_two_folders_of_one_normal_form_are_refused(tmp_path):
    source = tree(tmp_path, contents([f"{COMPOSED}/1.png", f"{DECOMPOSED}/2.png", "tea/3.png"]))
    with pytest.raises(InputError, match=f"got {COMPOSED} twice"):
        load(source)


def encoded_archive(path, names, *, encoding, extra=False):
    """An archive whose names are bytes of that encoding, without the flag for UTF-8."""
    with zipfile.ZipFile(path, "w") as file:
        for i, (name, content) in enumerate(contents(names).items()):
            raw = name.encode(encoding)
            info = zipfile.ZipInfo("xy"[i] * len(raw))
            if extra:
                field = b"\1" + zlib.crc32(raw).to_bytes(4, "little") + name.encode()
                info.extra = b"up" + len(field).to_bytes(2, "little") + field
            file.writestr(info, content)
    data = path.read_bytes()
    for i, name in enumerate(names):
        raw = name.encode(encoding)
        data = data.replace(b"xy"[i : i + 1] * len(raw), raw)  # in the member's header and in the directory
    path.write_bytes(data)
    return f"folder:{path}"


@pytest.mark.parametrize(
    ("name", "encoding", "extra", "count"),
    [
        (COMPOSED, "utf-8", False, 0),
        (DECOMPOSED, "utf-8", False, 0),  # as macOS packs
        ("\u732b", "utf-8", False, 0),
        ("\u732b", "cp932", True, 0),  # the extra field of Info-ZIP
        (COMPOSED, "cp437", False, 1),
    ],
)
def test_names_in_archives_are_read_in_their_encoding(tmp_path, name, encoding, extra, count):
    source = encoded_archive(tmp_path / "set.zip", [f"{name}/1.png", "tea/2.png"], encoding=encoding, extra=extra)
    data, warnings = load(source)
    assert sorted(data.class_names) == sorted([unicodedata.normalize("NFC", name), "tea"])
    assert len(warnings) == count
    assert all("code page 437" in text for text in warnings)


def test_archive_of_the_zip_program_is_read_like_its_folder(tmp_path):
    files = contents([f"{COMPOSED}/1.png", "tea/2.png"])
    of_tree, of_zip = load(tree(tmp_path / "tree", files))[0], load(archive(tmp_path / "set.zip", files))[0]
    assert of_tree.class_names == of_zip.class_names == (COMPOSED, "tea")


# Labels that are ids.


def save(path, labels, **more):
    np.savez(path, inputs=np.arange(2 * len(labels), dtype=np.float32).reshape(-1, 2), labels=np.array(labels), **more)
    return f"npz:{path}"


@pytest.mark.parametrize("ids", [[17, 37, 57, 17], [1, 2, 3, 1], [-1, 1, 1, -1], [100, 5, 7, 100]])
def test_labels_that_are_ids_become_numbers_with_names(tmp_path, ids):
    data = load_data(save(tmp_path / "d.npz", ids) + ",labels=ids")
    assert [data.class_names[label] for label in data.labels] == list(map(str, ids))
    assert sorted(map(int, data.class_names)) == list(map(int, data.class_names))
    assert data.num_classes == len(set(ids))
    assert untrained_classes_warning(data) == ""


def test_text_labels_have_one_normal_form(tmp_path):
    data = load_data(save(tmp_path / "d.npz", [COMPOSED, "tea", DECOMPOSED, "tea"]))
    assert (data.class_names, data.labels.tolist()) == ((COMPOSED, "tea"), [0, 1, 0, 1])
    known = load_data(save(tmp_path / "k.npz", [COMPOSED, "tea", "tea"], class_names=["tea", DECOMPOSED]))
    assert (known.class_names, known.labels.tolist()) == (("tea", COMPOSED), [1, 0, 0])


def test_ids_of_train_and_test_are_numbered_together(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez(tmp_path / "d.npz", train_inputs=x, train_labels=[5, 9, 5], test_inputs=x, test_labels=[9, 9, 5])
    data = load_data(f"npz:{tmp_path / 'd.npz'},labels=ids")
    assert (data.class_names, data.labels.tolist()) == (("5", "9"), [0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize(
    ("labels", "more", "suffix", "text"),
    [
        ([3, 9], {"class_names": ["a", "b"]}, ",labels=ids", "got class_names besides"),
        ([-1, -1], {}, ",labels=ids", "needs labels that are integers; got none"),
        ([0, 1], {}, ",labels=names", "got 'names'"),
        ([0, 1], {}, ",size=3", "got size: try"),
        ([0, 99], {}, "", "labels=ids where labels are ids"),
        ([-2, 1], {}, "", "labels=ids where labels are ids"),
        (["a", "b", "a"], {}, ",labels=ids", "got <U1: omit it"),
        ([0, 1], {"class_names": ["a", "a"]}, "", "got a for several"),
        ([0, 1], {"class_names": [COMPOSED, DECOMPOSED]}, "", f"got {COMPOSED} for several"),
    ],
)
def test_ids_and_names_that_do_not_fit_are_refused(tmp_path, labels, more, suffix, text):
    with pytest.raises(InputError, match=text):
        load_data(save(tmp_path / "d.npz", labels, **more) + suffix)


def test_a_file_with_a_comma_in_its_name_has_no_option(tmp_path):
    assert load_data(save(tmp_path / "d,labels=ids.npz", [0, 1])).class_names == ("0", "1")
