"""Data: sources -> four splits -> rows of each step's batch, every assignment a pure function of a seed.

Images are [N, H, W, C], vectors [N, F]; 8-bit integers become [0, 1].
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill import npz
from ev3_distill.config import Fractions
from ev3_distill.errors import InputError
from ev3_distill.types import Batch, Pools

SPLITS = ("explore", "assess", "decide", "test")

_LEAST = {"explore": 2, "assess": 1, "decide": 1, "test": 1}  # examples
_SPLIT_STREAM, _ORDER_STREAM = range(2)  # independent random streams of one seed
_ARRAYS = (("inputs", "labels"), ("image", "label"))  # of an npz source, alone or as train_* and test_*


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples on the host."""

    inputs: np.ndarray  # [N, ...] float32
    labels: np.ndarray  # [N] int32, -1 where there is none
    num_classes: int
    class_names: tuple[str, ...]
    test_rows: np.ndarray | None  # rows that the source has set apart as test
    source: str
    fingerprint: str  # sha256 of the arrays, in hexadecimal


DEFAULT_FRACTIONS = Fractions()


def load_data(source: str) -> Dataset:
    """Loads a data set.

    Args:
      source: `digits`, the 8x8 digits that scikit-learn carries, or `npz:FILE` with arrays `inputs` and `labels` (or
        `image` and `label`), or these four with `train_` and `test_` before them; `class_names` is optional.

    Raises:
      InputError: the source is unknown, missing, broken or not a classification data set.
    """
    kind, _, file = source.partition(":")
    if source == "digits":
        return _digits()
    if kind == "npz" and file:
        return _npz(source, Path(file).expanduser())
    raise InputError(f"a data source is digits or npz:FILE; got {source!r}: name one of these")


def _digits() -> Dataset:
    """The 1,797 digits [8, 8, 1] of the test part of UCI's handwritten digits, scaled to [0, 1]."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return _dataset(
        (raw.images[..., None] / 16).astype(np.float32),
        raw.target.astype(np.int32),
        tuple(str(name) for name in raw.target_names),
        None,
        "digits",
    )


def _npz(source: str, path: Path) -> Dataset:
    arrays = npz.read(
        path,
        _forms(),
        optional="class_names",
        option="npz:FILE",
        wanted="inputs and labels (or image and label), or both with train_ and test_ before them",
    )
    parts = [part for part in ("", "train_", "test_") if any(part + x in arrays for x, _ in _ARRAYS)]
    examples = [_examples(arrays, part, path) for part in parts]
    shapes = {part: inputs.shape[1:] for part, (inputs, _) in zip(parts, examples, strict=True)}
    if len(set(shapes.values())) > 1:
        raise InputError(f"{path}: train and test examples must have one shape; got {shapes}: make them the same")
    labels = np.concatenate([labels for _, labels in examples])
    names = _class_names(labels, arrays.get("class_names"), path)
    test_rows = np.arange(len(examples[0][1]), len(labels)) if len(parts) > 1 else None
    inputs = np.concatenate([inputs for inputs, _ in examples])
    return _dataset(inputs, labels.astype(np.int32), names, test_rows, source)


def _forms() -> list[list[str]]:
    """The sets of arrays that make a data set: a pair alone, or as train_* and test_*."""
    return [list(pair) for pair in _ARRAYS] + [
        [part + name for part in ("train_", "test_") for name in pair] for pair in _ARRAYS
    ]


def _examples(arrays: dict[str, np.ndarray], part: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [N, ...] float32 and labels [N] of any integer dtype, checked; messages name the file's own arrays."""
    x, y = next((part + x, part + y) for x, y in _ARRAYS if part + x in arrays)
    inputs, labels = arrays[x], arrays[y]
    if inputs.dtype.kind not in "buif" or inputs.ndim not in (2, 3, 4):
        raise InputError(
            f"{path}: {x} must be numbers [N, F], [N, H, W] or [N, H, W, C]; got {inputs.dtype} "
            f"{list(inputs.shape)}: convert or reshape it"
        )
    if inputs.size == 0:
        raise InputError(f"{path}: {x} must hold at least one example; got shape {list(inputs.shape)}: add examples")
    if labels.shape != inputs.shape[:1]:
        raise InputError(
            f"{path}: {x} and {y} must have the same length and {y} one number per example; got {list(inputs.shape)} "
            f"and {list(labels.shape)}: pair them up"
        )
    if labels.dtype.kind not in "ui":
        raise InputError(f"{path}: {y} must be integers; got {labels.dtype}: convert with labels.astype('int32')")
    scale = np.float32(255 if inputs.dtype == np.uint8 else 1)
    with np.errstate(over="ignore"):  # of float64, found below
        inputs = inputs.astype(np.float32) / scale
    if (bad := _first_bad_row(inputs)) is not None:
        raise InputError(f"{path}: {x} must be finite; got nan or infinity in row {bad}: repair or remove that example")
    return inputs[..., None] if inputs.ndim == 3 else inputs, labels


def _first_bad_row(array: np.ndarray) -> int | None:
    """The first row of [N, ...] with a number that is not finite."""
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    return None if finite.all() else int(finite.argmin())


def _class_names(labels: np.ndarray, names: np.ndarray | None, path: Path) -> tuple[str, ...]:
    """The K names of the classes, given or counted; K is at least 2 and every label is one of 0 .. K-1."""
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise InputError(
            f"{path}: class_names must be text [K]; got {names.dtype} {list(names.shape)}: save a list of strings"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        row = int((labels < 0).argmax())
        raise InputError(f"{path}: labels must not be negative; got {labels[row]} in row {row}: number classes from 0")
    if names is not None and high >= len(names):
        raise InputError(
            f"{path}: labels must be below the number of class_names, {len(names)}; got {high} "
            f"in row {int(labels.argmax())}: add names or mend labels"
        )
    if low == high:
        raise InputError(f"{path}: at least 2 classes must occur; got label {low} alone: add examples of another class")
    if names is None and high >= len(labels):
        raise InputError(
            f"{path}: more classes than examples need class_names; got label {high} among {len(labels)} examples: "
            "number classes from 0 without gaps or add class_names"
        )
    return tuple(str(name) for name in (range(high + 1) if names is None else names))


def _dataset(
    inputs: np.ndarray, labels: np.ndarray, names: tuple[str, ...], test_rows: np.ndarray | None, source: str
) -> Dataset:
    digest = hashlib.sha256()
    for array in (inputs, labels, test_rows):
        if array is not None:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return Dataset(inputs, labels, len(names), names, test_rows, source, digest.hexdigest())


def split(
    dataset: Dataset, teacher_logits: np.ndarray, *, seed: int, fractions: Fractions = DEFAULT_FRACTIONS
) -> tuple[Pools, Batch]:
    """Divides a data set into the four splits, on the default device.

    Args:
      dataset: N examples of K classes.
      teacher_logits: [N, K], in the data set's order.
      seed: of the division.
      fractions: of the splits; without `test` where the source has test examples.

    Returns:
      The three splits that a run may see, and the sealed test split.
    """
    shape = (len(dataset.labels), dataset.num_classes)
    if teacher_logits.shape != shape:
        raise InputError(
            f"teacher logits must be [examples, classes], {list(shape)}; got {list(teacher_logits.shape)}: "
            "run the teacher on this very data set"
        )
    if (bad := _first_bad_row(teacher_logits)) is not None:
        raise InputError(
            f"teacher logits must be finite; got nan or infinity in row {bad}: check the teacher and its input scale"
        )
    chosen = split_rows(dataset.labels, dataset.test_rows, seed=seed, fractions=fractions)
    explore, assess, decide, test = (_batch(dataset, teacher_logits, chosen[name]) for name in SPLITS)
    return Pools(explore, assess, decide, order(len(chosen["explore"]), seed)), test


def _batch(dataset: Dataset, teacher_logits: np.ndarray, rows: np.ndarray) -> Batch:
    return Batch(
        inputs=jnp.asarray(dataset.inputs[rows], jnp.float32),
        labels=jnp.asarray(dataset.labels[rows], jnp.int32),
        teacher_logits=jnp.asarray(teacher_logits[rows], jnp.float32),
        index=jnp.asarray(rows, jnp.int32),
        weight=jnp.ones(len(rows), jnp.float32),
    )


def split_rows(
    labels: np.ndarray, test_rows: np.ndarray | None, *, seed: int, fractions: Fractions = DEFAULT_FRACTIONS
) -> dict[str, np.ndarray]:
    """Divides rows into the four splits, class by class; a function of these arguments alone.

    Args:
      labels: [N]; equal labels are one stratum, the unlabelled (-1) too.
      test_rows: the rows of the test split, or none: then it is divided off like the others.
      seed: of the division.
      fractions: of the splits, those of the divided ones renormalised.

    Returns:
      Sorted rows by split: disjoint, together all. Sizes, and the counts of every class, are within 1 of proportional.
    """
    rng = _generator(seed, _SPLIT_STREAM)
    is_test = np.zeros(len(labels), bool)
    if test_rows is not None:
        is_test[test_rows] = True
    names = SPLITS if test_rows is None else SPLITS[:3]
    shares = np.array([getattr(fractions, name) for name in names])
    shares /= shares.sum()
    rest = np.flatnonzero(~is_test)
    sizes = _largest_remainders(len(rest), shares, rng)
    _check_sizes(dict(zip(names, sizes, strict=True)) | ({} if test_rows is None else {"test": is_test.sum()}), shares)

    _, stratum, counts = np.unique(labels[rest], return_inverse=True, return_counts=True)
    members = np.split(np.argsort(stratum, kind="stable"), np.cumsum(counts)[:-1])
    dealt = _deal(counts, shares, sizes, rng)
    owner = np.empty(len(rest), np.int32)
    for rows, hand in zip(members, dealt, strict=True):
        owner[rng.permutation(rows)] = np.repeat(np.arange(len(names)), hand)
    split_of = {name: rest[owner == i] for i, name in enumerate(names)}
    return split_of if test_rows is None else split_of | {"test": np.flatnonzero(is_test)}


def _generator(seed: int, stream: int) -> np.random.Generator:
    if seed < 0:
        raise InputError(f"a seed must not be negative; got {seed}: try 0")
    return np.random.default_rng([seed, stream])


def _check_sizes(sizes: dict[str, int], shares: np.ndarray) -> None:
    short = [name for name in sizes if sizes[name] < _LEAST[name]]
    if not short:
        return
    own_test = len(shares) < len(SPLITS)
    n = sum(sizes.values()) - (sizes["test"] if own_test else 0)
    need = max(math.ceil(_LEAST[name] / share - 1e-9) for name, share in zip(SPLITS, shares, strict=False))
    beside = f" beside {sizes['test']} for test" if own_test else ""
    raise InputError(
        f"explore needs at least 2 examples and every other split 1; got {n} examples{beside}, too few for "
        f"{' and '.join(short)}: give at least {need}{' and 1 for test' if own_test else ''}, or other fractions"
    )


def _floors(exact: np.ndarray) -> np.ndarray:
    return np.floor(exact + 1e-9).astype(int)  # 0.29 * 100 is 29


def _largest_remainders(n: int, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rounds n * shares to integers of sum n, ties broken at random."""
    exact = n * shares
    sizes = _floors(exact)
    by_remainder = np.lexsort((rng.random(len(shares)), -(exact - sizes).round(9)))
    sizes[by_remainder[: n - sizes.sum()]] += 1
    return sizes


def _deal(counts: np.ndarray, shares: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A controlled rounding of counts x shares [C, S]: rows sum to `counts`, columns to `sizes`, entries move by <= 1.

    Each class gives every split the floor of its due, and its leftovers, one each, to the neediest splits: Gale and
    Ryser's construction of a 0-1 matrix with given margins, where rows may come in any order. Such a matrix exists: the
    dues' fractional parts are a fractional one, and largest remainders of up to four columns keep its margins feasible.
    """
    dealt = _floors(np.outer(counts, shares))
    lacking = sizes - dealt.sum(axis=0)
    for row in rng.permutation(len(counts)):
        leftover = counts[row] - dealt[row].sum()
        neediest = np.lexsort((rng.random(len(shares)), -lacking))[:leftover]
        dealt[row, neediest] += 1
        lacking[neediest] -= 1
    return dealt


class Order(NamedTuple):
    """In which the rows of a split are visited: data, so that one compiled program serves every seed."""

    base: jax.Array  # [n] int32, a random permutation
    multipliers: jax.Array  # [M] uint32, coprime to n
    salt: jax.Array  # uint32


def order(n: int, seed: int) -> Order:
    """Random reshuffling as a function of the step alone: no iterator, so a resume needs only the step. See `rows`.

    Args:
      n: rows, from 1 to 2**31 - 1.
      seed: of the order.
    """
    if not 1 <= n < 2**31:
        raise InputError(f"an order needs 1 to 2^31 - 1 rows; got {n}: give the explore split more or less")
    rng = _generator(seed, _ORDER_STREAM)
    return Order(
        base=jnp.asarray(rng.permutation(n), jnp.int32),
        multipliers=jnp.asarray(_multipliers(n, rng), jnp.uint32),
        salt=jnp.asarray(rng.integers(2**32, dtype=np.uint32)),
    )


def rows(order: Order, step: jax.Array, *, batch_size: int) -> jax.Array:
    """The rows of a step's batch, [batch_size] int32; may be called under jit.

    Epoch e visits base[(a_e * j + b_e) mod n] at j = 0, 1, ..., where base is one random permutation, a_e one of up to
    64 multipliers coprime to n and b_e a hash of e. Each row comes at most once in an epoch of n // batch_size batches,
    every epoch groups and leaves out others, and a batch costs a few integer operations and one gather.

    Args:
      order: of n rows.
      step: global step, int32, not negative.
      batch_size: where it exceeds n, batches go round the rows again.
    """
    n = order.base.shape[0]
    epoch, batch = jnp.divmod(jnp.asarray(step).astype(jnp.uint32), np.uint32(max(n // batch_size, 1)))
    j = (batch * np.uint32(batch_size) + jnp.arange(batch_size, dtype=jnp.uint32)) % np.uint32(n)
    a = order.multipliers[epoch % np.uint32(order.multipliers.shape[0])]  # a cycle: neighbouring epochs never share one
    b = _hash(epoch ^ order.salt) % np.uint32(n)
    return order.base[(a * j + b) % np.uint32(n)]


def _multipliers(n: int, rng: np.random.Generator) -> np.ndarray:
    """Up to 64 numbers a coprime to n, with a * (n - 1) + (n - 1) < 2**32.

    None is above n / 2, because n - a walks the same cycle backwards and groups the same neighbours.
    """
    candidates = np.arange(1, max(min(n // 2 + 1, 2**32 // n), 2))
    return rng.permutation(candidates[np.gcd(candidates, n) == 1])[:64]


def _hash(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, a bijection of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
