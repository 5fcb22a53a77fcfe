"""Near-copies across splits: found where they are, and not among examples that merely resemble each other."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine

from ev3_distill.data.near_copies import count_near_copies, duplicate_groups
from ev3_distill.data.sources import RowFile
from ev3_distill.data.sources.row_file import Part
from ev3_distill.data.splits import count_shared, split_rows


def patients(people=60, images=5, noise=0.05, seed=0):
    """Near-copies [N, 32] of one vector per patient, and the patient of each."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(people), images)
    return (rng.normal(size=(people, 32))[owner] + noise * rng.normal(size=(len(owner), 32))).astype(np.float32), owner


def pictures(n=300, seed=0):
    """Smooth random pictures [n, 32, 32, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 8, 8, 3))
    return coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)


def splits_of(n):
    return split_rows(np.zeros(n, int), None, seed=0)


def test_near_copies_of_vectors_are_counted():
    inputs, _ = patients(200, 10)
    found = count_near_copies(inputs, splits_of(len(inputs)))
    assert found["test"].sampled == 400
    assert found["test"].copied > 150  # those whose nearest copy is in another split
    assert "explore" not in found


def test_near_copies_within_a_split_are_no_copies_across_splits():
    inputs, owner = patients(200, 10)
    rows = {name: np.flatnonzero(owner % 4 == i) for i, name in enumerate(("explore", "assess", "decide", "test"))}
    assert count_near_copies(inputs, rows) == {}


def test_brighter_and_noisier_pictures_are_near_copies():
    images = pictures()
    rng = np.random.default_rng(1)
    copies = np.clip(images[:60] * 0.9 + 10 + rng.integers(-8, 9, images[:60].shape), 0, 255).astype(np.uint8)
    inputs = np.concatenate([images, copies])
    rows = {"explore": np.arange(0, 200), "assess": np.arange(200, 250), "decide": np.arange(250, 300)}
    found = count_near_copies(inputs, rows | {"test": np.arange(300, 360)})
    assert found["test"] == (60, 60)


@pytest.mark.parametrize("load", [load_breast_cancer, load_digits, load_iris, load_wine])
def test_examples_that_merely_resemble_each_other_are_no_copies(load):
    inputs = load().data.astype(np.float32)
    shapes = [inputs, inputs.reshape(-1, 8, 8, 1)] if load is load_digits else [inputs]
    for part in shapes:
        found = count_near_copies(part, splits_of(len(part)))
        assert sum(copies.copied for copies in found.values()) <= 2


@pytest.mark.parametrize("dimension", [1, 2, 4, 8, 16])
def test_random_vectors_are_no_copies(dimension):
    inputs = np.random.default_rng(0).normal(size=(3000, dimension)).astype(np.float32)
    assert count_near_copies(inputs, splits_of(len(inputs))) == {}


def test_identical_and_constant_examples_are_no_near_copies():
    inputs = np.repeat(np.random.default_rng(0).normal(size=(100, 16)), 3, axis=0).astype(np.float32)
    assert count_near_copies(inputs, splits_of(300)) == {}
    assert count_near_copies(np.zeros((300, 16, 16, 1), np.uint8), splits_of(300)) == {}
    assert count_near_copies(np.zeros((20, 4), np.float32), splits_of(20)) == {}


def test_groups_of_duplicates_are_the_clusters():
    inputs, owner = patients(60, 5)
    inputs = np.concatenate([inputs, inputs[:1]])  # identical to the first
    groups = duplicate_groups(inputs)
    np.testing.assert_array_equal(groups[:-1], np.unique(owner, return_inverse=True)[1])
    assert groups[-1] == groups[0]
    images = pictures(120)
    assert len(np.unique(duplicate_groups(images))) == 120


def test_data_on_disk_are_compared_as_data_in_memory(tmp_path):
    inputs, _ = patients(40, 5)
    inputs[150:160] = inputs[:10]
    (tmp_path / "rows").write_bytes(inputs.tobytes())
    on_disk = RowFile((Part(tmp_path / "rows", 0, len(inputs)),), inputs.shape[1:], inputs.dtype)
    rows = splits_of(len(inputs))
    assert count_shared(on_disk, rows) == count_shared(inputs, rows) != {}
    assert count_near_copies(on_disk, rows) == count_near_copies(inputs, rows) != {}
    np.testing.assert_array_equal(duplicate_groups(on_disk), duplicate_groups(inputs))


def test_a_memory_limit_bounds_the_number_of_examples_compared():
    inputs, _ = patients(400, 5)
    everything = count_near_copies(inputs, splits_of(len(inputs)))["test"]
    few = count_near_copies(inputs, splits_of(len(inputs)), memory=16 * 4 * 256 * 200)["test"]
    assert few.sampled == everything.sampled == 400
    assert 0 < few.copied < everything.copied
