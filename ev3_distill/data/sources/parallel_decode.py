"""Decodes many examples in several threads into rows of one shape, in order, a few MB at a time."""

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

from ev3_distill.data.sources.dataset import ReadOptions
from ev3_distill.data.sources.row_cache import Notes, RowWriter, load_or_create
from ev3_distill.data.sources.row_file import RowFile
from ev3_distill.data.sources.unreadable import Unreadable
from ev3_distill.errors import InputError
from ev3_distill.runtime.cpu import cores

_FORMAT = 2  # version of the cached rows and notes: how pixels are decoded
_CHUNK = 4 << 20  # bytes of rows that a thread decodes at a time
_LISTED = 5  # unreadable examples that a message lists
_GRAY, _COLOR = 1, 3  # channels


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Examples that can be decoded one by one."""

    place: str  # of the source, for messages
    names: Sequence[str]  # [N]
    decode: Callable[[int], np.ndarray]  # decodes example i; called by several threads, may raise Unreadable
    size_hint: str  # what the user can do if sizes differ
    decoding: str = ""  # how examples are decoded; concerns the data only where the note `decoding` says so
    notes: Callable[[], Notes] = dict  # what to cache with the rows; called after all are decoded


class DecodedRows(NamedTuple):
    """Decoded examples."""

    rows: np.ndarray | RowFile  # [M, ...] uint8 or float32, of the M readable examples
    valid: np.ndarray  # [N] bool, which examples are readable
    notes: Notes
    fingerprint: str  # of the content, and of which examples were left out: another decoder may read others


def decode_all(encoded: Encoded, content: str, options: ReadOptions) -> DecodedRows:
    """Decodes examples, or loads them from the cache.

    Args:
      encoded: N examples. Gray images become RGB if any image has color.
      content: identifies everything that the examples depend on, except the decoder and its options.
      options: whether the rows fit in memory, and whether unreadable examples may be left out.

    Raises:
      InputError: examples differ in size or cannot be read, or the cache cannot be written.
    """
    from PIL import __version__ as pillow

    key = hashlib.sha256(f"{content} {encoded.decoding} {_FORMAT} Pillow {pillow}".encode()).hexdigest()
    rows, notes = load_or_create(key, functools.partial(_create, encoded, options.progress), options)
    _check_left_out(encoded, notes["left_out"], options)
    left_out = [index for index, _ in notes["left_out"]]
    valid = np.ones(len(encoded.names), bool)
    valid[left_out] = False
    decoding = [notes["decoding"]] if notes.get("decoding") else []
    fingerprint = hashlib.sha256(json.dumps([content, left_out, *decoding]).encode()).hexdigest()
    return DecodedRows(rows, valid, notes, fingerprint)


def printable(name: str) -> str:
    """A file name as one line of text."""
    return name if name.isprintable() else ascii(name)


class _ColorAfterGray(Exception):
    """An image with color came after gray ones had been written."""


def _create(encoded: Encoded, progress: Callable[[int, int], None], writer: RowWriter) -> Notes:
    """Writes the rows of all readable examples; returns the notes, with index and reason of the others in `left_out`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")  # about oddities in files that Pillow reads nevertheless
        try:
            left_out = _write(encoded, writer, progress, channels=0)
        except _ColorAfterGray:
            writer.reset()
            left_out = _write(encoded, writer, progress, channels=_COLOR)
    if not writer.rows:
        got = f"{printable(encoded.names[0])} ({left_out[0][1]})"
        raise InputError(f"{encoded.place}: some example must be readable; got none, first {got}: check the files")
    return encoded.notes() | {"left_out": left_out}


def _check_left_out(encoded: Encoded, left_out: Sequence[tuple[int, str]], options: ReadOptions) -> None:
    """Refuses unreadable examples or, with `skip_corrupt`, warns of them."""
    if not left_out:
        return
    some = ", ".join(f"{printable(encoded.names[i])} ({reason})" for i, reason in left_out[:_LISTED])
    more = f" and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
    got = f"{len(left_out)} of {len(encoded.names)} that cannot be read: {some}{more}"
    if not options.skip_corrupt:
        raise InputError(
            f"{encoded.place}: images must be intact; got {got}: repair or remove them, or leave them out by --skip-corrupt"
        )
    options.warn(f"{encoded.place}: left out {got}")


class _RowShape:
    """The shape of all rows, which the first one determines."""

    def __init__(self, encoded: Encoded, channels: int):
        self._encoded, self._channels = encoded, channels
        self._first, self._shape = -1, tuple[int, ...]()

    def fit(self, index: int, row: np.ndarray) -> np.ndarray:
        """Returns the row, with gray repeated to RGB where that is the shape of the others.

        Raises:
          _ColorAfterGray: the row has color, the ones before it are gray.
          InputError: the row has another size.
        """
        if row.ndim == 3 and row.shape[-1] == _GRAY and _COLOR in (self._channels, *self._shape[-1:]):
            row = np.repeat(row, _COLOR, axis=-1)
        if self._first < 0:
            self._first, self._shape = index, row.shape
        if row.shape == self._shape:
            return row
        if row.ndim == 3 and row.shape == (*self._shape[:2], _COLOR):
            raise _ColorAfterGray
        raise InputError(
            f"{self._encoded.place}: all examples must have one size; got {self._describe(self._first, self._shape)} and "
            f"{self._describe(index, row.shape)} (height x width): {self._encoded.size_hint}"
        )

    def _describe(self, index: int, shape: tuple[int, ...]) -> str:
        size = shape[:2] if len(shape) == 3 else shape
        return f"{printable(self._encoded.names[index])} of {'x'.join(map(str, size))}"


def _write(
    encoded: Encoded, writer: RowWriter, progress: Callable[[int, int], None], *, channels: int
) -> list[tuple[int, str]]:
    """Writes the readable examples; returns index and reason of the others."""
    shape, left_out = _RowShape(encoded, channels), list[tuple[int, str]]()
    for span, results in _decode_in_order(encoded):
        rows = [shape.fit(i, row) for i, row in zip(span, results, strict=True) if not isinstance(row, Unreadable)]
        left_out += [(i, str(row)) for i, row in zip(span, results, strict=True) if isinstance(row, Unreadable)]
        if rows:
            writer.add(np.stack(rows))
        progress(span.stop, len(encoded.names))
    return left_out


def _decode_in_order(encoded: Encoded) -> Iterator[tuple[range, list[np.ndarray | Unreadable]]]:
    """Yields spans of examples with their rows; as many spans as there are threads are decoded ahead."""
    n, threads, step = len(encoded.names), cores(), _span_length(encoded)
    pending: collections.deque[tuple[range, Future]] = collections.deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for start in range(0, n, step):
            span = range(start, min(start + step, n))
            pending.append((span, pool.submit(_decode_span, encoded, span)))
            if len(pending) > threads:
                span, future = pending.popleft()
                yield span, future.result()
        for span, future in pending:
            yield span, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_span(encoded: Encoded, span: range) -> list[np.ndarray | Unreadable]:
    return [_decode(encoded, index) for index in span]


def _decode(encoded: Encoded, index: int) -> np.ndarray | Unreadable:
    try:
        return encoded.decode(index)
    except Unreadable as error:
        return error


def _span_length(encoded: Encoded) -> int:
    """Examples per span: few enough that their rows take little memory."""
    first = _decode(encoded, 0)
    return 16 if isinstance(first, Unreadable) else max(1, min(256, _CHUNK // max(1, first.nbytes)))
