"""Splits of whole groups: no group is in two splits, and the sealed groups are a simple random sample."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.config import Compress, Fractions
from ev3_distill.data import Dataset, splits_of, units_of
from ev3_distill.data.group_file import same_content, with_groups
from ev3_distill.data.group_splits import split_groups
from ev3_distill.data.splits import SPLITS
from ev3_distill.errors import InputError


def data_of_groups(groups, names=None):
    names = tuple(map(str, range(int(np.max(groups)) + 1))) if names is None else names
    n = 40 if groups is None else len(groups)
    return Dataset(
        np.zeros((n, 2), np.float32), np.zeros(n, np.int32), 1, ("a",), None, "npz:x.npz", 64 * "0", groups, names
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=12, max_size=60), st.integers(0, 2**30))
def test_every_group_is_in_one_split(sizes, seed):
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = split_groups(groups, groups % 3, None, seed=seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(len(groups)))
    together = np.concatenate([np.unique(groups[rows[name]]) for name in SPLITS])
    assert sorted(together) == list(range(len(sizes)))
    for name, share in (("test", 0.2), ("decide", 0.15)):
        assert abs(len(np.unique(groups[rows[name]])) - share * len(sizes)) < 1


def test_the_number_of_sealed_groups_does_not_depend_on_their_sizes():
    sizes = np.where(np.arange(50) % 2, 1, 39)
    groups = np.repeat(np.arange(50), sizes)
    large = 0
    for seed in range(200):
        sealed = np.unique(groups[split_groups(groups, groups * 0, None, seed=seed)["test"]])
        assert len(sealed) == 10
        large += (sizes[sealed] > 1).sum()
    assert abs(large / 2000 - 0.5) < 0.05


def test_sizes_come_close_to_the_fractions_and_classes_are_balanced():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(400), rng.integers(1, 20, 400))
    labels = rng.integers(0, 4, 400)[groups]
    rows = split_groups(groups, labels, None, seed=1)
    for name, share in zip(SPLITS, (0.5, 0.15, 0.15, 0.2), strict=True):
        assert abs(len(rows[name]) / len(groups) - share) < 0.04
    mix = [np.bincount(labels[rows[name]], minlength=4) / len(rows[name]) for name in ("explore", "assess")]
    np.testing.assert_allclose(*mix, atol=0.01)


def test_held_out_splits_of_groups_have_a_maximum_size():
    groups = np.repeat(np.arange(100), 10)
    rows = split_groups(groups, groups * 0, None, seed=0, fractions=Fractions(most=50))
    assert [len(rows[name]) for name in SPLITS] == [700, 50, 50, 200]


def test_own_test_rows_keep_their_groups():
    groups = np.repeat(np.arange(20), 3)
    rows = split_groups(groups, groups * 0, np.arange(45, 60), seed=0)
    np.testing.assert_array_equal(rows["test"], np.arange(45, 60))
    with pytest.raises(InputError, match=r"1 groups are in both \(g15\): save all rows without the prefixes"):
        split_groups(groups, groups * 0, np.arange(46, 60), seed=0, names=[f"g{i}" for i in range(20)])


def test_too_few_groups_are_refused():
    groups = np.repeat(np.arange(4), 100)
    with pytest.raises(InputError, match=r"got 4 groups, too few for (assess|decide): give at least 7"):
        split_groups(groups, groups * 0, None, seed=0)


def test_a_run_by_groups_needs_groups():
    config = Compress(split_by="groups")
    with pytest.raises(InputError, match="--split-by groups needs the group of each example"):
        splits_of(config, data_of_groups(None, names=()))
    data = data_of_groups(np.repeat(np.arange(300), 2))
    rows = splits_of(config, data)
    assert units_of(config, data) is data.groups
    assert len(np.intersect1d(data.groups[rows["test"]], data.groups[rows["explore"]])) == 0
    with pytest.raises(InputError, match=r"at most 256; .* has 300 groups: .* give --split-by groups"):
        splits_of(Compress(), data)
    assert units_of(Compress(), data) is None
    with pytest.raises(InputError, match="split_by must be examples or groups"):
        Compress(split_by="patients")


def test_groups_come_from_a_file_of_their_own(tmp_path):
    data = data_of_groups(None, names=())
    np.savez(tmp_path / "g.npz", groups=np.arange(40) // 2)
    grouped = with_groups(data, str(tmp_path / "g.npz"))
    np.testing.assert_array_equal(np.unique(grouped.groups, return_counts=True)[1], [2] * 20)
    assert grouped.fingerprint != data.fingerprint
    np.savez(tmp_path / "g.npz", groups=np.arange(40) // 4)
    assert with_groups(data, str(tmp_path / "g.npz")).fingerprint != grouped.fingerprint
    assert same_content(with_groups(data, str(tmp_path / "g.npz")).fingerprint, data.fingerprint)
    np.savez(tmp_path / "g.npz", groups=np.arange(39))
    with pytest.raises(InputError, match=r"a text for each of the 40 examples of .*; .* has int64 \[39\]"):
        with_groups(data, str(tmp_path / "g.npz"))


def test_images_get_their_groups_by_name(tmp_path):
    files = tuple(f"{'ab'[i % 2]}/{i}.png" for i in range(40))
    data = dataclasses.replace(data_of_groups(None, names=()), names=files)
    rows = [f"{name},patient {i % 7}" for i, name in enumerate(files)]
    (tmp_path / "g.csv").write_text("\n".join(reversed(rows)) + "\n", encoding="utf-8")
    grouped = with_groups(data, str(tmp_path / "g.csv"))
    assert [grouped.group_names[i] for i in grouped.groups] == [f"patient {i % 7}" for i in range(40)]
    (tmp_path / "g.csv").write_text("\n".join(rows[2:]), encoding="utf-8")
    with pytest.raises(InputError, match=r"lacks 2 of 40, such as a/0\.png: add them"):
        with_groups(data, str(tmp_path / "g.csv"))
    (tmp_path / "g.csv").write_text("one,two,three\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"rows of a name and a group; .* has 'one,two,three'"):
        with_groups(data, str(tmp_path / "g.csv"))
    with pytest.raises(InputError, match=r"has no names of files: give an \.npz file"):
        with_groups(dataclasses.replace(data, names=()), str(tmp_path / "g.csv"))
