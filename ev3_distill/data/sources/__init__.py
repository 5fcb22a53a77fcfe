"""Sources of data, one file per kind.

A source is named by its kind and its place:

- `digits`: 1,797 handwritten digits [8, 8, 1], without a file.
- `npz:FILE`: arrays `inputs` and `labels` (or `image` and `label`), or both with `train_` and `test_` before them;
  `class_names` is optional, and so are the labels. 8-bit numbers stay so, all others become float32. Vectors are [N, F],
  images [N, H, W] or [N, H, W, C]; an array [N, L, C] of sequences has the name `sequences` in place of `inputs`.
- `folder:DIR` or `folder:FILE.zip`: images in `train/CLASS/` and `test/CLASS/` (or `val/CLASS/`), in `CLASS/`, or
  without classes: then they have no labels. All have one size, or the source ends in `,size=32` or `,size=32x48`
  (height x width: bilinear, the aspect is not kept). They are grey if none is coloured; `,channels=1` or `,channels=3`
  decides it. Alpha is dropped, and the orientation in a photo's EXIF data ignored, as common loaders do.
- `tfds:NAME[/CONFIG][:VERSION]`: a data set that TensorFlow Datasets has prepared; its splits `train` and `test`. Takes
  the same options.
"""

from collections.abc import Callable

from ev3_distill.data.sources import digits, folder, npz, tfds
from ev3_distill.data.sources.dataset import Dataset, Reading
from ev3_distill.data.sources.row_file import RowFile, in_chunks
from ev3_distill.errors import InputError

__all__ = ["KINDS", "Dataset", "Reading", "RowFile", "in_chunks", "load_data"]

KINDS: dict[str, Callable[[str, Reading], Dataset]] = {
    "digits": digits.load,
    "npz": npz.load,
    "folder": folder.load,
    "tfds": tfds.load,
}
_DEFAULT = Reading()


def load_data(
    source: str,
    *,
    memory: int | None = None,
    skip_corrupt: bool = False,
    warn: Callable[[str], None] = _DEFAULT.warn,
    tell: Callable[[int, int], None] = _DEFAULT.tell,
) -> Dataset:
    """Loads a data set.

    Args:
      source: its kind and place, see this package's docstring.
      memory: bytes up to which inputs are kept in memory, 1 GiB if none are named; larger ones are a `RowFile`.
      skip_corrupt: leave out images that cannot be read, and warn, instead of refusing the source.
      warn: hears what the user should know though it is no error.
      tell: hears of progress while images are decoded: (done, total).

    Raises:
      InputError: the source is unknown, missing, broken or not a classification data set.
    """
    kind, colon, place = source.partition(":")
    if kind not in KINDS or (kind == "digits") == bool(colon) or (colon and not place):
        raise InputError(
            f"a data source is digits, npz:FILE, folder:DIR, folder:FILE.zip or tfds:NAME; got {source!r}: name one of these"
        )
    limit = _DEFAULT.memory if memory is None else memory
    return KINDS[kind](place, Reading(limit, skip_corrupt, warn, tell))
