"""`ev3-distill copies`: clusters of copies as a file of groups, by which compress keeps each cluster in one split."""

import numpy as np
import pytest

from ev3_distill.data.group_file import with_groups
from ev3_distill.data.group_splits import split_groups
from ev3_distill.data.sources import load_data


@pytest.fixture
def data(here):
    """300 vectors of 60 people, five near-copies of each, in an npz file."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(60), 5)
    inputs = rng.normal(size=(60, 32))[owner] + 0.05 * rng.normal(size=(300, 32))
    np.savez("data.npz", inputs=inputs.astype(np.float32), labels=owner % 2)
    return owner


def test_clusters_are_groups_that_stay_in_one_split(data, cli):
    answer = cli("copies", "--data", "npz:data.npz", "--out", "clusters.npz")
    assert answer.code == 0, answer.err
    assert (
        "300 of 300 examples have a copy or near-copy; 60 clusters have several examples, the largest 5." in answer.out
    )
    assert "--groups clusters.npz --split-by groups" in answer.out
    dataset = with_groups(load_data("npz:data.npz"), "clusters.npz")
    rows = split_groups(dataset.groups, dataset.labels, None, seed=0, names=dataset.group_names)
    owners = [set(data[part]) for part in rows.values()]
    assert sum(map(len, owners)) == 60


def test_files_are_not_overwritten_and_only_npz_is_written(data, cli, here):
    (here / "old.npz").write_bytes(b"mine")
    for out, text in (
        ("old.npz", "got old.npz, which exists: choose another --out"),
        ("groups.csv", "got groups.csv:"),
    ):
        answer = cli("copies", "--data", "npz:data.npz", "--out", out)
        assert answer.code == 2
        assert "copies writes a new .npz file" in answer.err and text in answer.err
    assert (here / "old.npz").read_bytes() == b"mine"
    answer = cli("copies", "--data", "npz:data.npz", "--out", "no/such/folder.npz")
    assert answer.code == 2 and "copies needs a folder that it can write to" in answer.err
    answer = cli("copies", "--data", "npz:absent.npz", "--out", "new.npz")
    assert answer.code == 2 and not (here / "new.npz").exists()
