"""Digests of examples: one content has one digest in every container, and others differ."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import contents, picture, tree

from ev3_distill.data import row_digests as module
from ev3_distill.data.row_digests import are_among, digests_where, distinct, row_digests
from ev3_distill.data.sources import in_chunks, load_data

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 4, 6, 3)).astype(np.uint8)


def test_digests_are_distinct_and_keep_their_place():
    digests = row_digests(IMAGES)
    assert digests.dtype == np.uint64
    assert len(np.unique(digests)) == 50
    assert (row_digests(IMAGES[::-1]) == digests[::-1]).all()
    changed = IMAGES.copy()
    changed[7, 3, 5, 2] ^= 1
    assert np.flatnonzero(row_digests(changed) != digests).tolist() == [7]


def test_digests_of_parts_are_those_of_their_examples(monkeypatch):
    masks = [RNG.random(50) < 0.5, np.arange(50) == 7, np.zeros(50, bool)]
    for mask, part in zip(masks, digests_where(IMAGES, masks), strict=True):
        np.testing.assert_array_equal(part, row_digests(IMAGES)[mask])
    monkeypatch.setattr(module, "in_chunks", lambda inputs: in_chunks(inputs, 8 * IMAGES[0].nbytes))
    np.testing.assert_array_equal(digests_where(IMAGES, masks)[0], row_digests(IMAGES)[masks[0]])


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_distinct_and_are_among_agree_with_numpy(values, known):
    values, known = (np.array(x, np.uint64) * np.uint64(2**60) for x in (values, known))
    before = values.copy()
    np.testing.assert_array_equal(distinct(values), np.unique(values))
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(distinct(values.copy(), overwrite=True), np.unique(values))
    np.testing.assert_array_equal(are_among(values, distinct(known)), np.isin(values, known))


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x / np.float32(255),
        lambda x: (x / 255).astype(np.float32),
        lambda x: (x * np.float32(1 / 255)).astype(np.float32),
        lambda x: (x / 255).astype(np.float16).astype(np.float32),
        lambda x: x.astype(np.float32),
        lambda x: x / 255.0,
        np.asfortranarray,
    ],
)
def test_images_as_bytes_and_as_floats_have_one_digest(form):
    assert (row_digests(form(IMAGES)) == row_digests(IMAGES)).all()


def test_black_and_white_images():
    bits = (IMAGES > 99).astype(np.float32)
    assert (row_digests(bits) == row_digests((bits * 255).astype(np.uint8))).all()


def test_vectors_keep_their_scale():
    ones, levels = np.eye(3, dtype=np.float32), 255 * np.eye(3, dtype=np.float32)
    assert not np.isin(row_digests(ones), row_digests(levels)).any()
    vectors = RNG.integers(0, 256, (9, 5)).astype(np.uint8)
    assert (row_digests(vectors) == row_digests(vectors / np.float32(255))).all()
    assert row_digests(np.float32([[0.0, 1.5]])) == row_digests(np.float32([[-0.0, 1.5]]))
    normal = RNG.normal(size=(9, 3, 2)).astype(np.float32)
    assert (row_digests(normal) == row_digests(normal.astype(np.float64))).all()


def test_real_numbers_are_digested_as_float32():
    normal = RNG.normal(size=(9, 4, 4, 1)).astype(np.float32)
    assert len(np.unique(row_digests(normal))) == 9


def test_a_folder_and_arrays_on_disk_have_the_digests_of_their_images(tmp_path, cache):
    names = ["ant/a.png", "ant/b.png", "bee/c.png", "bee/d.png"]
    folder = load_data(tree(tmp_path / "tree", contents(names)))
    images = np.stack([picture(i) for i in range(4)])
    np.savez(tmp_path / "d.npz", inputs=images / np.float32(255), labels=[0, 0, 1, 1])
    on_disk = load_data(f"npz:{tmp_path / 'd.npz'}", memory=1)
    assert not isinstance(on_disk.inputs, np.ndarray)
    assert (row_digests(folder.inputs) == row_digests(images)).all()
    assert (row_digests(on_disk.inputs) == row_digests(images)).all()
