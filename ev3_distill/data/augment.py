"""Augmentation on the device, replayed bit by bit: a view is (index of an example, number of the view, seed).

A view's random words are functions of these three numbers alone: Threefry-2x32 by name, words by counter, so neither the
batch, its order and size, jit, the device, nor JAX's PRNG settings matter. All else is selection of values, integers, and
float products that are exact, which leaves nothing for a compiler to round its own way. What a teacher said of a view is
therefore true of every replay of it.

Pixels: uint8, or float32 in [0, 1]. Sizes and shifts are in pixels, 0 turns a thing off.

References:
  Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011 (Threefry).
  DeVries & Taylor, Improved regularization of convolutional neural networks with cutout, 2017.
  Zhang et al., mixup: beyond empirical risk minimization, 2018.
  Yun et al., CutMix: regularization strategy to train strong classifiers with localizable features, 2019.
  Beyer et al., Knowledge distillation: a good teacher is patient and consistent, 2022 (function matching: the teacher
    sees the student's very pixels, mixed at a uniform ratio, and no label is asked for).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.errors import check

__all__ = ["Augmentation", "parse", "partner_of", "view_of"]

VERSION = 1  # of the views: raise it where the same (index, view, seed) gives other pixels; it is part of cache keys
MIXES = ("mixup", "cutmix")

_SIZES = ("crop", "translate", "cutout")
_NUMBERS = (*_SIZES, "seed", "version")
_WAY_OUT = "try none, auto, or some of flip,crop=4,translate=2,cutout=8,mixup,cutmix,seed=0"
_LEAST_AUTO = 16  # pixels
_LEVELS = 256  # a mixing ratio is in 1/256ths: products with a byte and its complement's sum fit 16 bits
_SLOTS = 8  # words that an example's own view takes; its partner's, and the choice of the partner, come after
_PARTNER, _CHOICE, _WORDS = _SLOTS, _SLOTS + 4, _SLOTS + 6


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What may happen to an example; hashable, so static under jit."""

    flip: bool = False  # left to right, in half of the views
    crop: int = 0  # pads by so many zeros and crops at random: a shift by -crop..crop down and across
    translate: int = 0  # the same shift under the name it has for glyphs
    cutout: int = 0  # side of a square of zeros, centred anywhere, clipped at the borders
    mix: str = ""  # "", "mixup" or "cutmix": with a partner, at a ratio uniform on [0, 1]
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        check(min(sizes.values()) >= 0, "sizes and shifts are at least 0", sizes, "0 turns one off")
        check(not (self.crop and self.translate), "crop and translate are one and the same shift", sizes, "drop one")
        check(self.mix in ("", *MIXES), f"a mix is {' or '.join(MIXES)}", f"'{self.mix}'", "name one, or none")
        check(0 <= self.seed < 2**31, "a seed is a whole number from 0 to 2^31 - 1", self.seed, "try 0")

    def describe(self) -> str:
        """Canonical text, which `parse` reads back; equal texts make equal views, so it may be part of a cache's key."""
        sizes = [f"{name}={getattr(self, name)}" for name in _SIZES if getattr(self, name)]
        words = ["flip"] * self.flip + sizes + [self.mix] * bool(self.mix)
        return ",".join([*words, f"seed={self.seed}", f"version={VERSION}"])


def parse(text: str, input_shape: Sequence[int]) -> Augmentation | None:
    """Reads what a user asks for.

    `auto` flips and crops (by an eighth of the shorter side) colour images of at least 16x16, and does nothing to all
    else: a mirrored or shifted photograph is of the same thing, but greyscale images are mostly glyphs, scans or spectra,
    where a mirrored one is another thing or none.

    Args:
      text: `none`, `auto`, or words joined by commas, of flip, crop=N, translate=N, cutout=N, mixup, cutmix, seed=N.
      input_shape: of one example. Only mixup is for all shapes; the others are for images [H, W, C].

    Returns:
      The augmentation; None where there is none.

    Raises:
      InputError: words that are unknown, do not go together or do not fit the shape.
    """
    if text == "none":
        return None
    if text == "auto":
        height, width, channels = input_shape if len(input_shape) == 3 else (0, 0, 0)
        short = min(height, width)
        return Augmentation(flip=True, crop=short // 8) if channels == 3 and short >= _LEAST_AUTO else None
    augmentation = _augmentation(text)
    _check_fits(augmentation, input_shape)
    return augmentation


def _augmentation(text: str) -> Augmentation:
    words = [word.strip().partition("=") for word in text.split(",")]
    numbers = {name: _number(text, value) for name, equals, value in words if equals and name in _NUMBERS}
    flags = [name for name, equals, _ in words if not equals and name in ("flip", *MIXES)]
    mixes = [name for name in flags if name in MIXES]
    check(len(numbers) + len(set(flags)) == len(words), "an augmentation names what it knows, each once, with a number "
           "where one is due", f"'{text}'", _WAY_OUT)  # fmt: skip
    check(len(mixes) < 2, "an augmentation mixes in one way", f"'{text}'", "drop mixup or cutmix")
    version = numbers.pop("version", VERSION)
    check(version == VERSION, f"views are of version {VERSION} here", f"version={version}", "drop it for new views")
    made = Augmentation(flip="flip" in flags, mix="".join(mixes), **numbers)
    check(made != Augmentation(seed=made.seed), "an augmentation changes something", f"'{text}'", _WAY_OUT)
    return made


def _number(text: str, value: str) -> int:
    plain = value.isascii() and value.isdigit()
    check(plain and len(value) <= 10, "an augmentation's numbers are whole, from 0 on", f"'{text}'", _WAY_OUT)
    return int(value)


def _check_fits(augmentation: Augmentation, input_shape: Sequence[int]) -> None:
    asked, shape = augmentation.describe(), list(input_shape)
    if augmentation == Augmentation(mix="mixup", seed=augmentation.seed):
        return
    check(len(shape) == 3, "only mixup is for examples that are no images [H, W, C]", f"'{asked}' for shape {shape}",
           "take mixup or none")  # fmt: skip
    size = max(getattr(augmentation, name) for name in _SIZES)
    check(size < min(shape[:2]), "shifts and cutouts are smaller than the image", f"'{asked}' for shape {shape}",
           "take smaller numbers")  # fmt: skip


def view_of(
    augmentation: Augmentation,
    inputs: jax.Array,
    partners: jax.Array | None,
    index: jax.Array,
    view: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """The views of a batch: flip, then shift, then mix with the partners' views (flip and shift of their own), then cutout.

    Args:
      augmentation: what to do, static.
      inputs: [B, ...] uint8 or float32.
      partners: like `inputs`, the examples of rows `partner_of`; None where nothing is mixed.
      index: [B] int32, names the examples; not negative.
      view: int32, [B] or one for all; not negative.

    Returns:
      The views, of the inputs' shape and type, and which of them [B] bool hold anything of their partner: a label is
      true of the others alone.
    """
    words = _words(augmentation, index, view)
    mixed = jnp.zeros(inputs.shape[0], bool)
    out = _moved(augmentation, inputs, words[:, :_PARTNER])
    if augmentation.mix:
        if partners is None:
            raise ValueError(f"{augmentation.mix} needs partners; got None: fetch the rows that partner_of names")
        partners = _moved(augmentation, partners, words[:, _PARTNER:_CHOICE])
        out, mixed = (_mixup if augmentation.mix == "mixup" else _cutmix)(out, partners, words)
    if augmentation.cutout:
        side = jnp.full(words.shape[:1], augmentation.cutout)
        out = jnp.where(_square(out.shape, words[:, 3:5], side, side), jnp.zeros((), out.dtype), out)
    return out, mixed


def partner_of(augmentation: Augmentation, row: jax.Array, view: jax.Array | int, n: int) -> jax.Array:
    """The rows of the examples that a batch is mixed with: uniform among the others.

    Args:
      augmentation: of which only the seed counts.
      row: [B] int32, of the examples themselves, at least 0 and below n.
      view: int32, [B] or one for all.
      n: how many rows there are; 1 makes an example its own partner.

    Returns:
      Rows [B] int32.
    """
    word = _words(augmentation, row, view)[:, _CHOICE]
    away = 1 + _below(word, max(n - 1, 1)).astype(jnp.uint32)
    return ((jnp.asarray(row).astype(jnp.uint32) + away) % np.uint32(n)).astype(jnp.int32)


def _words(augmentation: Augmentation, index: jax.Array, view: jax.Array | int) -> jax.Array:
    """Random words [B, _WORDS] uint32: fold_in alone, as the bits that JAX draws from a key depend on its settings."""
    seed = jax.random.key(augmentation.seed, impl="threefry2x32")
    counters = jnp.arange(_WORDS // 2, dtype=jnp.uint32)

    def of_one(index: jax.Array, view: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(seed, index), view)
        return jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(key, i))(counters)).reshape(-1)

    index = jnp.asarray(index).astype(jnp.uint32)
    return jax.vmap(of_one)(index, jnp.broadcast_to(jnp.asarray(view).astype(jnp.uint32), index.shape))


def _below(word: jax.Array, n: int) -> jax.Array:
    """Whole numbers from 0 to n - 1, int32; uniform to n / 2^32."""
    return (word % np.uint32(n)).astype(jnp.int32)


def _moved(augmentation: Augmentation, x: jax.Array, words: jax.Array) -> jax.Array:
    """Flipped and shifted, by words 0 and 1, 2. Padding and slicing is by far the fastest way on CPU."""
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
    """a x + (1 - a) partner, a in 0/256, ..., 256/256 by word 5; bytes to the nearest, halves up."""
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
    """Float32 as a sum of two, of 12 significant bits each.

    Their products with a ratio are exact, so it does not matter whether a compiler fuses them with the sum (FMA) or not.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFFF000), jnp.float32)
    return high, x - high


def _cutmix(x: jax.Array, partner: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The partner within a box whose share of the area is m / 256, m = 0, ..., 256 by word 5, before it is clipped.

    The box has the image's proportions and a centre (words 6, 7) uniform over the pixels.
    """
    share = _below(words[:, 5], _LEVELS + 1)
    height, width = (_sides(size)[share] for size in x.shape[1:3])
    box = _square(x.shape, words[:, 6:8], height, width)
    return jnp.where(box, partner, x), box.any((1, 2, 3))


def _sides(size: int) -> jax.Array:
    """floor(size sqrt(m / 256)) for all m, exact: [257] int32."""
    return jnp.asarray([math.isqrt(size * size * m // _LEVELS) for m in range(_LEVELS + 1)], jnp.int32)


def _square(shape: Sequence[int], words: jax.Array, height: jax.Array, width: jax.Array) -> jax.Array:
    """Which pixels are in the box of these sizes [B] about a centre that the two words choose: [B, H, W, 1] bool."""
    inside = []
    for axis, side in enumerate((height, width)):
        size = shape[1 + axis]
        start = (_below(words[:, axis], size) - side // 2)[:, None]
        at = jnp.arange(size)
        inside.append((at >= start) & (at < start + side[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :])[..., None]
