"""How a run divides its data: every reader of a run recomputes its splits by this function of its configuration."""

import numpy as np

from ev3_distill.config import RunConfig
from ev3_distill.data.sources import Dataset
from ev3_distill.data.splits import split_rows, split_rows_jointly

__all__ = ["splits_of"]


def splits_of(config: RunConfig, dataset: Dataset, strata: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The four splits of a run.

    Args:
      config: of the run; of a run directory, as it is stored there.
      dataset: of the run.
      strata: [N], see `split_rows`; the labels by default.

    Returns:
      Sorted rows by split.

    Raises:
      InputError: too few examples.
    """
    divide = split_rows_jointly if config.joint_strata else split_rows
    strata = dataset.labels if strata is None else strata
    return divide(strata, dataset.test_rows, seed=config.seed, fractions=config.splits)
