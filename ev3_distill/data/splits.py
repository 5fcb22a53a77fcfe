"""The four splits explore, assess, decide and test: a pure function of strata, fractions and seed."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ev3_distill.config import Fractions
from ev3_distill.data.row_digests import are_among, distinct
from ev3_distill.data.sources import RowFile, in_chunks
from ev3_distill.errors import InputError

SPLITS = ("explore", "assess", "decide", "test")

_MINIMUM = {"explore": 2, "assess": 1, "decide": 1, "test": 1}  # examples
_HASH_CHUNK = 256  # examples hashed at a time
_SPLIT_STREAM = 0  # random stream of the seed, see `generator`
DEFAULT_FRACTIONS = Fractions()


def split_rows(
    strata: np.ndarray,
    test_rows: np.ndarray | None,
    *,
    seed: int,
    fractions: Fractions = DEFAULT_FRACTIONS,
    things: str = "examples",
) -> dict[str, np.ndarray]:
    """Divides rows into the four splits: test and decide by simple random sampling, the rest stratum by stratum.

    What is proven on test and decide needs examples that are independent of those that trained the student. Strata that these
    splits shared with explore would tie their class counts to those of explore, which a student knows.

    Args:
      strata: [N], such as class labels; equal values are one stratum. The task says what they are.
      test_rows: the rows of the test split; None to divide it off like the others.
      seed: of the division.
      fractions: of the splits, renormalized over those that are divided off. Examples of assess and decide beyond
        `fractions.most` go to explore.
      things: what the rows are, for errors.

    Returns:
      Sorted rows by split: disjoint, and complete. Sizes are within 1 of proportional; those of explore and assess are so in
      every stratum of what test and decide leave.

    Raises:
      InputError: too few examples, or a negative seed.
    """
    rng = split_generator(seed)
    plan = plan_sizes(len(strata), test_rows, fractions, rng, things=things)
    dealt, start, split_of = rng.permutation(plan.rest), 0, {}
    for name in plan.names[:1:-1]:
        split_of[name] = np.sort(dealt[start : start + plan.sizes[name]])
        start += plan.sizes[name]
    others = np.sort(dealt[start:])
    sizes = np.array([plan.sizes["explore"], plan.sizes["assess"]])
    split_index = _stratified(strata[others], sizes / sizes.sum(), sizes, rng)
    split_of |= {name: others[split_index == i] for i, name in enumerate(("explore", "assess"))}
    return {name: split_of.get(name, plan.test) for name in SPLITS}


def split_rows_jointly(
    strata: np.ndarray, test_rows: np.ndarray | None, *, seed: int, fractions: Fractions = DEFAULT_FRACTIONS
) -> dict[str, np.ndarray]:
    """As `split_rows`, but all four splits are stratified jointly, so that each has the same mix of strata.

    The method of runs before `RunConfig.joint_strata`. What is proven on its test and decide splits may be too much.
    """
    rng = split_generator(seed)
    plan = plan_sizes(len(strata), test_rows, fractions, rng)
    sizes = np.array([plan.sizes[name] for name in plan.names])
    split_index = _stratified(strata[plan.rest], plan.shares, sizes, rng)
    split_of = {name: plan.rest[split_index == i] for i, name in enumerate(plan.names)}
    return split_of if test_rows is None else split_of | {"test": plan.test}


class SplitPlan(NamedTuple):
    """The sizes of the splits that are divided off."""

    names: tuple[str, ...]  # of these splits
    shares: np.ndarray  # [S] of `rest`
    sizes: dict[str, int]  # by name
    rest: np.ndarray  # rows that are divided
    test: np.ndarray  # rows of a test split of its own


def plan_sizes(
    count: int,
    test_rows: np.ndarray | None,
    fractions: Fractions,
    rng: np.random.Generator,
    *,
    things: str = "examples",
    unlimited: bool = False,
) -> SplitPlan:
    """The sizes of the splits.

    Args:
      count: rows in all; or groups, wherever whole groups are dealt.
      test_rows: of a test split of its own.
      fractions: of the splits.
      rng: breaks ties.
      things: what is counted, for errors.
      unlimited: whether `fractions.most` does not apply.

    Raises:
      InputError: too few.
    """
    is_test = np.zeros(count, bool)
    if test_rows is not None:
        is_test[test_rows] = True
    names = SPLITS if test_rows is None else SPLITS[:3]
    shares = np.array([getattr(fractions, name) for name in names])
    shares /= shares.sum()
    rest = np.flatnonzero(~is_test)
    held_out = np.minimum(shares[1:3], math.inf if unlimited else fractions.most / max(len(rest), 1))
    shares[0] += (shares[1:3] - held_out).sum()
    shares[1:3] = held_out
    sizes = dict(zip(names, _largest_remainders(len(rest), shares, rng).tolist(), strict=True))
    _check_sizes(sizes | ({} if test_rows is None else {"test": int(is_test.sum())}), shares, things)
    return SplitPlan(names, shares, sizes, rest, np.flatnonzero(is_test))


def _stratified(strata: np.ndarray, shares: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The index of the split of each row [N], with these sizes [S]; counts of every stratum are within 1 of proportional."""
    _, stratum, counts = np.unique(strata, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(stratum, kind="stable"), np.cumsum(counts)[:-1])
    split_index = np.empty(len(strata), np.int32)
    for rows, numbers in zip(members, _allocate(counts, shares, sizes, rng), strict=True):
        split_index[rng.permutation(rows)] = np.repeat(np.arange(len(sizes)), numbers)
    return split_index


def count_shared(inputs: np.ndarray | RowFile, rows: Mapping[str, np.ndarray]) -> dict[tuple[str, str], int]:
    """Counts held-out examples whose inputs equal those of an example in another split, by a hash of their content.

    Args:
      inputs: [N, ...].
      rows: by split, as of `split_rows`.

    Returns:
      {(split, other split): number of examples of the first}, for each held-out split and each split before it in SPLITS;
      pairs without shared examples are omitted.
    """
    hashes, counts = digests(inputs), {}
    for i, earlier in enumerate(SPLITS):
        known = distinct(hashes[rows[earlier]], overwrite=True)
        for later in SPLITS[i + 1 :]:
            counts[later, earlier] = int(are_among(hashes[rows[later]], known).sum())
    pairs = [(later, earlier) for i, later in enumerate(SPLITS) for earlier in SPLITS[:i]]
    return {names: counts[names] for names in pairs if counts[names]}


def digests(inputs: np.ndarray | RowFile) -> np.ndarray:
    """A 64-bit hash [N] of the bytes of each example: a sum of products with random odd numbers, modulo 2^64."""
    hashes, row = np.empty(len(inputs), np.uint64), 0
    factors: np.ndarray | None = None
    for chunk in in_chunks(inputs):
        flat = np.ascontiguousarray(chunk).reshape(len(chunk), -1).view(np.uint8)
        if factors is None:
            factors = np.random.default_rng(0).integers(0, 2**63, flat.shape[1], np.uint64) * 2 + 1
        for start in range(0, len(flat), _HASH_CHUNK):
            part = flat[start : start + _HASH_CHUNK].astype(np.uint64) + 1
            hashes[row + start : row + start + len(part)] = (part * factors).sum(axis=1, dtype=np.uint64)
        row += len(flat)
    return hashes


def split_generator(seed: int) -> np.random.Generator:
    """The random stream that deals splits."""
    return generator(seed, _SPLIT_STREAM)


def generator(seed: int, stream: int) -> np.random.Generator:
    """One of the independent random streams of a seed.

    Raises:
      InputError: the seed is negative.
    """
    if seed < 0:
        raise InputError(f"a seed must not be negative; got {seed}: try 0")
    return np.random.default_rng([seed, stream])


def _check_sizes(sizes: dict[str, int], shares: np.ndarray, things: str) -> None:
    short = [name for name in sizes if sizes[name] < _MINIMUM[name]]
    if not short:
        return
    own_test = len(shares) < len(SPLITS)
    n = sum(sizes.values()) - (sizes["test"] if own_test else 0)
    need = max(math.ceil(_MINIMUM[name] / share - 1e-9) for name, share in zip(SPLITS, shares, strict=False))
    beside = f" beside {sizes['test']} for test" if own_test else ""
    raise InputError(
        f"explore needs at least 2 {things} and every other split 1; got {n} {things}{beside}, too few for "
        f"{' and '.join(short)}: give at least {need}{' and 1 for test' if own_test else ''}, or other fractions"
    )


def _floors(exact: np.ndarray) -> np.ndarray:
    return np.floor(exact + 1e-9).astype(int)  # 0.29 * 100 is 29


def _largest_remainders(n: int, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rounds n * shares to integers with sum n; ties are broken at random."""
    exact = n * shares
    sizes = _floors(exact)
    by_remainder = np.lexsort((rng.random(len(shares)), -(exact - sizes).round(9)))
    sizes[by_remainder[: n - sizes.sum()]] += 1
    return sizes


def _allocate(counts: np.ndarray, shares: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Controlled rounding of counts x shares [C, S]: rows sum to `counts`, columns to `sizes`, entries move by at most 1.

    Each stratum gives every split the floor of its proportional count, and its leftovers, one each, to the splits that lack
    most: Gale and Ryser's construction of a 0-1 matrix with given margins, where rows may come in any order. Such a matrix
    exists: the fractional parts form a fractional one, and largest remainders of up to four columns keep its margins
    feasible.
    """
    allocation = _floors(np.outer(counts, shares))
    lacking = sizes - allocation.sum(axis=0)
    for row in rng.permutation(len(counts)):
        leftover = counts[row] - allocation[row].sum()
        neediest = np.lexsort((rng.random(len(shares)), -lacking))[:leftover]
        allocation[row, neediest] += 1
        lacking[neediest] -= 1
    return allocation
