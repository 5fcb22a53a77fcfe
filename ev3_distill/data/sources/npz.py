"""`npz:FILE`: named arrays in a file that numpy.savez or numpy.savez_compressed wrote. Nothing in it is unpickled."""

import functools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ev3_distill.data.sources.dataset import Dataset, Reading, fingerprint
from ev3_distill.data.sources.row_cache import Notes, RowWriter, cached
from ev3_distill.data.sources.row_file import Part, RowFile
from ev3_distill.data.sources.zip_reader import Archive
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import sha256_of
from ev3_distill.runtime.npz import check_file, readable, without_objects
from ev3_distill.types import MOST_GROUPS

_SEQUENCES = "sequences"
_PAIRS = (("inputs", "labels"), ("image", "label"), (_SEQUENCES, "labels"))  # of a file, alone or as train_* and test_*
_PARTS = ("train_", "test_")
_CHUNK = 8 << 20  # bytes that are converted at a time
_FORMAT = 1  # of the cached rows


class Member(NamedTuple):
    """An array in an archive that is not read yet."""

    name: str
    info: zipfile.ZipInfo
    header: int  # bytes before the first number
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of an example: images get a channel axis, sequences have one."""
        is_grey = len(self.shape) == 3 and not self.name.endswith(_SEQUENCES)
        return (*self.shape[1:], 1) if is_grey else self.shape[1:]


def load(place: str, reading: Reading) -> Dataset:
    """Arrays of an npz file, with labels or without, on disk where they are large.

    Raises:
      InputError: the file is missing or broken, or has not the arrays of a classification data set.
    """
    path = Path(place).expanduser()
    check_file(path, option="npz:FILE")
    with readable(path):
        archive = Archive(path)
        members = {info.filename.removesuffix(".npy"): info for info in archive.members}
        pairs = _form(sorted(members), path)
        examples = [_member(archive, members, x) for x, _ in pairs]
        labels = [_labels(archive, members, y, x, path) for (_, y), x in zip(pairs, examples, strict=True)]
        given = _array(archive, members, "class_names") if "class_names" in members else None
        names = _class_names(np.concatenate(labels), given, path)
        groups, group_names = _groups(archive, members, examples)
        inputs = _inputs(archive, examples, path, reading)
    together = np.concatenate(labels).astype(np.int32)
    test_rows = np.arange(len(labels[0]), len(together)) if len(pairs) > 1 else None
    digest = fingerprint(inputs, together, test_rows, groups)
    return Dataset(inputs, together, len(names), names, test_rows, f"npz:{place}", digest, groups, group_names)


def _form(found: list[str], path: Path) -> list[tuple[str, str]]:
    """The names of inputs and labels, the latter empty where there are none: one pair, or that of train and of test."""
    for parts in (("",), _PARTS):
        for pair in _PAIRS:
            names = [(part + pair[0], part + pair[1]) for part in parts]
            if all(name in found for both in names for name in both):
                return names
    for parts in (("",), _PARTS):
        for x, _ in _PAIRS:
            if all(part + x in found for part in parts) and not _any_labels(found):
                return [(part + x, "") for part in parts]
    raise InputError(
        f"{path} must hold inputs and labels (or image and label, or sequences and labels), or both with train_ and test_ "
        f"before them, or inputs without labels; got {', '.join(found) or 'no array'}: rename or add arrays"
    )


def _any_labels(found: list[str]) -> bool:
    return any(part + y in found for part in ("", *_PARTS) for _, y in _PAIRS)


def _array(archive: Archive, members: dict[str, zipfile.ZipInfo], name: str) -> np.ndarray:
    with archive.zip.open(members[name]) as file, without_objects(name, archive.path):
        return np.lib.format.read_array(file, allow_pickle=False)


def _member(archive: Archive, members: dict[str, zipfile.ZipInfo], name: str) -> Member:
    """Inputs by their header, checked."""
    path = archive.path
    with archive.zip.open(members[name]) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        member = Member(name, members[name], file.tell(), shape, dtype, fortran)
    if dtype.hasobject:
        with without_objects(name, path):
            raise ValueError("Object arrays")
    wanted = {3: "[N, L, C]"} if name.endswith(_SEQUENCES) else {2: "[N, F]", 3: "[N, H, W]", 4: "[N, H, W, C]"}
    if dtype.kind not in "buif" or len(shape) not in wanted:
        raise InputError(
            f"{path}: {name} must be numbers {' or '.join(wanted.values())}; got {dtype} {list(shape)}: convert or "
            "reshape it"
        )
    if 0 in shape:
        raise InputError(f"{path}: {name} must hold at least one example; got shape {list(shape)}: add examples")
    if member.info.file_size != member.header + int(np.prod(shape, dtype=np.float64)) * dtype.itemsize:
        raise ValueError(f"{name} is not as long as its header says")
    return member


def _labels(archive: Archive, members: dict[str, zipfile.ZipInfo], y: str, inputs: Member, path: Path) -> np.ndarray:
    """Labels [N] of any integer dtype, or -1 for each of the inputs."""
    if not y:
        return np.full(inputs.shape[0], -1, np.int32)
    labels, x = _array(archive, members, y), inputs.name
    if labels.shape != inputs.shape[:1]:
        raise InputError(
            f"{path}: {x} and {y} must have the same length and {y} one number per example; got {list(inputs.shape)} "
            f"and {list(labels.shape)}: pair them up"
        )
    if labels.dtype.kind not in "ui":
        raise InputError(f"{path}: {y} must be integers; got {labels.dtype}: convert with labels.astype('int32')")
    return labels


def _class_names(labels: np.ndarray, names: np.ndarray | None, path: Path) -> tuple[str, ...]:
    """The K names of the classes, given or counted; every label is one of 0 .. K-1, or all are -1: there is none."""
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise InputError(
            f"{path}: class_names must be text [K]; got {names.dtype} {list(names.shape)}: save a list of strings"
        )
    low, high = int(labels.min()), int(labels.max())
    if low == high == -1:
        return () if names is None else tuple(str(name) for name in names)
    if low < 0:
        row = int((labels < 0).argmax())
        raise InputError(f"{path}: labels must not be negative; got {labels[row]} in row {row}: number classes from 0")
    if names is not None and high >= len(names):
        raise InputError(
            f"{path}: labels must be below the number of class_names, {len(names)}; got {high} "
            f"in row {int(labels.argmax())}: add names or mend labels"
        )
    if low == high:
        raise InputError(f"{path}: at least 2 classes must occur; got label {low} alone: add examples of another class")
    if names is None and high >= len(labels):
        raise InputError(
            f"{path}: more classes than examples need class_names; got label {high} among {len(labels)} examples: "
            "number classes from 0 without gaps or add class_names"
        )
    return tuple(str(name) for name in (range(high + 1) if names is None else names))


def _groups(
    archive: Archive, members: dict[str, zipfile.ZipInfo], examples: list[Member]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The subgroup of each example, [N] int32 from 0, and the groups' names, from `groups` of numbers or text; none without."""
    names = ["groups"] if len(examples) == 1 else [f"{part}groups" for part in _PARTS]
    if not any(name in members for name in names):
        return None, ()
    missing = [name for name in names if name not in members]
    found = [] if missing else [_array(archive, members, name) for name in names]
    lengths = [member.shape[:1] for member in examples]
    if missing or [array.shape for array in found] != lengths or any(array.dtype.kind not in "uiU" for array in found):
        got = f"no {missing[0]}" if missing else ", ".join(f"{array.dtype} {list(array.shape)}" for array in found)
        raise InputError(
            f"{archive.path}: groups must be a number or a text for each example, {[n for (n,) in lengths]}; got {got}: mend "
            "or remove them"
        )
    kinds, groups = np.unique(np.concatenate([array.astype(str) for array in found]), return_inverse=True)
    if len(kinds) > MOST_GROUPS:
        raise InputError(
            f"{archive.path}: groups must be {MOST_GROUPS} at most; got {len(kinds)}: merge some, for they must have examples "
            "enough to promise anything of"
        )
    return groups.astype(np.int32), tuple(map(str, kinds))


def _inputs(archive: Archive, members: list[Member], path: Path, reading: Reading) -> np.ndarray | RowFile:
    """The examples of all parts: in memory, or where they lie in the file, or converted once in the cache."""
    shapes = {member.name: member.row_shape for member in members}
    if len(set(shapes.values())) > 1:
        raise InputError(f"{path}: train and test examples must have one shape; got {shapes}: make them the same")
    dtype = np.dtype(np.uint8 if all(member.dtype == np.uint8 for member in members) else np.float32)
    shape = (sum(member.shape[0] for member in members), *members[0].row_shape)
    if int(np.prod(shape, dtype=np.float64)) * dtype.itemsize <= reading.memory:
        return _in_memory(archive, members, np.empty(shape, dtype))
    if all(_lies_ready(member, dtype) for member in members):
        for _ in _converted(archive, members, dtype):
            pass  # which checks them
        parts = tuple(Part(path, archive.offset(member.info) + member.header, member.shape[0]) for member in members)
        return RowFile(parts, shape[1:], dtype)
    if any(member.fortran for member in members):
        raise InputError(
            f"{path}: inputs larger than the memory allowed, {reading.memory} bytes, must lie row by row; got columns "
            "first: save them with numpy.ascontiguousarray"
        )
    key = f"{sha256_of(path)}-{members[0].name}-{_FORMAT}"
    return cached(key, functools.partial(_write, archive, members, dtype), reading)[0]


def _lies_ready(member: Member, dtype: np.dtype) -> bool:
    return member.info.compress_type == zipfile.ZIP_STORED and member.dtype == dtype and not member.fortran


def _in_memory(archive: Archive, members: list[Member], out: np.ndarray) -> np.ndarray:
    done = 0
    for chunk in _converted(archive, members, out.dtype):
        out[done : done + len(chunk)] = chunk
        done += len(chunk)
    return out


def _write(archive: Archive, members: list[Member], dtype: np.dtype, writer: RowWriter) -> Notes:
    for chunk in _converted(archive, members, dtype):
        writer.add(chunk)
    return {}


def _converted(archive: Archive, members: list[Member], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Examples [n, ...] as uint8 or float32, some at a time; 8-bit ones become [0, 1] where others are floats."""
    for member in members:
        row = 0
        for chunk in _chunks(archive, member):
            scale = np.float32(255 if member.dtype == np.uint8 else 1)
            with np.errstate(over="ignore"):  # of float64, found below
                made = chunk if dtype == np.uint8 else chunk.astype(np.float32) / scale
            if (bad := _first_bad_row(made)) is not None:
                raise InputError(
                    f"{archive.path}: {member.name} must be finite; got nan or infinity in row {row + bad}: repair or "
                    "remove that example"
                )
            yield made.reshape(len(made), *member.row_shape)
            row += len(made)


def _chunks(archive: Archive, member: Member) -> Iterator[np.ndarray]:
    """Consecutive rows as they were saved. To read to the end is to check the archive's checksum."""
    with archive.zip.open(member.info) as file:
        if member.fortran:  # no row lies together
            yield np.lib.format.read_array(file, allow_pickle=False)
            return
        file.read(member.header)
        row_bytes = int(np.prod(member.shape[1:], dtype=np.int64)) * member.dtype.itemsize
        while content := file.read(max(1, _CHUNK // row_bytes) * row_bytes):
            yield np.frombuffer(content, member.dtype).reshape(-1, *member.shape[1:])


def _first_bad_row(array: np.ndarray) -> int | None:
    """The first row of [N, ...] with a number that is not finite."""
    if array.dtype == np.uint8:
        return None
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    return None if finite.all() else int(finite.argmin())
