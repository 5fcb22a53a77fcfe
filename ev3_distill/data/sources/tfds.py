"""`tfds:NAME[/CONFIG][:VERSION]`: what TensorFlow Datasets has prepared, read without TensorFlow.

The data set is found by its files, as `tfds.data_source` does last of all, so that the code that made it is not needed.
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.data.sources.dataset import Dataset, Reading
from ev3_distill.data.sources.image_decode import Unreadable, pixels
from ev3_distill.data.sources.image_options import Form, parsed
from ev3_distill.data.sources.parallel_decode import Gallery, decoded
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import sha256_of

_FORMAT = 1  # of what a fingerprint is taken of


class _Prepared(NamedTuple):
    """A data set on disk, and what is read of it."""

    builder: Any
    splits: list[str]  # train and, where there is one, test
    x: str  # name of the inputs
    y: str  # of the labels, empty where there are none
    form: Form  # of the images

    @property
    def info(self) -> Any:
        """What TensorFlow Datasets knows of it."""
        return self.builder.info


def load(place: str, reading: Reading) -> Dataset:
    """The splits `train` and `test` (or `validation`) of a prepared data set, decoded once and kept in the cache.

    Raises:
      InputError: TensorFlow Datasets is not installed, the data set not prepared, or it is none for classification.
    """
    name, form = parsed(place, lambda _: False)
    with _explained(name):
        builder = _builder(name)
        prepared = _Prepared(builder, _splits(builder.info, name), *_features(builder.info, name), form)
        if not prepared.y:
            reading.warn(f"tfds:{name} has no class labels: it is taken as unlabelled")
        made = decoded(_gallery(prepared, name), _content(prepared), reading)
    labels = np.array(made.notes["labels"], np.int32)[made.kept]
    is_test = np.arange(len(made.kept)) >= prepared.info.splits["train"].num_examples
    test_rows = np.flatnonzero(is_test[made.kept]) if len(prepared.splits) > 1 else None
    names = _classes(prepared, labels, name)
    return Dataset(made.rows, labels, len(names), names, test_rows, f"tfds:{place}", made.fingerprint)


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Says which package and which command is missing."""
    prepare = f"pip install 'ev3-distill[tfds-prepare]' and run: tfds build {place} --file_format=array_record"
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"tfds:NAME needs TensorFlow Datasets; got no module {error.name or 'array_record'}: "
            "pip install 'ev3-distill[tfds]'"
        ) from None
    except FileNotFoundError as error:
        missing = error.filename or error
        raise InputError(
            f"tfds:NAME needs a data set that is prepared; got {place}, but no {missing}: {prepare}"
        ) from None
    except NotImplementedError:  # a format without random access, which is the default of `tfds build`
        raise InputError(
            f"tfds:NAME needs a data set prepared as array_record; got {place} in another format: {prepare} --overwrite"
        ) from None


def _builder(place: str) -> Any:
    import tensorflow_datasets as tfds

    folder = os.environ.get("TFDS_DATA_DIR") or str(tfds.core.constants.DATA_DIR)
    try:
        return tfds.core.read_only_builder.builder_from_files(place, data_dir=folder)
    except (ValueError, AssertionError):  # the name is not known there, or not well formed
        raise FileNotFoundError(f"such files in {folder}") from None


def _splits(info: Any, place: str) -> list[str]:
    """Train and, where there is one, test, or validation in its place."""
    known = [name for name, split in info.splits.items() if split.num_examples]
    if "train" not in known:
        raise InputError(
            f"tfds:{place} must have a split named train; got {', '.join(known) or 'none'}: name another set"
        )
    return ["train", *[name for name in ("test", "validation") if name in known][:1]]


def _features(info: Any, place: str) -> tuple[str, str]:
    """Names of the inputs and of the labels, the latter empty where there are none."""
    import tensorflow_datasets as tfds

    plain = {name: f for name, f in info.features.items() if type(f) in (tfds.features.Image, tfds.features.Tensor)}
    arrays = [name for name, f in plain.items() if np.dtype(f.np_dtype).kind in "uif" and 1 <= len(f.shape) <= 3]
    labels = [name for name, f in info.features.items() if isinstance(f, tfds.features.ClassLabel)]
    if not arrays:
        raise InputError(f"tfds:{place} must have images or arrays; got {', '.join(info.features)}: name another set")
    x, y = info.supervised_keys[:2] if info.supervised_keys else ("image", "label")
    return x if x in arrays else arrays[0], y if y in labels else next(iter(labels), "")


def _content(prepared: _Prepared) -> str:
    """All that the examples follow from: the files, and what is read of them."""
    info, splits = prepared.info, prepared.splits
    files = [sha256_of(Path(path)) for split in splits for path in info.splits[split].filepaths]
    lengths = [info.splits[split].num_examples for split in splits]
    classes = info.features[prepared.y].names if prepared.y else None
    read = [prepared.x, prepared.y, classes, prepared.form]
    return json.dumps([_FORMAT, files, lengths, info.features.to_json(), *read], sort_keys=True)


def _gallery(prepared: _Prepared, place: str) -> Gallery:
    """The inputs, and the labels as notes."""
    sizes = [(split, prepared.info.splits[split].num_examples) for split in prepared.splits]
    names = [f"{split}[{i}]" for split, size in sizes for i in range(size)]
    labels = [-1] * len(names)
    sources = functools.cache(lambda: _sources(prepared))
    train = sizes[0][1]

    def row(index: int) -> np.ndarray:
        example = _example(sources()[index >= train], index if index < train else index - train)
        labels[index] = int(example[prepared.y]) if prepared.y else -1
        value = example[prepared.x]
        return pixels(value, prepared.form) if isinstance(value, bytes) else _array(value)

    return Gallery(f"tfds:{place}", names, row, f"tfds:{place},size=32 gives all that size", lambda: {"labels": labels})


def _sources(prepared: _Prepared) -> list[Sequence[dict[str, Any]]]:
    """Of each split, the examples with their images as bytes."""
    import tensorflow_datasets as tfds

    images = [name for name, f in prepared.info.features.items() if isinstance(f, tfds.features.Image)]
    raw = dict.fromkeys(images, tfds.decode.SkipDecoding())
    return [prepared.builder.as_data_source(split=split, decoders=raw) for split in prepared.splits]


def _example(source: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    try:
        return source[index]
    except Exception as error:  # a reader may raise anything at damaged bytes
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None


def _array(value: np.ndarray) -> np.ndarray:
    if value.dtype == np.uint8:
        return value
    with np.errstate(over="ignore"):  # found below
        array = np.asarray(value, np.float32)
    if not np.isfinite(array).all():
        raise Unreadable("it holds nan or infinity")
    return array


def _classes(prepared: _Prepared, labels: np.ndarray, place: str) -> tuple[str, ...]:
    """The names of the classes; every label is one of them, or -1."""
    if not prepared.y:
        return ()
    feature = prepared.info.features[prepared.y]
    names = feature.names or [str(i) for i in range(feature.num_classes or labels.max() + 1)]
    if not -1 <= labels.min() <= labels.max() < len(names):
        raise InputError(
            f"tfds:{place}: labels must be below the number of classes, {len(names)}; got {labels.min()} to "
            f"{labels.max()}: prepare it again"
        )
    return tuple(names)
