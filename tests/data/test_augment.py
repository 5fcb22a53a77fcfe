"""Augmented views: equal to a NumPy reference, replayed exactly in any batch, and distributed correctly."""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ev3_distill.data.augment import Augmentation, parse, partner_of, view_of
from ev3_distill.errors import InputError

RGB, GREY, VECTOR = (32, 32, 3), (28, 28, 1), (5,)
ALL = Augmentation(flip=True, crop=3, cutout=5, mix="mixup", seed=7)
KINDS = (
    Augmentation(flip=True),
    Augmentation(crop=2),
    Augmentation(translate=3),
    Augmentation(cutout=4),
    Augmentation(mix="mixup"),
    Augmentation(mix="cutmix"),
    Augmentation(flip=True, crop=3, cutout=5, mix="cutmix", seed=2**31 - 1),
    ALL,
)

view_jit = jax.jit(view_of, static_argnums=0)
partner_jit = jax.jit(partner_of, static_argnums=(0, 3))


def images(n, shape=(12, 9, 3), dtype="uint8", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)
    return pixels if dtype == "uint8" else pixels / np.float32(255)


# The reference.


def threefry(key, data):
    """Salmon et al.'s Threefry-2x32 with 20 rounds, of one block."""
    mask = 0xFFFFFFFF
    schedule = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (data[0] + schedule[0]) & mask, (data[1] + schedule[1]) & mask
    for i in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = (x + y) & mask
            y = ((y << rotation | y >> 32 - rotation) & mask) ^ x
        x = (x + schedule[(i + 1) % 3]) & mask
        y = (y + schedule[(i + 2) % 3] + i + 1) & mask
    return x, y


def words_of(seed, index, view):
    key = threefry(threefry((0, seed), (0, index)), (0, view))
    return [word for i in range(7) for word in threefry(key, (0, i))]


def moved(a, x, words):
    height, width = x.shape[:2]
    pad = a.crop + a.translate
    if a.flip and words[0] >= 2**31:
        x = x[:, ::-1]
    out = np.zeros_like(x)
    down, across = (word % (2 * pad + 1) - pad for word in words[1:3])
    for i in range(height):
        for j in range(width):
            if 0 <= i + down < height and 0 <= j + across < width:
                out[i, j] = x[i + down, j + across]
    return out


def box(shape, words, sides):
    mask = np.zeros(shape[:2], bool)
    (top, height), (left, width) = ((w % n - s // 2, s) for w, n, s in zip(words, shape, sides, strict=False))
    mask[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = True
    return mask


def reference(a, x, partner, index, view):
    """One view in NumPy, step by step."""
    words = words_of(a.seed, index, view)
    out, mixed, m = moved(a, x, words), False, words[5] % 257
    if a.mix:
        other = moved(a, partner, words[8:])
    if a.mix == "mixup":
        mixed = m < 256
        blend = m / 256 * out.astype(np.float64) + (256 - m) / 256 * other.astype(np.float64)
        out = (np.floor(blend + 0.5) if x.dtype == np.uint8 else blend).astype(x.dtype)
    if a.mix == "cutmix":
        where = box(x.shape, words[6:], [math.floor(n * math.sqrt(m / 256)) for n in x.shape[:2]])
        out, mixed = np.where(where[..., None], other, out), where.any()
    if a.cutout:
        out = np.where(box(x.shape, words[3:], (a.cutout, a.cutout))[..., None], 0, out).astype(x.dtype)
    return out, mixed


CASES = [(a, "uint8") for a in KINDS] + [(a, "float32") for a in KINDS[-4:]]


@pytest.mark.parametrize(("a", "dtype"), CASES)
def test_against_numpy(a, dtype):
    x, partners = images(24, dtype=dtype), images(24, dtype=dtype, seed=1)
    index, view = np.arange(24) * 1_000_003 % 2**31, np.arange(24) % 5
    out, mixed = view_jit(a, x, partners, index, view)
    wanted = [reference(a, *four) for four in zip(x, partners, index.tolist(), view.tolist(), strict=True)]
    assert out.dtype == x.dtype
    np.testing.assert_array_equal(mixed, [mixed for _, mixed in wanted])
    if dtype == "uint8" or a.mix != "mixup":
        np.testing.assert_array_equal(out, [one for one, _ in wanted])
    else:
        np.testing.assert_allclose(out, [one for one, _ in wanted], rtol=3e-7)


def test_partner_against_numpy():
    rows, n = np.array([0, 1, 41, 42]), 43
    wanted = [(row + 1 + words_of(9, row, 6)[12] % (n - 1)) % n for row in rows.tolist()]
    np.testing.assert_array_equal(partner_of(Augmentation(seed=9), rows, 6, n), wanted)


def test_views_of_this_version_are_pinned():
    """If these change, cached teacher outputs are stale: increase augment.VERSION."""
    assert words_of(7, 123, 4)[:2] == [816647395, 2540900920]
    out, _ = view_jit(ALL, images(8), images(8, seed=1), np.arange(8), np.arange(8))
    assert hashlib.sha256(np.asarray(out).tobytes()).hexdigest()[:16] == "f974920290c497d2"


# Replay.


@functools.cache
def thousand():
    """Views of 1,000 random (example, view) pairs of 200 examples, as one batch."""
    rng = np.random.default_rng(3)
    index, view = rng.integers(0, 200, 1000), rng.integers(0, 1000, 1000)
    return index, view


def batches(n, sizes, seed):
    rows, cuts = np.random.default_rng(seed).permutation(n), np.cumsum(sizes)
    return [part for part in np.split(rows, cuts) if len(part)]


@pytest.mark.parametrize(("mix", "dtype"), [("mixup", "uint8"), ("mixup", "float32"), ("cutmix", "uint8")])
def test_replay_is_exact(mix, dtype):
    """For any batch, its order and size, under jit, scan or neither, and for any PRNG settings of JAX."""
    a = Augmentation(flip=True, crop=3, cutout=5, mix=mix, seed=11)
    data, (index, view) = images(200, dtype=dtype), thousand()

    def views(f, rows):
        partner = data[partner_jit(a, index[rows], view[rows], 200)]
        return np.asarray(f(a, data[index[rows]], partner, index[rows], view[rows])[0])

    wanted = views(view_jit, np.arange(1000))
    assert len({one.tobytes() for one in wanted}) > 950
    for rows in batches(1000, [1, 60], seed=0):
        np.testing.assert_array_equal(views(view_jit, rows), wanted[rows])
    np.testing.assert_array_equal(views(view_of, np.arange(1000)[::-1]), wanted[::-1])
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(views(view_jit, np.arange(1000)), wanted)

    @jax.jit
    def scanned(data):
        def step(_, pair):
            i, v = pair
            x, other = jnp.asarray(data)[i], jnp.asarray(data)[partner_of(a, i, v, 200)]
            out = view_of(a, x, other, i, v)[0]
            return None, (out, out.astype(jnp.float32).sum())  # something to fuse with

        return jax.lax.scan(step, None, (index.reshape(20, 50), view.reshape(20, 50)))[1][0]

    np.testing.assert_array_equal(np.asarray(scanned(data)).reshape(wanted.shape), wanted)


def test_a_view_depends_on_seed_index_and_number():
    x = images(1)

    def view(seed, index, number):
        return np.asarray(view_jit(Augmentation(crop=3, seed=seed), x, None, np.array([index]), number)[0]).tobytes()

    same = [view(0, 5, n) == view(0, 5, n + 1) for n in range(20)]
    same += [view(0, i, 0) == view(0, i + 1, 0) for i in range(20)]
    same += [view(s, 5, 0) == view(s + 1, 5, 0) for s in range(4)]
    assert sum(same) <= 5  # 49 shifts: 0.9 expected
    one = view_of(ALL, images(3), images(3), jnp.arange(3), 4)[0]
    np.testing.assert_array_equal(one, view_of(ALL, images(3), images(3), jnp.arange(3), jnp.full(3, 4))[0])


# By hand, and in distribution.


def test_crops_and_flips_by_hand():
    x = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    views = {}
    for v in range(60):
        out = np.asarray(view_jit(Augmentation(crop=1), x, None, np.zeros(1, int), v)[0])[0, :, :, 0]
        views[tuple(out.ravel().tolist())] = v
    assert (1, 2, 3, 4, 5, 6, 7, 8, 9) in views
    assert (0, 0, 0, 0, 1, 2, 0, 4, 5) in views
    assert (5, 6, 0, 8, 9, 0, 0, 0, 0) in views
    assert len(views) == 9
    flips = {np.asarray(view_jit(Augmentation(flip=True), x, None, np.zeros(1, int), v)[0]).tobytes() for v in range(9)}
    assert flips == {x.tobytes(), x[:, :, ::-1].tobytes()}


def test_mixing_equal_images_changes_nothing():
    """Also 255 does not overflow, and the ratio reaches both ends."""
    same = images(5000, (1, 1, 1))
    a = Augmentation(mix="mixup")
    out, mixed = view_jit(a, same, same, np.arange(5000), 0)
    np.testing.assert_array_equal(out, same)
    white, black = np.full_like(same, 255), np.zeros_like(same)
    out, mixed = (np.asarray(x) for x in view_jit(a, white, black, np.arange(5000), 0))
    assert out.min() == 0
    assert out.max() == 255
    assert (out[~mixed] == 255).all()
    assert 5 < (~mixed).sum() < 40  # one in 257
    assert chisquare(np.histogram(out, 15, (0, 255.001))[0]).pvalue > 1e-3
    out, mixed = (np.asarray(x) for x in view_jit(a, white / np.float32(255), black * 0.0, np.arange(5000), 0))
    assert (out.max(), out.dtype) == (1, np.float32)


def test_distributions():
    n = 20_000
    x = np.zeros((n, 9, 9, 1), np.uint8)
    x[:, 4, 4] = 1
    x[:, 4, 3] = 2
    out = np.asarray(view_jit(Augmentation(flip=True, crop=4), x[:, :, :], None, np.arange(n), 3)[0])[..., 0]
    shown = out[(out == 1).any((1, 2)) & (out == 2).any((1, 2))]
    assert len(shown) > 0.85 * n
    one, two = (np.argwhere(shown == value)[:, 2] for value in (1, 2))
    assert abs((two > one).mean() - 0.5) < 0.015
    still = np.asarray(view_jit(Augmentation(crop=4), x, None, np.arange(n), 3)[0])[..., 0]
    _, row, column = np.argwhere(still == 1).T
    assert len(row) == n
    assert chisquare(np.bincount(row * 9 + column, minlength=81)).pvalue > 1e-3

    hole = np.asarray(view_jit(Augmentation(cutout=3), x * 0 + 1, None, np.arange(n), 0)[0])[..., 0] == 0
    areas = hole.sum((1, 2))
    assert set(areas.tolist()) == {4, 6, 9}
    assert abs(areas.mean() - (3 - 2 / 9) ** 2) < 0.05
    centres = hole[areas == 9].reshape(-1, 81).argmax(1)
    assert chisquare(np.bincount(centres)[np.bincount(centres) > 0]).pvalue > 1e-3

    other = np.asarray(view_jit(Augmentation(mix="cutmix"), x * 0, x * 0 + 1, np.arange(n), 0)[0])
    mixed = np.asarray(view_jit(Augmentation(mix="cutmix"), x * 0, x * 0 + 1, np.arange(n), 0)[1])
    np.testing.assert_array_equal(mixed, other.any((1, 2, 3)))
    sides = [math.floor(9 * math.sqrt(m / 256)) for m in range(257)]
    shares = [np.mean([box((9, 1), (at, 0), (side, 1)).mean() for at in range(9)]) for side in sides]
    assert abs(other.mean() - np.mean(np.square(shares))) < 0.01

    rows = np.asarray(partner_jit(ALL, jnp.arange(n) % 20, jnp.arange(n) // 20, 20))
    away = (rows - np.arange(n)) % 20
    assert chisquare(np.bincount(away, minlength=20)[1:]).pvalue > 1e-3


@given(n=st.integers(1, 2**31 - 1), view=st.integers(0, 2**31 - 1), seed=st.integers(0, 2**31 - 1), data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_partner_is_another_example(n, view, seed, data):
    row = data.draw(st.integers(0, n - 1))
    partner = int(partner_of(Augmentation(seed=seed), jnp.array([row]), view, n)[0])
    assert 0 <= partner < n
    assert (partner == row) == (n == 1)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(2, 6), st.integers(2, 6), st.integers(1, 4)),
    dtype=st.sampled_from([np.uint8, np.float32]),
    mix=st.sampled_from(["", "mixup", "cutmix"]),
    size=st.integers(0, 1),
    flip=st.booleans(),
)
@settings(max_examples=6, deadline=None)
def test_shapes_and_types(shape, dtype, mix, size, flip):
    a = Augmentation(flip=flip, translate=size, cutout=size, mix=mix)
    x = np.ones(shape, dtype)
    out, mixed = view_of(a, x, x if mix else None, jnp.arange(shape[0]), 0)
    assert (out.shape, out.dtype) == (shape, dtype)
    assert (mixed.shape, mixed.dtype) == (shape[:1], bool)


def test_vectors_can_be_mixed():
    x, partners = np.float32([[1, -2, 1e-3]]), np.float32([[5, 8, 1e6]])
    out = view_of(parse("mixup", (3,)), x, partners, jnp.array([1]), 0)[0]
    share = words_of(0, 1, 0)[5] % 257 / 256
    np.testing.assert_allclose(out, share * x + (1 - share) * partners, rtol=1e-6)
    with pytest.raises(ValueError, match="mixup needs partners"):
        view_of(Augmentation(mix="mixup"), x, None, jnp.array([1]), 0)


# The option.


def test_parse_reads_what_describe_writes():
    assert parse("none", RGB) is None
    assert parse("auto", RGB) == Augmentation(flip=True, crop=4)
    assert parse("auto", (16, 64, 3)) == Augmentation(flip=True, crop=2)
    for shape in (GREY, (15, 32, 3), (8, 8, 1), VECTOR, (100, 3)):
        assert parse("auto", shape) is None
    assert parse("flip,crop=4, cutout=8,mixup", RGB) == Augmentation(flip=True, crop=4, cutout=8, mix="mixup")
    assert parse("translate=2", GREY) == Augmentation(translate=2)
    for a in KINDS:
        assert parse(a.describe(), RGB) == a
    assert ALL.describe() == "flip,crop=3,cutout=5,mixup,seed=7,version=1"
    assert len({a.describe() for a in KINDS}) == len({hash(a) for a in KINDS}) == len(KINDS)


@pytest.mark.parametrize(
    ("text", "shape", "says"),
    [
        ("", RGB, "must list known operations"),
        ("rotate=3", RGB, "must list known operations, each once, .*got 'rotate=3': try none, auto"),
        ("flip,flip", RGB, "each once"),
        ("crop=2,crop=2", RGB, "each once"),
        ("flip=1", RGB, "a number where one is needed"),
        ("crop", RGB, "a number where one is needed"),
        ("none,flip", RGB, "must list known operations"),
        ("crop=-1", RGB, "must be integers from 0"),
        ("crop=1.5", RGB, "must be integers from 0"),
        ("crop=", RGB, "must be integers from 0"),
        ("crop=1,translate=1", RGB, "are the same shift"),
        ("mixup,cutmix", RGB, "must mix in one way"),
        ("seed=3", RGB, "must change something"),
        ("crop=0", RGB, "must change something"),
        ("flip,version=0", RGB, "views must be of version 1; got version=0"),
        ("crop=32", RGB, r"must be smaller than the image; got 'crop=32,.*' for shape \[32, 32, 3\]"),
        ("cutout=28", GREY, "smaller than the image"),
        ("flip", VECTOR, r"only mixup is for examples that are not images .* for shape \[5\]"),
        ("cutmix", (100, 3), "use mixup or none"),
    ],
)
def test_bad_augmentations_are_refused(text, shape, says):
    with pytest.raises(InputError, match=says):
        parse(text, shape)


@pytest.mark.parametrize("bad", [{"crop": -1}, {"mix": "mix"}, {"seed": -1}, {"seed": 2**31}])
def test_bad_fields_are_refused(bad):
    with pytest.raises(InputError, match=r"; got .*: "):
        Augmentation(**bad)
