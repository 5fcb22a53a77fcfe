"""Many examples, decoded by several threads into rows of one shape, in order, a few MB at a time."""

import collections
import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ev3_distill.data.sources.dataset import Reading
from ev3_distill.data.sources.image_decode import Unreadable
from ev3_distill.data.sources.row_cache import Notes, RowWriter, cached
from ev3_distill.data.sources.row_file import RowFile
from ev3_distill.errors import InputError
from ev3_distill.runtime.cpu import cores

_FORMAT = 1  # of the cached rows and notes
_CHUNK = 4 << 20  # bytes of rows that a thread decodes at a time
_NAMED = 5  # of the unreadable ones
_GREY, _COLOURED = 1, 3  # channels


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Examples that can be decoded one by one."""

    place: str  # they come from
    names: Sequence[str]  # [N]
    row: Callable[[int], np.ndarray]  # of example i; called by several threads, may raise Unreadable
    one_size: str  # what the user can do where sizes differ
    notes: Callable[[], Notes] = dict  # what the cache shall keep beside the rows; asked once all are decoded


class Decoded(NamedTuple):
    """What became of a gallery."""

    rows: np.ndarray | RowFile  # [M, ...] uint8 or float32, of the examples kept
    kept: np.ndarray  # [N] bool
    notes: Notes  # the gallery's
    fingerprint: str  # of the content, and of what was left out: another decoder may change its mind


def decoded(gallery: Gallery, content: str, reading: Reading) -> Decoded:
    """Decodes a gallery, or finds it in the cache.

    Args:
      gallery: of N examples. Grey images become coloured where one is coloured.
      content: names all that they follow from, but the decoder.
      reading: where the rows shall be, and whether examples that cannot be read may be left out.

    Raises:
      InputError: examples differ in size or cannot be read, or the cache cannot be written.
    """
    from PIL import __version__ as pillow

    key = hashlib.sha256(f"{content} {_FORMAT} Pillow {pillow}".encode()).hexdigest()
    rows, notes = cached(key, functools.partial(_made, gallery, reading.tell), reading)
    _check_left_out(gallery, notes["left_out"], reading)
    left_out = [index for index, _ in notes["left_out"]]
    kept = np.ones(len(gallery.names), bool)
    kept[left_out] = False
    fingerprint = hashlib.sha256(json.dumps([content, left_out]).encode()).hexdigest()
    return Decoded(rows, kept, notes, fingerprint)


def shown(name: str) -> str:
    """A file's name as one line of text."""
    return name if name.isprintable() else ascii(name)


class _Coloured(Exception):
    """A coloured image came after grey ones had been written."""


def _made(gallery: Gallery, tell: Callable[[int, int], None], writer: RowWriter) -> Notes:
    """Writes the rows of all examples that can be read; notes index and reason of the others, in `left_out`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")  # of oddities in a file that Pillow reads all the same
        try:
            left_out = _write(gallery, writer, tell, channels=0)
        except _Coloured:
            writer.begin()
            left_out = _write(gallery, writer, tell, channels=_COLOURED)
    if not writer.rows:
        got = f"{shown(gallery.names[0])} ({left_out[0][1]})"
        raise InputError(f"{gallery.place}: some example must be readable; got none, first {got}: check the files")
    return gallery.notes() | {"left_out": left_out}


def _check_left_out(gallery: Gallery, left_out: Sequence[tuple[int, str]], reading: Reading) -> None:
    """Refuses or, where the user wants so, tells of examples that cannot be read."""
    if not left_out:
        return
    some = ", ".join(f"{shown(gallery.names[i])} ({reason})" for i, reason in left_out[:_NAMED])
    more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
    got = f"{len(left_out)} of {len(gallery.names)} that cannot be read: {some}{more}"
    if not reading.skip_corrupt:
        raise InputError(
            f"{gallery.place}: images must be whole; got {got}: repair or remove them, or leave them out by --skip-corrupt"
        )
    reading.warn(f"{gallery.place}: left out {got}")


class _Shape:
    """The shape that all rows have, which the first sets."""

    def __init__(self, gallery: Gallery, channels: int):
        self._gallery, self._channels = gallery, channels
        self._first, self._shape = -1, tuple[int, ...]()

    def fitted(self, index: int, row: np.ndarray) -> np.ndarray:
        if row.ndim == 3 and row.shape[-1] == _GREY and _COLOURED in (self._channels, *self._shape[-1:]):
            row = np.repeat(row, _COLOURED, axis=-1)
        if self._first < 0:
            self._first, self._shape = index, row.shape
        if row.shape == self._shape:
            return row
        if row.ndim == 3 and row.shape == (*self._shape[:2], _COLOURED):
            raise _Coloured
        raise InputError(
            f"{self._gallery.place}: all examples must have one size; got {self._named(self._first, self._shape)} and "
            f"{self._named(index, row.shape)} (height x width): {self._gallery.one_size}"
        )

    def _named(self, index: int, shape: tuple[int, ...]) -> str:
        size = shape[:2] if len(shape) == 3 else shape
        return f"{shown(self._gallery.names[index])} of {'x'.join(map(str, size))}"


def _write(
    gallery: Gallery, writer: RowWriter, tell: Callable[[int, int], None], *, channels: int
) -> list[tuple[int, str]]:
    """Writes what can be read; returns index and reason of the rest."""
    shape, left_out = _Shape(gallery, channels), list[tuple[int, str]]()
    for span, found in _in_order(gallery):
        rows = [shape.fitted(i, row) for i, row in zip(span, found, strict=True) if not isinstance(row, Unreadable)]
        left_out += [(i, str(row)) for i, row in zip(span, found, strict=True) if isinstance(row, Unreadable)]
        if rows:
            writer.add(np.stack(rows))
        tell(span.stop, len(gallery.names))
    return left_out


def _in_order(gallery: Gallery) -> Iterator[tuple[range, list[np.ndarray | Unreadable]]]:
    """Spans of examples with what became of each, decoded ahead by as many spans as there are threads."""
    n, threads, step = len(gallery.names), cores(), _step(gallery)
    waiting: collections.deque[tuple[range, Future]] = collections.deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for start in range(0, n, step):
            span = range(start, min(start + step, n))
            waiting.append((span, pool.submit(_decoded, gallery, span)))
            if len(waiting) > threads:
                span, future = waiting.popleft()
                yield span, future.result()
        for span, future in waiting:
            yield span, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decoded(gallery: Gallery, span: range) -> list[np.ndarray | Unreadable]:
    return [_row(gallery, index) for index in span]


def _row(gallery: Gallery, index: int) -> np.ndarray | Unreadable:
    try:
        return gallery.row(index)
    except Unreadable as error:
        return error


def _step(gallery: Gallery) -> int:
    """Examples of a span: few enough that their rows take little memory."""
    first = _row(gallery, 0)
    return 16 if isinstance(first, Unreadable) else max(1, min(256, _CHUNK // max(1, first.nbytes)))
