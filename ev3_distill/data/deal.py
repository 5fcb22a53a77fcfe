"""How a run divides its data: every reader of a run recomputes its splits by these functions of its configuration."""

import numpy as np

from ev3_distill.config import GROUPS, RunConfig
from ev3_distill.data.group_splits import split_groups
from ev3_distill.data.sources import Dataset
from ev3_distill.data.splits import split_rows, split_rows_jointly
from ev3_distill.errors import InputError
from ev3_distill.types import MOST_GROUPS

__all__ = ["splits_of", "units_of"]


def splits_of(config: RunConfig, dataset: Dataset, strata: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The four splits of a run.

    Args:
      config: of the run; of a run directory, as it is stored there.
      dataset: of the run.
      strata: [N], see `split_rows`; the labels by default.

    Returns:
      Sorted rows by split.

    Raises:
      InputError: too few examples or groups, or no groups, or too many groups for a report on each.
    """
    strata = dataset.labels if strata is None else strata
    if config.split_by == GROUPS:
        groups = units_of(config, dataset)
        if groups is None:
            raise InputError(
                f"--split-by groups needs the group of each example; {dataset.source} has none: add an array `groups` to the "
                "npz file, or name a file with --groups"
            )
        return split_groups(
            groups, strata, dataset.test_rows, seed=config.seed, fractions=config.splits, names=dataset.group_names
        )
    if len(dataset.group_names) > MOST_GROUPS:
        raise InputError(
            f"subgroups to report on are at most {MOST_GROUPS}; {dataset.source} has {len(dataset.group_names)} groups: if "
            "examples of one group resemble each other (patients, videos), give --split-by groups; else merge or remove groups"
        )
    divide = split_rows_jointly if config.joint_strata else split_rows
    return divide(strata, dataset.test_rows, seed=config.seed, fractions=config.splits)


def units_of(config: RunConfig, dataset: Dataset) -> np.ndarray | None:
    """The independent unit of each example [N], where it is a group of examples; None where each example is one."""
    return dataset.groups if config.split_by == GROUPS else None
