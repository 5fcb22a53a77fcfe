"""The four splits where whole groups of examples (patients, videos, authors) must stay together.

Groups are the independent units, so test and decide are simple random samples of *groups*, of a number that does not depend on
their sizes. (Dealing until a number of examples is reached would favor splits that end with a large group.)
"""

from collections.abc import Sequence

import numpy as np

from ev3_distill.config import Fractions
from ev3_distill.data.splits import DEFAULT_FRACTIONS, SPLITS, plan_sizes, split_generator
from ev3_distill.errors import InputError

__all__ = ["split_groups"]

_SHOWN = 3  # groups that an error names


def split_groups(
    groups: np.ndarray,
    strata: np.ndarray,
    test_rows: np.ndarray | None,
    *,
    seed: int,
    fractions: Fractions = DEFAULT_FRACTIONS,
    names: Sequence[str] = (),
    things: str = "groups",
) -> dict[str, np.ndarray]:
    """Divides rows into the four splits, each group into one of them.

    Args:
      groups: [N] integers, the group of each example.
      strata: [N], such as class labels; explore and assess share them as evenly as whole groups permit.
      test_rows: the rows of the test split; None to divide it off like the others.
      seed: of the division.
      fractions: of the *groups*; decide and assess hold about `fractions.most` examples at most.
      names: of the groups, for errors.
      things: what the groups are, for errors.

    Returns:
      Sorted rows by split: disjoint, and complete.

    Raises:
      InputError: too few groups, or test rows of the source that share groups with others.
    """
    rng = split_generator(seed)
    values, number, counts = np.unique(groups, return_inverse=True, return_counts=True)
    own = None if test_rows is None else _own_test(number, values, test_rows, names)
    plan = plan_sizes(len(values), own, fractions, rng, things=things, unlimited=True)
    dealt = rng.permutation(plan.rest)
    test, decide, others = np.split(dealt, np.cumsum([plan.sizes.get("test", 0), plan.sizes["decide"]]))
    limit = max(1, int(fractions.most / counts[others].mean()))  # of sizes that tell nothing about the groups of decide
    others = np.concatenate([others, decide[limit:]])
    share = plan.sizes["assess"] / (plan.sizes["assess"] + plan.sizes["explore"])
    target = min(share * counts[others].sum(), fractions.most)
    in_assess = _balanced(number, strata, others, target)
    split_of = {
        "explore": others[~in_assess],
        "assess": others[in_assess],
        "decide": decide[:limit],
        "test": test if own is None else own,
    }
    return {name: np.flatnonzero(np.isin(number, split_of[name])) for name in SPLITS}


def _own_test(number: np.ndarray, values: np.ndarray, test_rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The groups of the source's own test rows."""
    is_test = np.zeros(len(number), bool)
    is_test[test_rows] = True
    shared = np.intersect1d(number[is_test], number[~is_test])
    if len(shared):
        shown = ", ".join(str(names[values[i]] if names else values[i]) for i in shared[:_SHOWN])
        raise InputError(
            f"--split-by groups needs test rows whose groups are not in the training rows; {len(shared)} groups are in both "
            f"({shown}{', ...' if len(shared) > _SHOWN else ''}): save all rows without the prefixes train_ and test_, or "
            "remove these groups from one part"
        )
    return np.unique(number[is_test])


def _balanced(number: np.ndarray, strata: np.ndarray, groups: np.ndarray, target: float) -> np.ndarray:
    """Which of the groups, in random order, go to assess: [G] bool, about `target` examples with the mix of strata of all.

    Each group goes to the split that lacks most of its strata.
    """
    stratum = np.unique(strata, return_inverse=True)[1]
    place = np.full(number.max() + 1, -1)
    place[groups] = np.arange(len(groups))
    rows = np.flatnonzero(place[number] >= 0)
    width = int(stratum.max()) + 1
    cells, counts = np.unique(place[number[rows]] * width + stratum[rows], return_counts=True)
    lacking = np.bincount(cells % width, weights=counts, minlength=width) / len(rows)
    lacking = np.stack([(len(rows) - target) * lacking, target * lacking])
    in_assess = np.zeros(len(groups), bool)
    for i, part in enumerate(
        np.split(np.arange(len(cells)), np.searchsorted(cells // width, np.arange(1, len(groups))))
    ):
        own, many = cells[part] % width, counts[part]
        explore, assess = lacking[:, own] @ many
        in_assess[i] = assess > explore
        lacking[int(in_assess[i]), own] -= many
    if in_assess.all() or not in_assess.any():
        in_assess[-1] = not in_assess[-1]
    return in_assess
