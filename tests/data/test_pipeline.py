"""Pools and their supply: the batches that students see, resident or window by window, and what the teacher says of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill.data.augment import Augmentation
from ev3_distill.data.batches import sampler
from ev3_distill.data.pipeline import PART_STEPS, ResidentPipeline, Source, Views, WindowPipeline
from ev3_distill.data.shuffle import batch_rows, make_order
from ev3_distill.data.sources import Dataset

N, B, V, SEED = 70, 8, 3, 5
PER_EPOCH = N // B
INDEX = np.sort(np.random.default_rng(1).permutation(100)[:N])  # the explore split is some of the data set's rows
ALL = np.concatenate([INDEX, np.setdiff1d(np.arange(90), INDEX)])  # and assess and decide; the other rows are sealed
PER_FINAL_EPOCH = len(ALL) // B
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


def views_of(dataset, augmentation, index=INDEX):
    return Views(dataset.inputs, dataset.labels, index, augmentation)


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


def supplies(name, dtype=np.uint8, steps=5, has_final=False):
    dataset, augmentation = make_dataset(dtype), AUGMENTATIONS[name]
    views, of_all = (views_of(dataset, augmentation, index) for index in (INDEX, ALL))
    facts = {"count": V if AUGMENTATIONS[name] else 1, "batch_size": B, "seed": SEED}
    teachers = RecordingTeacher(), RecordingTeacher()
    finals = [Source(of_all, teacher_of) if has_final else None for teacher_of in teachers]
    pair = (
        ResidentPipeline(views, teachers[0], **facts, final=finals[0]),
        WindowPipeline(views, teachers[1], **facts, steps=steps, final=finals[1]),
    )
    sample = jax.jit(sampler(batch_size=B, views=facts["count"], augmentation=AUGMENTATIONS[name]))
    return pair, teachers, sample


def batches(supply, sample, first, last, final=False):
    """Batch by step."""
    found = {}
    for pool, begin, end in supply(first, last, final):
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


def assert_equal_batches(ours, theirs):
    assert list(ours) == list(theirs)
    for step, batch in ours.items():
        assert jax.tree.structure(batch) == jax.tree.structure(theirs[step])
        jax.tree.map(np.testing.assert_array_equal, batch, theirs[step])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_batches_before_a_final_phase_are_those_of_a_run_without_one(name):
    without, _, sample = supplies(name)
    having, teachers, _ = supplies(name, has_final=True)
    for ours, theirs in zip(having, without, strict=True):
        assert_equal_batches(batches(ours, sample, 0, 2 * V * PER_EPOCH), batches(theirs, sample, 0, 2 * V * PER_EPOCH))
    for teacher_of in teachers:
        assert {position for _, position in teacher_of.asked} == set(INDEX.tolist())


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_final_phase_has_all_rows_of_three_splits_in_both_pipelines(name):
    """Teacher outputs are those of the same pixels, at the turn, after a resume, and with partners of all three splits."""
    turn = 2 * PER_EPOCH + 3
    first = turn // PER_FINAL_EPOCH * PER_FINAL_EPOCH + PER_FINAL_EPOCH  # of the first whole epoch of the phase
    dataset, of_all = make_dataset(), views_of(make_dataset(), AUGMENTATIONS[name], ALL)
    order, outcomes = make_order(len(ALL), SEED), []
    pair, _, sample = supplies(name, has_final=True)
    for supply in pair:
        batches(supply, sample, 0, turn)
        outcomes.append(batches(supply, sample, turn, first + PER_FINAL_EPOCH, True))
    resumed = [batches(one, sample, turn, first + PER_FINAL_EPOCH, True) for one in supplies(name, has_final=True)[0]]
    for outcome in (outcomes[1], *resumed):
        assert_equal_batches(outcomes[0], outcome)
    visited = np.concatenate([outcomes[0][step].index for step in range(first, first + PER_FINAL_EPOCH)])
    assert len(set(visited.tolist())) == PER_FINAL_EPOCH * B == len(ALL) - len(ALL) % B
    assert set(visited.tolist()) <= set(ALL.tolist())
    for step, batch in outcomes[0].items():
        np.testing.assert_array_equal(batch.index, ALL[batch_rows(order, jnp.int32(step), batch_size=B)])
        view = step // PER_FINAL_EPOCH % (V if AUGMENTATIONS[name] else 1)
        np.testing.assert_array_equal(batch.inputs, of_all.pixels(view, batch.index))
        np.testing.assert_array_equal(batch.teacher["logits"], teacher(batch.inputs))
        mixed = batch.targets == -1
        np.testing.assert_array_equal(batch.targets[~mixed], dataset.labels[batch.index][~mixed])
        assert not mixed.any() or AUGMENTATIONS[name].mix


@pytest.mark.parametrize("which", [0, 1])
def test_no_example_is_mixed_with_held_out_rows_before_the_final_phase(which):
    dataset = make_dataset()
    dataset.inputs[:] = 255  # would show through
    dataset.inputs[INDEX] = 0
    views, of_all = (views_of(dataset, AUGMENTATIONS["mixup"], index) for index in (INDEX, ALL))
    facts = {"count": V, "batch_size": B, "seed": SEED, "final": Source(of_all, RecordingTeacher())}
    supply = (
        ResidentPipeline(views, RecordingTeacher(), **facts),
        WindowPipeline(views, RecordingTeacher(), **facts, steps=5),
    )[which]
    sample = jax.jit(sampler(batch_size=B, views=V, augmentation=AUGMENTATIONS["mixup"]))
    for batch in batches(supply, sample, 0, V * PER_EPOCH).values():
        assert batch.inputs.max() == 0
    later = batches(supply, sample, V * PER_EPOCH, (V + 1) * PER_EPOCH, True).values()
    assert any((batch.inputs.max((1, 2, 3)) > 0)[np.isin(batch.index, INDEX)].any() for batch in later)


def test_teacher_runs_on_held_out_rows_only_in_the_final_phase_and_shapes_stay():
    (resident, _), (teacher_of, _), _ = supplies("crop", has_final=True)
    (before, _, _), *_ = resident(0, PER_EPOCH)
    assert len(teacher_of.asked) == N and not set(teacher_of.asked) & {(0, row) for row in ALL[N:]}
    (later, _, _), *_ = resident(PER_FINAL_EPOCH, PER_FINAL_EPOCH + 1, True)
    assert {view for view, _ in teacher_of.asked[N:]} == {1}
    assert [position for _, position in teacher_of.asked[N:]] == ALL.tolist()
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, later)
    assert (bool(before.final), bool(later.final)) == (False, True)


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
