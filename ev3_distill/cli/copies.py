"""`ev3-distill copies`: the clusters of identical and nearly identical examples, as a file of groups."""

from pathlib import Path

import numpy as np

from ev3_distill.config import parse_bytes
from ev3_distill.data import duplicate_groups
from ev3_distill.data.sources import load_data
from ev3_distill.errors import InputError, warn
from ev3_distill.runtime.files import atomic_write


def write_clusters(data: str, out: Path, *, memory: str = "") -> list[str]:
    """Writes the cluster of each example to an npz file, as the array `groups` [N] in the order of the data.

    Args:
      data: a data source, such as `npz:FILE`.
      out: the new file.
      memory: limit such as 1G for data in memory; data that do not fit stay on disk.

    Returns:
      Lines of text: what was found, and how the file is used.

    Raises:
      InputError: the source cannot be read, or the file exists, is not an .npz file or cannot be written.
    """
    if out.suffix != ".npz" or out.exists():
        raise InputError(
            f"copies writes a new .npz file; got {out}{', which exists' if out.exists() else ''}: choose another --out"
        )
    groups = duplicate_groups(load_data(data, memory=parse_bytes(memory) or None, warn=warn).inputs)
    try:
        with atomic_write(out) as file:
            np.savez(file, groups=groups)
    except OSError as error:
        raise InputError(
            f"copies needs a folder that it can write to; got {out} ({error}): choose another --out"
        ) from None
    sizes = np.bincount(groups)
    found = f"{sizes[sizes > 1].sum():,} of {len(groups):,} examples have a copy or near-copy; "
    return [
        f"{found}{(sizes > 1).sum():,} clusters have several examples, the largest {sizes.max():,}.",
        f"Groups: {out}. --groups {out} --split-by groups keeps each cluster in one split.",
    ]
