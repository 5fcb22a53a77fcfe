"""`npz:FILE`: named arrays in a file of numpy.savez or numpy.savez_compressed. Nothing is unpickled."""

import dataclasses
import functools
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ev3_distill.data.class_names import nfc
from ev3_distill.data.sources.array_shapes import LAYOUTS, TOKEN_NAMES, TOKEN_ROWS, check_layout, warn_of_token_ids
from ev3_distill.data.sources.dataset import Dataset, ReadOptions, fingerprint
from ev3_distill.data.sources.label_arrays import check_labels, number_ids, number_labels
from ev3_distill.data.sources.place_options import split_options
from ev3_distill.data.sources.resolution import ColumnSample, find_offset
from ev3_distill.data.sources.row_cache import Notes, RowWriter, load_or_create
from ev3_distill.data.sources.row_file import Part, RowFile
from ev3_distill.data.sources.zip_reader import ZipReader
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import sha256_of
from ev3_distill.runtime.npz import check_file, readable, without_objects

_SEQUENCES = "sequences"
_PAIRS = (("inputs", "labels"), ("image", "label"), (_SEQUENCES, "labels"))  # names of inputs and labels
_PREFIXES = ("train_", "test_")
_CHUNK = 8 << 20  # bytes converted at a time
_FORMAT = 1  # version of the cached rows


class ArrayMember(NamedTuple):
    """The header of an array in an archive."""

    name: str
    info: zipfile.ZipInfo
    header: int  # bytes before the first number
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    channels_first: bool = False  # images [N, C, H, W]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of an example: gray images get a channel axis, and channels are last."""
        if self.channels_first:
            return (*self.shape[2:], self.shape[1])
        is_grey = len(self.shape) == 3 and not self.name.endswith(_SEQUENCES)
        return (*self.shape[1:], 1) if is_grey else self.shape[1:]


def load(place: str, options: ReadOptions) -> Dataset:
    """Loads an npz file; large inputs stay on disk.

    Raises:
      InputError: the file is missing or damaged, or lacks the arrays of a classification data set.
    """
    path, layout, are_ids = _parse_place(place)
    check_file(path, option="npz:FILE")
    with readable(path):
        archive = ZipReader(path)
        members = {info.filename.removesuffix(".npy"): info for info in archive.members}
        pairs = _array_names(sorted(members), path)
        examples = [_read_header(archive, members, x, layout) for x, _ in pairs]
        labels = [_labels(archive, members, y, x, path) for (_, y), x in zip(pairs, examples, strict=True)]
        names_array = _array(archive, members, "class_names") if "class_names" in members else None
        labels, names_array = (number_ids if are_ids else number_labels)(labels, names_array, path)
        names = _class_names(np.concatenate(labels), names_array, path, options)
        groups, group_names = _groups(archive, members, examples)
        offset = _offset(archive, examples, options)
        inputs = _inputs(archive, examples, offset, options)
    _warn_of_token_ids(inputs, examples[0], path, options)
    all_labels = np.concatenate(labels).astype(np.int32)
    test_rows = np.arange(len(labels[0]), len(all_labels)) if len(pairs) > 1 else None
    digest, source = fingerprint(inputs, all_labels, test_rows, groups, offset), f"npz:{place}"
    dataset = Dataset(inputs, all_labels, len(names), names, test_rows, source, digest, groups, group_names)
    return dataclasses.replace(dataset, offset=offset)


def _parse_place(place: str) -> tuple[Path, str, bool]:
    """The file, the layout of its images (empty without one), and whether labels are ids."""
    name, values = split_options(place, lambda name: Path(name).expanduser().exists())
    layout, labels = values.pop("layout", "").lower(), values.pop("labels", "")
    if values:
        raise InputError(f"the options of npz:FILE are layout and labels; got {min(values)}: try layout=nchw")
    if layout not in ("", *LAYOUTS):
        raise InputError(f"layout of npz:FILE is one of {', '.join(LAYOUTS)}; got {layout!r}: use one of these")
    if labels not in ("", "ids"):
        raise InputError(f"labels of npz:FILE is ids; got {labels!r}: omit it")
    return Path(name).expanduser(), layout, bool(labels)


def _warn_of_token_ids(inputs: np.ndarray | RowFile, member: ArrayMember, path: Path, options: ReadOptions) -> None:
    if member.dtype.kind in "iu" and member.dtype != np.uint8 and len(member.shape) == 2:
        n = member.shape[0]
        rows = np.linspace(0, n - 1, min(n, TOKEN_ROWS)).astype(int)
        warn_of_token_ids(f"{path}: {member.name}", inputs[rows], options.warn)


def _array_names(present: list[str], path: Path) -> list[tuple[str, str]]:
    """Names of inputs and labels: one pair, or one for train and one for test. The name of missing labels is empty."""
    for prefixes in (("",), _PREFIXES):
        for x, y in _PAIRS:
            names = [(prefix + x, prefix + y) for prefix in prefixes]
            if all(name in present for both in names for name in both):
                return names
    for prefixes in (("",), _PREFIXES):
        for x, _ in _PAIRS:
            if all(prefix + x in present for prefix in prefixes) and not _any_labels(present):
                return [(prefix + x, "") for prefix in prefixes]
    if tokens := [name for name in present if name.removeprefix("train_") in TOKEN_NAMES]:
        raise InputError(
            f"{path} must hold inputs that a student can read; got {tokens[0]}, and no student reads token ids: save their "
            "embeddings, as inputs [N, F] (averaged) or sequences [N, L, C]"
        )
    raise InputError(
        f"{path} must hold inputs and labels (or image and label, or sequences and labels), or both with the prefixes train_ "
        f"and test_, or inputs without labels; got {', '.join(present) or 'no array'}: rename or add arrays"
    )


def _any_labels(present: list[str]) -> bool:
    return any(prefix + y in present for prefix in ("", *_PREFIXES) for _, y in _PAIRS)


def _array(archive: ZipReader, members: dict[str, zipfile.ZipInfo], name: str) -> np.ndarray:
    with archive.zip.open(members[name]) as file, without_objects(name, archive.path):
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_header(archive: ZipReader, members: dict[str, zipfile.ZipInfo], name: str, layout: str) -> ArrayMember:
    """Reads and checks the header of an array of inputs."""
    path = archive.path
    with archive.zip.open(members[name]) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        member = ArrayMember(name, members[name], file.tell(), shape, dtype, fortran)
    if dtype.hasobject:
        with without_objects(name, path):
            raise ValueError("Object arrays")
    shapes = {3: "[N, L, C]"} if name.endswith(_SEQUENCES) else {2: "[N, F]", 3: "[N, H, W]", 4: "[N, H, W, C]"}
    if dtype.kind not in "buif" or len(shape) not in shapes:
        is_flat = name.endswith(_SEQUENCES) and len(shape) == 2 and dtype.kind in "iu"
        way_out = "save the embeddings of token ids, or numbers as [N, L, 1]" if is_flat else "convert or reshape it"
        raise InputError(
            f"{path}: {name} must be numbers {' or '.join(shapes.values())}; got {dtype} {list(shape)}: {way_out}"
        )
    if 0 in shape:
        raise InputError(f"{path}: {name} must hold at least one example; got shape {list(shape)}: add examples")
    if member.info.file_size != member.header + int(np.prod(shape, dtype=np.float64)) * dtype.itemsize:
        raise ValueError(f"{name} is not as long as its header says")
    return member._replace(channels_first=check_layout(name, shape, layout, path))


def _labels(
    archive: ZipReader, members: dict[str, zipfile.ZipInfo], y: str, inputs: ArrayMember, path: Path
) -> np.ndarray:
    """Labels [N], integers or text; -1 for every example if `y` is empty."""
    if not y:
        return np.full(inputs.shape[0], -1, np.int32)
    return check_labels(_array(archive, members, y), y, (inputs.name, inputs.shape), path)


def _class_names(labels: np.ndarray, names: np.ndarray | None, path: Path, options: ReadOptions) -> tuple[str, ...]:
    """The K class names, given or counted. Every label is in 0 .. K-1, or -1 where an example has none."""
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise InputError(
            f"{path}: class_names must be text [K]; got {names.dtype} {list(names.shape)}: save a list of strings"
        )
    known = labels[labels != -1]
    if not len(known):
        return () if names is None else tuple(str(name) for name in names)
    low, high = int(known.min()), int(known.max())
    if low < 0:
        row = int((labels < -1).argmax())
        raise InputError(
            f"{path}: labels must not be negative, except for -1 where an example has none; got {labels[row]} in row {row}: "
            f"number classes from 0, or give npz:{path},labels=ids where labels are ids"
        )
    if len(known) < len(labels) and high <= 1 and names is None:
        _check_signs(np.unique(known), path, options)
    if names is not None and high >= len(names):
        raise InputError(
            f"{path}: labels must be below the number of class_names, {len(names)}; got {high} "
            f"in row {int(labels.argmax())}: add names or fix labels"
        )
    if low == high:
        raise InputError(f"{path}: at least 2 classes must occur; got label {low} alone: add examples of another class")
    if names is None and high >= len(labels):
        raise InputError(
            f"{path}: more classes than examples need class_names; got label {high} among {len(labels)} examples: "
            f"number classes from 0 without gaps, add class_names, or give npz:{path},labels=ids where labels are ids"
        )
    return tuple(str(name) for name in (range(high + 1) if names is None else names))


def _check_signs(known: np.ndarray, path: Path, options: ReadOptions) -> None:
    """Refuses labels -1 and 1 (or 0) alone, and warns of -1, 0 and 1, which may all be classes.

    Args:
      known: the distinct labels that are not -1; at most 1.
      path: of the file, for messages.
      options: takes the warning.
    """
    if len(known) == 1:
        raise InputError(
            f"{path}: -1 means that an example has no label; got labels -1 and {known[0]} alone, which may be two classes: "
            f"give npz:{path},labels=ids if they are, else add examples of another class than {known[0]}"
        )
    if known.tolist() == [0, 1]:
        options.warn(
            f"{path}: labels are -1, 0 and 1; examples with -1 count as without a label, and the classes are 0 and 1: give "
            f"npz:{path},labels=ids if -1 is a class, too"
        )


def _groups(
    archive: ZipReader, members: dict[str, zipfile.ZipInfo], examples: list[ArrayMember]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The subgroup [N] int32 of each example and the names of the groups, if the file has arrays of groups."""
    names = ["groups"] if len(examples) == 1 else [f"{prefix}groups" for prefix in _PREFIXES]
    if not any(name in members for name in names):
        return None, ()
    missing = [name for name in names if name not in members]
    arrays = [] if missing else [_array(archive, members, name) for name in names]
    lengths = [member.shape[:1] for member in examples]
    if (
        missing
        or [array.shape for array in arrays] != lengths
        or any(array.dtype.kind not in "uiU" for array in arrays)
    ):
        got = f"no {missing[0]}" if missing else ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays)
        raise InputError(
            f"{archive.path}: groups must be an integer or a text for each example, {[n for (n,) in lengths]}; got {got}: "
            "fix or remove them"
        )
    texts, index = np.unique(np.concatenate([array.astype(str) for array in arrays]), return_inverse=True)
    group_names, merged = np.unique(list(map(nfc, texts.tolist())), return_inverse=True)
    groups = merged[index]
    return groups.astype(np.int32), tuple(map(str, group_names))


def _offset(archive: ZipReader, members: list[ArrayMember], options: ReadOptions) -> np.ndarray | None:
    """What to subtract from the columns of vectors: what is given or, by the first array alone, what they need."""
    first = members[0]
    if options.offset is not None:
        given = np.asarray(options.offset, np.float64)
        return given if given.any() and first.shape[1:] == given.shape else None
    sample = ColumnSample(first.dtype, first.shape)
    if not sample.every:
        return None
    for chunk in _chunks(archive, first):
        sample.add(chunk)
    return find_offset(sample.rows(), f"{archive.path}: {first.name}", options.warn)


def _inputs(
    archive: ZipReader, members: list[ArrayMember], offset: np.ndarray | None, options: ReadOptions
) -> np.ndarray | RowFile:
    """The examples of all parts: in memory, in place in the file, or converted once into the cache."""
    path = archive.path
    shapes = {member.name: member.row_shape for member in members}
    if len(set(shapes.values())) > 1:
        raise InputError(f"{path}: train and test examples must have one shape; got {shapes}: make them the same")
    are_bytes = all(member.dtype == np.uint8 for member in members) and offset is None
    dtype = np.dtype(np.uint8 if are_bytes else np.float32)
    shape = (sum(member.shape[0] for member in members), *members[0].row_shape)
    if int(np.prod(shape, dtype=np.float64)) * dtype.itemsize <= options.memory:
        return _in_memory(archive, members, offset, np.empty(shape, dtype))
    if offset is None and all(_usable_in_place(member, dtype) for member in members):
        for _ in _convert(archive, members, None, dtype):
            pass  # checks them
        parts = tuple(Part(path, archive.offset(member.info) + member.header, member.shape[0]) for member in members)
        return RowFile(parts, shape[1:], dtype)
    if any(member.fortran for member in members):
        raise InputError(
            f"{path}: inputs larger than the memory limit, {options.memory} bytes, must be stored in row order; got "
            "column order: save them with numpy.ascontiguousarray"
        )
    layout = "-nchw" if members[0].channels_first else ""
    subtracted = "" if offset is None else f"-{hashlib.sha256(offset.tobytes()).hexdigest()[:16]}"
    key = f"{sha256_of(path)}-{members[0].name}-{_FORMAT}{layout}{subtracted}"
    return load_or_create(key, functools.partial(_write, archive, members, offset, dtype), options)[0]


def _usable_in_place(member: ArrayMember, dtype: np.dtype) -> bool:
    reordered = member.fortran or member.channels_first
    return member.info.compress_type == zipfile.ZIP_STORED and member.dtype == dtype and not reordered


def _in_memory(
    archive: ZipReader, members: list[ArrayMember], offset: np.ndarray | None, out: np.ndarray
) -> np.ndarray:
    done = 0
    for chunk in _convert(archive, members, offset, out.dtype):
        out[done : done + len(chunk)] = chunk
        done += len(chunk)
    return out


def _write(
    archive: ZipReader, members: list[ArrayMember], offset: np.ndarray | None, dtype: np.dtype, writer: RowWriter
) -> Notes:
    for chunk in _convert(archive, members, offset, dtype):
        writer.add(chunk)
    return {}


def _convert(
    archive: ZipReader, members: list[ArrayMember], offset: np.ndarray | None, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yields chunks of examples [n, ...] as uint8 or float32; uint8 is scaled to [0, 1] if others are floats."""
    for member in members:
        row = 0
        for chunk in _chunks(archive, member):
            scale = np.float32(255 if member.dtype == np.uint8 else 1)
            with np.errstate(over="ignore"):  # of float64; reported below
                if offset is not None:
                    converted = (chunk.astype(np.float64) / scale - offset).astype(np.float32)
                else:
                    converted = chunk if dtype == np.uint8 else chunk.astype(np.float32) / scale
            if (bad := _first_bad_row(converted)) is not None:
                raise InputError(
                    f"{archive.path}: {member.name} must be finite; got nan or infinity in row {row + bad}: repair or "
                    "remove that example"
                )
            if member.channels_first:
                converted = converted.transpose(0, 2, 3, 1)
            yield converted.reshape(len(converted), *member.row_shape)
            row += len(converted)


def _chunks(archive: ZipReader, member: ArrayMember) -> Iterator[np.ndarray]:
    """Yields consecutive rows as they were saved. Reading to the end checks the checksum of the archive."""
    with archive.zip.open(member.info) as file:
        if member.fortran:  # no row is contiguous
            yield np.lib.format.read_array(file, allow_pickle=False)
            return
        file.read(member.header)
        row_bytes = int(np.prod(member.shape[1:], dtype=np.int64)) * member.dtype.itemsize
        while content := file.read(max(1, _CHUNK // row_bytes) * row_bytes):
            yield np.frombuffer(content, member.dtype).reshape(-1, *member.shape[1:])


def _first_bad_row(array: np.ndarray) -> int | None:
    """The first row of [N, ...] with a nonfinite number, or None."""
    if array.dtype == np.uint8:
        return None
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    return None if finite.all() else int(finite.argmin())
