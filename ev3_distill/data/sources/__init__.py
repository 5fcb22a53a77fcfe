"""Data sources, one module per kind. A source is named KIND:PLACE.

- `digits`: 1,797 handwritten digits [8, 8, 1], built in.
- `npz:FILE`: named arrays, as numpy.savez or numpy.savez_compressed write them. Nothing is unpickled.

  - `inputs` and `labels`, or `image` and `label`: numbers [N, F] (vectors), [N, H, W] or [N, H, W, C] (images), and
    integers [N] from 0, or text [N]. uint8 stays uint8 (pixels, used as x / 255), all other numbers become float32.
    `npz:FILE,layout=nchw` reads images [N, C, H, W]. From a column of vectors that float32 cannot resolve, a constant is
    subtracted in float64 first.
  - `sequences` and `labels`: numbers [N, L, C], whose last two axes are kept as they are.
  - Each with the prefixes `train_` and `test_` (`train_inputs`, `test_inputs`, ...): the source has its own test examples.
  - Labels are optional: all label arrays are missing, or -1 (in labels of text the empty text) stands for each label that
    an example does not have.
  - `class_names`, optional: text [K], the name of each class in the order of the labels. Text labels are class names
    themselves, sorted.
  - `groups`, optional (or `train_groups` and `test_groups`): integers or text [N], the subgroup of each example, for
    guards on worst_group_accuracy.
  - Other arrays are ignored.
  - `npz:FILE,labels=ids`: labels may be any integers; the classes are those that occur, in order, named by their integer.

- `folder:DIR` or `folder:FILE.zip`: images in `train/CLASS/` and `test/CLASS/` (or `val/CLASS/`), in `CLASS/`, or
  without class folders, which means without labels. All images must have one size, or the source ends in `,size=32` or
  `,size=32x48` (height x width; bilinear, the aspect ratio is not kept). They are gray if no image has color;
  `,channels=1` or `,channels=3` overrides that. Transparent pixels are composited on white; `,background=black`, another
  color or `ignore` overrides that. The values of 16-bit files are divided by 257, or by what `,bits=12` names. Photos are
  turned upright by their EXIF data unless `,orientation=ignore`. Images in the folder that `,unlabeled=NAME` names, at the
  top or in `train/`, have no label.
- `tfds:NAME[/CONFIG][:VERSION]`: a data set that TensorFlow Datasets has prepared; its splits `train` and `test` (or
  `validation`). Takes the options of `folder` except `unlabeled`.
"""

from collections.abc import Callable, Sequence

from ev3_distill.data.class_names import normalize
from ev3_distill.data.sources import digits, folder, npz, tfds
from ev3_distill.data.sources.dataset import Dataset, ReadOptions
from ev3_distill.data.sources.input_checks import check_inputs
from ev3_distill.data.sources.resolution import describe_offset
from ev3_distill.data.sources.row_file import RowFile, in_chunks
from ev3_distill.errors import InputError

__all__ = ["KINDS", "Dataset", "ReadOptions", "RowFile", "describe_offset", "in_chunks", "load_data"]

KINDS: dict[str, Callable[[str, ReadOptions], Dataset]] = {
    "digits": digits.load,
    "npz": npz.load,
    "folder": folder.load,
    "tfds": tfds.load,
}
_DEFAULTS = ReadOptions()


def load_data(
    source: str,
    *,
    memory: int | None = None,
    skip_corrupt: bool = False,
    stored_pixels: bool = False,
    offset: Sequence[float] | None = None,
    warn: Callable[[str], None] = _DEFAULTS.warn,
    progress: Callable[[int, int], None] = _DEFAULTS.progress,
) -> Dataset:
    """Loads a data set.

    Args:
      source: KIND:PLACE; the docstring of this package describes all kinds.
      memory: maximum bytes of inputs to hold in memory, 1 GiB by default; larger inputs become a `RowFile`.
      skip_corrupt: skip images that cannot be read, with a warning, instead of refusing the source.
      stored_pixels: ignore transparency and EXIF orientation where the source does not decide, as older versions did.
      offset: what to subtract in float64 from the columns of vectors [N, F], such as the `offset` of the data of a run; empty:
        nothing; by default what the columns need, see `Dataset.offset`.
      warn: called with each warning.
      progress: called while images are decoded, with the numbers of examples done and in total.

    Raises:
      InputError: the source is unknown, missing, damaged or not a classification data set.
    """
    kind, colon, place = source.partition(":")
    if kind not in KINDS or (kind == "digits") == bool(colon) or (colon and not place):
        raise InputError(
            f"a data source is digits, npz:FILE, folder:DIR, folder:FILE.zip or tfds:NAME; got {source!r}: name one of these"
        )
    limit = _DEFAULTS.memory if memory is None else memory
    dataset = KINDS[kind](place, ReadOptions(limit, skip_corrupt, stored_pixels, offset, warn, progress))
    check_inputs(dataset.inputs, source, warn)
    return normalize(dataset)
