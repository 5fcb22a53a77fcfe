"""`tfds:NAME[/CONFIG][:VERSION]`: data sets prepared by TensorFlow Datasets, read without TensorFlow.

The data set is located by its files, which is the last resort of `tfds.data_source`; the code that made it is not needed.
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.data.sources.dataset import Dataset, ReadOptions
from ev3_distill.data.sources.image_decode import decode_image
from ev3_distill.data.sources.image_options import ImageOptions, parse_place
from ev3_distill.data.sources.image_traits import TraitsRecord, warn_of_traits
from ev3_distill.data.sources.parallel_decode import Encoded, decode_all
from ev3_distill.data.sources.unreadable import Unreadable
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import sha256_of

_FORMAT = 1  # version of the content that is hashed for the fingerprint


class _Prepared(NamedTuple):
    """A data set on disk, and the part of it that is read."""

    builder: Any
    splits: list[str]  # train, and test if there is one
    x: str  # name of the inputs
    y: str  # name of the labels; empty without labels
    image_options: ImageOptions

    @property
    def info(self) -> Any:
        """The description by TensorFlow Datasets."""
        return self.builder.info


def load(place: str, options: ReadOptions) -> Dataset:
    """Loads the splits `train` and `test` (or `validation`) of a prepared data set; decoded once and then cached.

    Raises:
      InputError: TensorFlow Datasets is not installed, or the data set is not prepared or not for classification.
    """
    name, image_options = parse_place(place, lambda _: False)
    if options.stored_pixels:
        image_options = image_options.as_stored()
    with _explain_missing(name):
        builder = _builder(name)
        prepared = _Prepared(builder, _splits(builder.info, name), *_features(builder.info, name), image_options)
        if not prepared.y:
            options.warn(f"tfds:{name} has no class labels: it is used without labels")
        encoded = _encoded(prepared, name)
        decoded = decode_all(encoded, _content(prepared), options)
    warn_of_traits(decoded.notes, encoded.names, f"tfds:{name}", image_options, options.warn)
    labels = np.array(decoded.notes["labels"], np.int32)[decoded.valid]
    is_test = np.arange(len(decoded.valid)) >= prepared.info.splits["train"].num_examples
    test_rows = np.flatnonzero(is_test[decoded.valid]) if len(prepared.splits) > 1 else None
    names = _classes(prepared, labels, name)
    return Dataset(decoded.rows, labels, len(names), names, test_rows, f"tfds:{place}", decoded.fingerprint)


@contextmanager
def _explain_missing(place: str) -> Iterator[None]:
    """Raises an InputError that names the missing package or command."""
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
        raise InputError(f"tfds:NAME needs a prepared data set; got {place}, but no {missing}: {prepare}") from None
    except NotImplementedError:  # a format without random access, the default of `tfds build`
        raise InputError(
            f"tfds:NAME needs a data set prepared as array_record; got {place} in another format: {prepare} --overwrite"
        ) from None


def _builder(place: str) -> Any:
    import tensorflow_datasets as tfds

    folder = os.environ.get("TFDS_DATA_DIR") or str(tfds.core.constants.DATA_DIR)
    try:
        return tfds.core.read_only_builder.builder_from_files(place, data_dir=folder)
    except (ValueError, AssertionError):  # an unknown or malformed name
        raise FileNotFoundError(f"such files in {folder}") from None


def _splits(info: Any, place: str) -> list[str]:
    """Train, and test if there is one, else validation if there is one."""
    known = [name for name, split in info.splits.items() if split.num_examples]
    if "train" not in known:
        raise InputError(
            f"tfds:{place} must have a split named train; got {', '.join(known) or 'none'}: name another set"
        )
    return ["train", *[name for name in ("test", "validation") if name in known][:1]]


def _features(info: Any, place: str) -> tuple[str, str]:
    """Names of the inputs and of the labels; the latter is empty without labels."""
    import tensorflow_datasets as tfds

    plain = {name: f for name, f in info.features.items() if type(f) in (tfds.features.Image, tfds.features.Tensor)}
    arrays = [name for name, f in plain.items() if np.dtype(f.np_dtype).kind in "uif" and 1 <= len(f.shape) <= 3]
    labels = [name for name, f in info.features.items() if isinstance(f, tfds.features.ClassLabel)]
    if not arrays:
        raise InputError(f"tfds:{place} must have images or arrays; got {', '.join(info.features)}: name another set")
    x, y = info.supervised_keys[:2] if info.supervised_keys else ("image", "label")
    return x if x in arrays else arrays[0], y if y in labels else next(iter(labels), "")


def _content(prepared: _Prepared) -> str:
    """Identifies everything that the examples depend on: the files, and the part that is read."""
    info, splits = prepared.info, prepared.splits
    files = [sha256_of(Path(path)) for split in splits for path in info.splits[split].filepaths]
    lengths = [info.splits[split].num_examples for split in splits]
    classes = info.features[prepared.y].names if prepared.y else None
    read = [prepared.x, prepared.y, classes, prepared.image_options.form]
    return json.dumps([_FORMAT, files, lengths, info.features.to_json(), *read], sort_keys=True)


def _encoded(prepared: _Prepared, place: str) -> Encoded:
    """The inputs, and the labels as notes."""
    sizes = [(split, prepared.info.splits[split].num_examples) for split in prepared.splits]
    names = [f"{split}[{i}]" for split, size in sizes for i in range(size)]
    labels = [-1] * len(names)
    sources = functools.cache(lambda: _sources(prepared))
    train = sizes[0][1]
    record = TraitsRecord(len(names), prepared.image_options)

    def decode(index: int) -> np.ndarray:
        example = _example(sources()[index >= train], index if index < train else index - train)
        labels[index] = int(example[prepared.y]) if prepared.y else -1
        value = example[prepared.x]
        if isinstance(value, bytes):
            return record.add(index, decode_image(value, prepared.image_options))
        return _array(value)

    return Encoded(
        place=f"tfds:{place}",
        names=names,
        decode=decode,
        size_hint=f"tfds:{place},size=32 gives all that size",
        decoding=json.dumps(prepared.image_options),
        notes=lambda: {"labels": labels, **record.notes()},
    )


def _sources(prepared: _Prepared) -> list[Sequence[dict[str, Any]]]:
    """The examples of each split, with images as undecoded bytes."""
    import tensorflow_datasets as tfds

    images = [name for name, f in prepared.info.features.items() if isinstance(f, tfds.features.Image)]
    raw = dict.fromkeys(images, tfds.decode.SkipDecoding())
    return [prepared.builder.as_data_source(split=split, decoders=raw) for split in prepared.splits]


def _example(source: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    try:
        return source[index]
    except Exception as error:  # a reader may raise anything on damaged bytes
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None


def _array(value: np.ndarray) -> np.ndarray:
    if value.dtype == np.uint8:
        return value
    with np.errstate(over="ignore"):  # reported below
        array = np.asarray(value, np.float32)
    if not np.isfinite(array).all():
        raise Unreadable("it holds nan or infinity")
    return array


def _classes(prepared: _Prepared, labels: np.ndarray, place: str) -> tuple[str, ...]:
    """The class names; checks that every label has one or is -1."""
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
