"""Augmentation on the device that can be replayed bit by bit: a view is (index of an example, number of the view, seed).

The random words of a view depend on these three numbers alone: they come from Threefry-2x32 by counter, so neither the batch
(its order and size), nor jit, the device or the PRNG settings of JAX matter. Everything else is selection, integer arithmetic
and exact float products, so compilers cannot round differently. Teacher outputs for a view therefore hold for every replay.

Pixels are uint8, or float32 in [0, 1]. Sizes and shifts are in pixels; 0 disables an operation.

References:
  Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011 (Threefry).
  DeVries & Taylor, Improved regularization of convolutional neural networks with cutout, 2017.
  Zhang et al., mixup: beyond empirical risk minimization, 2018.
  Yun et al., CutMix: regularization strategy to train strong classifiers with localizable features, 2019.
  Beyer et al., Knowledge distillation: a good teacher is patient and consistent, 2022 (function matching: the teacher
    sees the same pixels as the student, mixed at a uniform ratio, without labels).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.errors import check

__all__ = ["Augmentation", "parse", "partner_of", "view_of"]

VERSION = 1  # of the views; part of cache keys. Increase it when the same (index, view, seed) gives other pixels
MIXES = ("mixup", "cutmix")

_SIZES = ("crop", "translate", "cutout")
_NUMBERS = (*_SIZES, "seed", "version")
_WAY_OUT = "try none, auto, or some of flip,crop=4,translate=2,cutout=8,mixup,cutmix,seed=0"
_MIN_AUTO_SIDE = 16  # pixels
_LEVELS = 256  # mixing ratios are multiples of 1/256, so that a weighted sum of two bytes fits 16 bits
_SLOTS = 8  # words for the example's own view; then come those for the partner's view and for the choice of the partner
_PARTNER, _CHOICE, _WORDS = _SLOTS, _SLOTS + 4, _SLOTS + 6


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Operations on an example; hashable, so it can be static under jit."""

    flip: bool = False  # left to right, in half of the views
    crop: int = 0  # pads with zeros and crops at random: shifts by -crop..crop in both directions
    translate: int = 0  # the same shift; the usual name for glyphs
    cutout: int = 0  # side of a square of zeros with a random center, clipped at the borders
    mix: str = ""  # "", "mixup" or "cutmix" with a partner, at a ratio that is uniform on [0, 1]
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        check(min(sizes.values()) >= 0, "sizes and shifts must be at least 0", sizes, "give 0 to disable one")
        check(not (self.crop and self.translate), "crop and translate are the same shift", sizes, "omit one")
        check(self.mix in ("", *MIXES), f"mix must be {' or '.join(MIXES)}", f"'{self.mix}'", "name one, or none")
        check(0 <= self.seed < 2**31, "seed must be an integer from 0 to 2^31 - 1", self.seed, "try 0")

    def describe(self) -> str:
        """Canonical text, which `parse` reads. Equal texts give equal views, so it can be part of a cache key."""
        sizes = [f"{name}={getattr(self, name)}" for name in _SIZES if getattr(self, name)]
        words = ["flip"] * self.flip + sizes + [self.mix] * bool(self.mix)
        return ",".join([*words, f"seed={self.seed}", f"version={VERSION}"])


def parse(text: str, input_shape: Sequence[int]) -> Augmentation | None:
    """Parses the value of --augment.

    `auto` flips and crops (by an eighth of the shorter side) color images of at least 16x16, and leaves all other examples
    unchanged: a mirrored photograph shows the same object, but grayscale images are mostly glyphs, scans or spectra, which
    mirroring changes or destroys.

    Args:
      text: `none`, `auto`, or a comma-separated list of flip, crop=N, translate=N, cutout=N, mixup, cutmix, seed=N.
      input_shape: of one example. mixup works for all shapes, the others for images [H, W, C].

    Returns:
      The augmentation, or None.

    Raises:
      InputError: unknown words, or words that do not go together or do not fit the shape.
    """
    if text == "none":
        return None
    if text == "auto":
        height, width, channels = input_shape if len(input_shape) == 3 else (0, 0, 0)
        short = min(height, width)
        return Augmentation(flip=True, crop=short // 8) if channels == 3 and short >= _MIN_AUTO_SIDE else None
    augmentation = _augmentation(text)
    _check_fits(augmentation, input_shape)
    return augmentation


def _augmentation(text: str) -> Augmentation:
    words = [word.strip().partition("=") for word in text.split(",")]
    numbers = {name: _number(text, value) for name, equals, value in words if equals and name in _NUMBERS}
    flags = [name for name, equals, _ in words if not equals and name in ("flip", *MIXES)]
    mixes = [name for name in flags if name in MIXES]
    check(len(numbers) + len(set(flags)) == len(words), "an augmentation must list known operations, each once, with a number "
          "where one is needed", f"'{text}'", _WAY_OUT)  # fmt: skip
    check(len(mixes) < 2, "an augmentation must mix in one way", f"'{text}'", "omit mixup or cutmix")
    version = numbers.pop("version", VERSION)
    check(version == VERSION, f"views must be of version {VERSION}", f"version={version}", "omit it for new views")
    augmentation = Augmentation(flip="flip" in flags, mix="".join(mixes), **numbers)
    check(
        augmentation != Augmentation(seed=augmentation.seed),
        "an augmentation must change something",
        f"'{text}'",
        _WAY_OUT,
    )
    return augmentation


def _number(text: str, value: str) -> int:
    plain = value.isascii() and value.isdigit()
    check(plain and len(value) <= 10, "the numbers of an augmentation must be integers from 0", f"'{text}'", _WAY_OUT)
    return int(value)


def _check_fits(augmentation: Augmentation, input_shape: Sequence[int]) -> None:
    described, shape = augmentation.describe(), list(input_shape)
    if augmentation == Augmentation(mix="mixup", seed=augmentation.seed):
        return
    check(len(shape) == 3, "only mixup is for examples that are not images [H, W, C]", f"'{described}' for shape {shape}",
          "use mixup or none")  # fmt: skip
    size = max(getattr(augmentation, name) for name in _SIZES)
    check(size < min(shape[:2]), "shifts and cutouts must be smaller than the image", f"'{described}' for shape {shape}",
          "use smaller numbers")  # fmt: skip


def view_of(
    augmentation: Augmentation,
    inputs: jax.Array,
    partners: jax.Array | None,
    index: jax.Array,
    view: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """The views of a batch: flip, shift, mix with the partners' views (with flips and shifts of their own), then cutout.

    Args:
      augmentation: static under jit.
      inputs: [B, ...] uint8 or float32.
      partners: like `inputs`, the examples at rows `partner_of`; None if nothing is mixed.
      index: [B] int32, identifies the examples; not negative.
      view: int32, [B] or one for all; not negative.

    Returns:
      The views, with the shape and type of the inputs, and which of them [B] bool contain a part of their partner: the label
      holds only for the others.
    """
    words = _words(augmentation, index, view)
    mixed = jnp.zeros(inputs.shape[0], bool)
    out = _flip_and_shift(augmentation, inputs, words[:, :_PARTNER])
    if augmentation.mix:
        if partners is None:
            raise ValueError(f"{augmentation.mix} needs partners; got None: fetch the rows of partner_of")
        partners = _flip_and_shift(augmentation, partners, words[:, _PARTNER:_CHOICE])
        out, mixed = (_mixup if augmentation.mix == "mixup" else _cutmix)(out, partners, words)
    if augmentation.cutout:
        side = jnp.full(words.shape[:1], augmentation.cutout)
        out = jnp.where(_square(out.shape, words[:, 3:5], side, side), jnp.zeros((), out.dtype), out)
    return out, mixed


def partner_of(augmentation: Augmentation, row: jax.Array, view: jax.Array | int, n: jax.Array | int) -> jax.Array:
    """The rows of the examples with which a batch is mixed, uniform among all others.

    Args:
      augmentation: only its seed matters.
      row: [B] int32, of the examples, from 0 to n - 1.
      view: int32, [B] or one for all.
      n: number of rows, an array or static; if it is 1, an example is its own partner.

    Returns:
      Rows [B] int32.
    """
    word, rows = _words(augmentation, row, view)[:, _CHOICE], jnp.asarray(n).astype(jnp.uint32)
    away = 1 + word % (jnp.maximum(rows, 2) - 1)
    return ((jnp.asarray(row).astype(jnp.uint32) + away) % rows).astype(jnp.int32)


def _words(augmentation: Augmentation, index: jax.Array, view: jax.Array | int) -> jax.Array:
    """Random words [B, _WORDS] uint32, by fold_in alone: bits drawn from a key depend on settings of JAX."""
    seed = jax.random.key(augmentation.seed, impl="threefry2x32")
    counters = jnp.arange(_WORDS // 2, dtype=jnp.uint32)

    def of_one(index: jax.Array, view: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(seed, index), view)
        return jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(key, i))(counters)).reshape(-1)

    index = jnp.asarray(index).astype(jnp.uint32)
    return jax.vmap(of_one)(index, jnp.broadcast_to(jnp.asarray(view).astype(jnp.uint32), index.shape))


def _below(word: jax.Array, n: int) -> jax.Array:
    """Integers from 0 to n - 1, int32; uniform up to n / 2^32."""
    return (word % np.uint32(n)).astype(jnp.int32)


def _flip_and_shift(augmentation: Augmentation, x: jax.Array, words: jax.Array) -> jax.Array:
    """Flips by word 0 and shifts by words 1 and 2. Padding and slicing is by far the fastest on a CPU."""
    if augmentation.flip:
        flipped = (words[:, 0] >> 31).astype(bool)
        x = jnp.where(flipped[:, None, None, None], x[:, :, ::-1], x)
    pad = augmentation.crop or augmentation.translate
    if not pad:
        return x
    corner = _below(words[:, 1:3], 2 * pad + 1)
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return jax.vmap(lambda one, at: jax.lax.dynamic_slice(one, (at[0], at[1], 0), x.shape[1:]))(padded, corner)


def _mixup(x: jax.Array, partner: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a x + (1 - a) partner, with a in 0/256, ..., 256/256 by word 5; bytes are rounded to the nearest, halves up."""
    of_own = _below(words[:, 5], _LEVELS + 1)
    a = of_own.reshape(-1, *(1,) * (x.ndim - 1))
    if x.dtype == jnp.uint8:
        a = a.astype(jnp.uint16)
        total = a * x.astype(jnp.uint16) + (_LEVELS - a) * partner.astype(jnp.uint16) + _LEVELS // 2
        out = (total >> 8).astype(jnp.uint8)
    else:
        a = a.astype(jnp.float32)
        (x_high, x_low), (p_high, p_low) = _halves(x), _halves(partner)
        b = _LEVELS - a
        out = ((a * x_high + b * p_high) + (a * x_low + b * p_low)) * (1 / _LEVELS)
    return out, of_own < _LEVELS


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits float32 into a sum of two numbers of 12 significant bits each.

    Their products with a ratio are exact, so fusing them with the sum (FMA) changes nothing.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFFF000), jnp.float32)
    return high, x - high


def _cutmix(x: jax.Array, partner: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inserts the partner within a box whose fraction of the area, before clipping, is m / 256, m = 0, ..., 256 by word 5.

    The box has the proportions of the image and a center (words 6, 7) that is uniform over the pixels.
    """
    share = _below(words[:, 5], _LEVELS + 1)
    height, width = (_sides(size)[share] for size in x.shape[1:3])
    box = _square(x.shape, words[:, 6:8], height, width)
    return jnp.where(box, partner, x), box.any((1, 2, 3))


def _sides(size: int) -> jax.Array:
    """floor(size sqrt(m / 256)) for all m, exact, [257] int32."""
    return jnp.asarray([math.isqrt(size * size * m // _LEVELS) for m in range(_LEVELS + 1)], jnp.int32)


def _square(shape: Sequence[int], words: jax.Array, height: jax.Array, width: jax.Array) -> jax.Array:
    """Which pixels are in a box of these sizes [B] around a center from the two words: [B, H, W, 1] bool."""
    inside = []
    for axis, side in enumerate((height, width)):
        size = shape[1 + axis]
        start = (_below(words[:, axis], size) - side // 2)[:, None]
        at = jnp.arange(size)
        inside.append((at >= start) & (at < start + side[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :])[..., None]
