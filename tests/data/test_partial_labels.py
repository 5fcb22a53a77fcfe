"""Data in which only some examples have a label: how each source says so, and how they are divided."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import both, contents, encoded, load, picture, seeds_of, tree

from ev3_distill.config import Compress, Fractions
from ev3_distill.data import Dataset, splits_of
from ev3_distill.data.batches import split
from ev3_distill.data.sources import load_data
from ev3_distill.data.splits import SPLITS, split_rows
from ev3_distill.errors import InputError

HELD_OUT = SPLITS[1:]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "cache"))


def data_of(labels, test_rows=None, groups=None):
    labels = np.asarray(labels, np.int32)
    names = () if groups is None else tuple(map(str, range(max(groups) + 1)))
    inputs = np.arange(len(labels), dtype=np.float32)[:, None]
    groups = None if groups is None else np.asarray(groups, np.int32)
    return Dataset(inputs, labels, 7, tuple("abcdefg"), test_rows, "npz:x.npz", 64 * "0", groups, names)


# npz files.


def saved(folder, labels, **more):
    np.savez(folder / "x.npz", inputs=np.arange(2.0 * len(labels)).reshape(-1, 2), labels=np.array(labels), **more)
    return f"npz:{folder / 'x.npz'}"


def test_minus_one_is_no_label(tmp_path):
    said = []
    dataset = load_data(saved(tmp_path, [0, -1, 2, 1, -1, 2]), warn=said.append)
    assert dataset.labels.tolist() == [0, -1, 2, 1, -1, 2]
    assert (dataset.num_classes, dataset.class_names, said) == (3, ("0", "1", "2"), [])
    assert dataset.is_labeled.tolist() == [True, False, True, True, False, True]
    assert dataset.partly_labeled
    assert not load_data(saved(tmp_path, [0, 1, 2, 1])).partly_labeled
    assert not load_data(saved(tmp_path, [-1] * 4)).partly_labeled


@pytest.mark.parametrize("more", [{}, {"class_names": np.array(["bee", "ant"])}])
def test_an_empty_text_is_no_label(tmp_path, more):
    dataset = load_data(saved(tmp_path, ["ant", "", "bee", "ant", ""], **more))
    names = [dataset.class_names[label] if label >= 0 else "" for label in dataset.labels]
    assert names == ["ant", "", "bee", "ant", ""]
    assert sorted(dataset.class_names) == ["ant", "bee"]
    assert load_data(saved(tmp_path, ["", ""])).labels.tolist() == [-1, -1]


@pytest.mark.parametrize("labels", [[-1, 1, 1, -1], [-1, 0, -1, 0]])
def test_two_classes_named_by_signs_are_not_taken_for_missing_labels(tmp_path, labels):
    source = saved(tmp_path, labels)
    with pytest.raises(InputError, match=r"got labels -1 and . alone, .* give npz:.*,labels=ids if they are, else add"):
        load_data(source)
    dataset = load_data(f"{source},labels=ids")
    assert [int(dataset.class_names[label]) for label in dataset.labels] == labels


def test_three_classes_named_by_signs_are_warned_of(tmp_path):
    said = []
    load_data(saved(tmp_path, [-1, 0, 1, 0]), warn=said.append)
    assert len(said) == 1
    assert "labels are -1, 0 and 1; examples with -1 count as without a label" in said[0]


@pytest.mark.parametrize("labels", [[0, 1, -2, 1], [0, -1, 1, -5], [-9, -1, -1]])
def test_other_negative_labels_are_refused(tmp_path, labels):
    with pytest.raises(
        InputError, match=r"must not be negative, except for -1 where an example has none; got -\d in row"
    ):
        load_data(saved(tmp_path, labels))


def test_what_else_may_mean_a_missing_label_is_refused_with_its_way_out(tmp_path):
    with pytest.raises(InputError, match="save integers with -1 for an example without a label"):
        load_data(saved(tmp_path, [0.0, np.nan, 1.0]))
    np.savez(tmp_path / "x.npz", inputs=np.zeros((4, 2)), labels=np.array([0, 1]))
    with pytest.raises(InputError, match="with -1 for each example without a label"):
        load_data(f"npz:{tmp_path / 'x.npz'}")


# Folders of images.

LABELED = ["train/ant/a.png", "train/bee/b.png", "test/ant/c.png", "test/bee/d.png"]


@pytest.mark.parametrize(
    ("labeled", "without", "place"),
    [
        (LABELED, ["pool/x.png", "pool/deeper/y.png"], "pool"),
        (LABELED, ["train/pool/x.png", "train/pool/y.png"], "pool"),
        ([name.removeprefix("train/") for name in LABELED[:2]], ["pool/x.png", "pool/y.png"], "pool"),
    ],
)
def test_a_named_folder_holds_images_without_labels(tmp_path, labeled, without, place):
    for source in both(tmp_path, contents(labeled + without)):
        dataset, warnings = load(f"{source},unlabeled={place}")
        assert dataset.class_names == ("ant", "bee")
        assert dataset.labels.tolist() == [-1, -1, 0, 1, *([0, 1] if len(labeled) > 2 else [])]
        assert sorted(seeds_of(dataset)[:2]) == [len(labeled), len(labeled) + 1]
        assert (dataset.test_rows is None) == (len(labeled) == 2)
        assert warnings == []
        if len(labeled) == 2:  # without the option it is a class
            other, _ = load(source)
            assert other.class_names == ("ant", "bee", "pool")
            assert other.fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    ("files", "option", "message"),
    [
        (LABELED, "pool", "got no image in a folder pool"),
        (["train/pool/a.png", "train/pool/b.png"], "pool", "got no others beside them"),
        ([*LABELED, "test/pool/x.png"], "pool", "images without labels are for training; got test/pool/x.png"),
        (["a.png", "pool/x.png"], "pool", "got no folder of a class"),
        ([*LABELED, "pool/x.png"], "", "move it away, or give unlabeled=pool if its images have no labels"),
    ],
)
def test_folders_without_labels_are_checked(tmp_path, files, option, message):
    source = tree(tmp_path / "tree", {name: encoded(picture(0)) for name in files})
    with pytest.raises(InputError, match=message):
        load(f"{source},unlabeled={option}" if option else source)


def test_a_class_that_is_called_unlabeled_is_warned_of(tmp_path):
    source = tree(tmp_path / "tree", contents(["ant/a.png", "bee/b.png", "Unlabeled/x.png"]))
    dataset, warnings = load(source)
    assert dataset.num_classes == 3
    assert len(warnings) == 1
    assert "if its images have no labels, give unlabeled=Unlabeled" in warnings[0]


# Splits.

LABELS = st.lists(st.integers(-1, 6), min_size=80, max_size=300)


@settings(deadline=None, max_examples=40)
@given(LABELS, st.integers(0, 2**30))
def test_held_out_splits_are_those_of_the_labeled_examples_alone(labels, seed):
    dataset = data_of([*labels, 0, -1])
    known = np.flatnonzero(dataset.is_labeled)
    if len(known) < 10:
        return
    rows = splits_of(Compress(seed=seed), dataset)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(len(dataset.labels)))
    alone = split_rows(dataset.labels[known], None, seed=seed)
    for name in HELD_OUT:
        np.testing.assert_array_equal(rows[name], known[alone[name]])
    np.testing.assert_array_equal(
        rows["explore"], np.union1d(known[alone["explore"]], np.flatnonzero(~dataset.is_labeled))
    )


def test_the_sealed_split_is_a_simple_random_sample_of_the_labeled_examples():
    labels = np.where(np.arange(60) % 3, -1, np.arange(60) // 30)
    known, counts = np.flatnonzero(labels >= 0), np.zeros(60)
    for seed in range(3000):
        counts[splits_of(Compress(seed=seed), data_of(labels))["test"]] += 1
    assert counts[labels < 0].sum() == 0
    assert np.abs(counts[known] / 3000 - 0.2).max() < 4.5 * np.sqrt(0.16 / 3000)


def test_test_rows_of_the_source_without_a_label_are_in_no_split():
    labels = np.array([*[0, 1, -1, -1] * 20, 0, 1, -1])
    rows = splits_of(Compress(), data_of(labels, test_rows=np.arange(80, 83)))
    assert rows["test"].tolist() == [80, 81]
    np.testing.assert_array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(82))


@pytest.mark.parametrize(
    ("labels", "test_rows", "message"),
    [
        (
            [0, 1, -1, -1] * 20,
            np.arange(2, 80, 4),
            "has none among its test rows: add some, or let the test split be dealt",
        ),
        ([0, 1, -1, -1] * 20, np.arange(0, 80, 2), None),
        ([-1] * 70 + [0, 1] * 5, np.arange(70, 80), "has none among its training rows"),
        (
            [-1] * 70 + [0, 1, 0],
            None,
            "explore needs at least 2 labeled examples .* got 3 labeled examples, too few for",
        ),
    ],
)
def test_every_split_needs_labels(labels, test_rows, message):
    dataset = data_of(labels, test_rows)
    if message is None:
        splits_of(Compress(), dataset)
        return
    with pytest.raises(InputError, match=message):
        splits_of(Compress(), dataset)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**30))
def test_unlabeled_examples_of_a_held_out_group_are_in_no_split(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 40, 400)
    groups[:40] = np.arange(40)
    labels = np.where((rng.random(400) < 0.3) & (groups < 30), rng.integers(0, 3, 400), -1)  # ten groups have no label
    dataset = dataclasses.replace(data_of(labels, groups=groups), num_classes=3)
    rows = splits_of(Compress(seed=seed, split_by="groups"), dataset)
    of = {name: set(groups[rows[name]]) for name in SPLITS}
    for name in HELD_OUT:
        assert (labels[rows[name]] >= 0).all()
        assert not of[name] & set().union(*(of[other] for other in SPLITS if other != name))
    held = set().union(*(of[name] for name in HELD_OUT))
    np.testing.assert_array_equal(rows["explore"], np.flatnonzero(~np.isin(groups, list(held))))


def test_few_labeled_groups_are_refused():
    groups = np.repeat(np.arange(20), 5)
    labels = np.where(groups < 3, groups % 2, -1)
    with pytest.raises(InputError, match=r"explore needs at least 2 labeled groups .* got 3 labeled groups"):
        splits_of(Compress(split_by="groups"), data_of(labels, groups=groups))


def test_labeled_examples_keep_the_splits_that_they_had():
    labels = np.arange(200) % 7
    dataset, fractions = data_of(labels), Fractions(0.4, 0.2, 0.2, 0.2)
    for own in (dataset, data_of(np.full(200, -1))):
        rows = splits_of(Compress(seed=3, splits=fractions), own)
        expected = split_rows(own.labels, None, seed=3, fractions=fractions)
        assert all((rows[name] == expected[name]).all() for name in SPLITS)


def test_the_function_split_divides_alike():
    labels = np.where(np.arange(120) % 3, -1, np.arange(120) % 7)
    dataset = data_of(labels)
    pools, test = split(dataset, np.zeros((120, 7), np.float32), seed=5)
    rows = splits_of(Compress(seed=5), dataset)
    np.testing.assert_array_equal(pools.assess.index, rows["assess"])
    np.testing.assert_array_equal(test.index, rows["test"])
    np.testing.assert_array_equal(pools.explore.examples.targets[: len(rows["explore"])], labels[rows["explore"]])
