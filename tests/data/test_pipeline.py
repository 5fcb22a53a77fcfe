"""Pools and their supply: the batches that students see, resident or window by window, and what the teacher says of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill.data.augment import Augmentation
from ev3_distill.data.batches import sampler
from ev3_distill.data.pipeline import PART_STEPS, ResidentPipeline, Views, WindowPipeline
from ev3_distill.data.shuffle import batch_rows, make_order
from ev3_distill.data.sources import Dataset

N, B, V, SEED = 70, 8, 3, 5
PER_EPOCH = N // B
INDEX = np.sort(np.random.default_rng(1).permutation(100)[:N])  # the explore split is some of the data set's rows
AUGMENTATIONS = {
    "none": None,
    "crop": Augmentation(flip=True, crop=2),
    "mixup": Augmentation(flip=True, crop=2, mix="mixup"),
    "cutmix": Augmentation(cutout=3, mix="cutmix"),
}


def make_dataset(dtype=np.uint8):
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (100, 9, 8, 3)).astype(np.uint8)
    if dtype == np.float32:
        inputs = inputs.astype(np.float32) / 255
    return Dataset(inputs, rng.integers(0, 4, 100).astype(np.int32), 4, tuple("abcd"), None, "made", "f")


def views_of(dataset, augmentation):
    return Views(dataset.inputs, dataset.labels, INDEX, augmentation)


def teacher(pixels):
    """Logits that tell every pixel apart."""
    flat = np.asarray(pixels, np.float64).reshape(len(pixels), -1)
    return (flat @ np.random.default_rng(2).normal(size=(flat.shape[1], 4)) / 1000).astype(np.float32)


class RecordingTeacher:
    """Runs the teacher and records which views of which examples it ran on."""

    def __init__(self):
        self.asked = []

    def __call__(self, view, positions, pixels_of):
        self.asked += [(view, int(position)) for position in positions]
        halves = [pixels_of(part) for part in np.array_split(positions, 2)]  # as a cache asks, piece by piece
        pixels = np.concatenate(halves)
        return {"logits": teacher(pixels), "mean": pixels.reshape(len(pixels), -1).mean(1, dtype=np.float32)}


def supplies(name, dtype=np.uint8, steps=5):
    views = views_of(make_dataset(dtype), AUGMENTATIONS[name])
    facts = {"count": V if AUGMENTATIONS[name] else 1, "batch_size": B, "seed": SEED}
    teachers = RecordingTeacher(), RecordingTeacher()
    pair = ResidentPipeline(views, teachers[0], **facts), WindowPipeline(views, teachers[1], **facts, steps=steps)
    sample = jax.jit(sampler(batch_size=B, views=facts["count"], augmentation=AUGMENTATIONS[name]))
    return pair, teachers, sample


def batches(supply, sample, first, last):
    """Batch by step."""
    found = {}
    for pool, begin, end in supply(first, last):
        for step in range(begin, end):
            assert step not in found
            found[step] = jax.device_get(sample(pool, jnp.int32(step)))
    assert list(found) == list(range(first, last))
    return found


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_windows_give_the_batches_of_a_resident_split(name, dtype):
    (resident, window), _, sample = supplies(name, dtype)
    wanted = batches(resident, sample, 0, 4 * PER_EPOCH)
    found = {}
    for first, last in ((0, 3), (3, 4), (4, 17), (17, 4 * PER_EPOCH)):  # whatever the iterations
        found |= batches(window, sample, first, last)
    for step, batch in wanted.items():
        assert jax.tree.structure(batch) == jax.tree.structure(found[step])
        jax.tree.map(np.testing.assert_array_equal, batch, found[step])
        assert batch.inputs.dtype == dtype


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("which", [0, 1])
def test_the_teacher_saw_the_very_pixels(name, which):
    pair, _, sample = supplies(name)
    for batch in batches(pair[which], sample, 0, 2 * V * PER_EPOCH).values():
        np.testing.assert_array_equal(batch.teacher["logits"], teacher(batch.inputs))
        np.testing.assert_array_equal(batch.teacher["mean"], batch.inputs.reshape(B, -1).mean(1, dtype=np.float32))


@pytest.mark.parametrize("which", [0, 1])
def test_each_epoch_has_the_next_view_and_then_the_first_again(which):
    pair, _, sample = supplies("crop")
    found = batches(pair[which], sample, 0, (V + 1) * PER_EPOCH)
    dataset, views = make_dataset(), views_of(make_dataset(), AUGMENTATIONS["crop"])
    for step, batch in found.items():
        np.testing.assert_array_equal(
            batch.index, INDEX[batch_rows(make_order(N, SEED), jnp.int32(step), batch_size=B)]
        )
        np.testing.assert_array_equal(batch.targets, dataset.labels[batch.index])
        np.testing.assert_array_equal(batch.inputs, views.pixels(step // PER_EPOCH % V, batch.index))


def test_mixed_examples_have_no_label_and_partners_of_their_own_split():
    _, _, sample = supplies("mixup")
    dataset = make_dataset()
    outside = np.setdiff1d(np.arange(100), INDEX)
    dataset.inputs[INDEX] = 0
    dataset.inputs[outside] = 255  # would show through
    views = views_of(dataset, AUGMENTATIONS["mixup"])
    supply = ResidentPipeline(views, RecordingTeacher(), count=V, batch_size=B, seed=SEED)
    mixed = 0
    for batch in batches(supply, sample, 0, PER_EPOCH).values():
        assert batch.inputs.max() == 0
        mixed += (batch.targets == -1).sum()
        assert set(batch.targets[batch.targets >= 0]) <= set(range(4))
    assert mixed > PER_EPOCH * B * 0.9


def test_views_are_learnt_when_the_run_reaches_them():
    (resident, window), teachers, _ = supplies("crop")
    list(resident(0, PER_EPOCH))
    assert {view for view, _ in teachers[0].asked} == {0}
    assert len(teachers[0].asked) == N
    list(resident(PER_EPOCH, PER_EPOCH + 1))
    assert {view for view, _ in teachers[0].asked} == {0, 1}
    list(resident(PER_EPOCH + 1, 10 * PER_EPOCH))
    assert len(teachers[0].asked) == len(set(teachers[0].asked)) == V * N
    list(window(0, 5))
    assert len(teachers[1].asked) == 5 * B  # a window asks for what it shows


def test_a_window_is_read_once_and_a_resumed_run_begins_within_one():
    (_, window), teachers, sample = supplies("crop")
    for first in range(10):
        list(window(first, first + 1))
    assert len(teachers[1].asked) == 2 * 5 * B
    (resumed, other), _, _ = supplies("crop")
    whole = batches(resumed, sample, 0, 14)
    late = batches(other, sample, 12, 14)
    for step in (12, 13):
        jax.tree.map(np.testing.assert_array_equal, late[step], whole[step])


def test_long_trajectories_come_in_parts():
    (resident, _), _, _ = supplies("none")
    assert [(begin, end) for _, begin, end in resident(3, 3 + 2 * PART_STEPS + 1)] == [
        (3, 3 + PART_STEPS),
        (3 + PART_STEPS, 3 + 2 * PART_STEPS),
        (3 + 2 * PART_STEPS, 4 + 2 * PART_STEPS),
    ]


def test_replay_is_exact_for_random_pairs_of_sample_and_view():
    """1,000 pairs, each shown alone on the device, against what the teacher was asked on the host in bulk."""
    views = views_of(make_dataset(), AUGMENTATIONS["mixup"])
    rng = np.random.default_rng(3)
    pairs = np.stack([rng.choice(INDEX, 1000), rng.integers(0, 9, 1000)], 1).astype(np.int32)
    cached = {}
    for view in range(9):
        cached |= dict(zip([(int(p), view) for p in INDEX], teacher(views.pixels(view, INDEX)), strict=True))
    one = functools.lru_cache(None)(lambda p, v: teacher(views.pixels(v, np.array([p])))[0])
    for position, view in pairs.tolist():
        np.testing.assert_allclose(one(position, view), cached[position, view], rtol=1e-5, atol=1e-6)
