"""Digests of examples by content: an example has one digest in whatever container it comes.

A digest is the 64-bit keyed BLAKE2b (RFC 7693) of the numbers of one example in a canonical form:

- images [H, W, C]: bytes where they are multiples of 1 / 255 (uint8, x / 255 as any float, or x itself as floats up to 255);
  else float32;
- vectors and sequences: float32, with uint8 as x / 255, as networks see it.

Two different examples among n have one digest with a probability of about n^2 / 2^65.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from ev3_distill.data.sources.row_file import RowFile, in_chunks

_BYTES_KEY, _FLOAT_KEY = b"ev3-distill rows: bytes", b"ev3-distill rows: float32"
_TEXT_KEY = b"ev3-distill text"
_TOLERANCE = 0.1  # of a level of 255; float16 is off by up to 0.06


def row_digests(inputs: np.ndarray | RowFile) -> np.ndarray:
    """Digests [N] uint64 of examples [N, ...] in memory or on disk."""
    return digests_where(inputs, [np.ones(len(inputs), bool)])[0]


def digests_where(inputs: np.ndarray | RowFile, masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Digests of several parts of the examples, which are read once.

    Args:
      inputs: [N, ...], in memory or on disk.
      masks: of the parts, each [N] bool.

    Returns:
      Digests of each part, in the order of its examples.
    """
    parts = [np.empty(int(mask.sum()), np.uint64) for mask in masks]
    ends, row = [0] * len(masks), 0
    for chunk in in_chunks(inputs):
        digests = _digests(np.asarray(chunk))
        for i, mask in enumerate(masks):
            selected = digests[mask[row : row + len(digests)]]
            parts[i][ends[i] : ends[i] + len(selected)] = selected
            ends[i] += len(selected)
        row += len(digests)
    return parts


def distinct(digests: np.ndarray, *, overwrite: bool = False) -> np.ndarray:
    """The sorted distinct values of digests [N].

    `numpy.unique` has a hash table for integers: of 3 million different ones it takes 17 times as long and 4 times the memory.

    Args:
      digests: [N].
      overwrite: whether they may be sorted in place, which takes no further memory.
    """
    ordered = digests if overwrite else digests.copy()
    ordered.sort()
    first = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered if first.all() else ordered[first]


def are_among(digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which digests [n] are among others, [n] bool.

    Args:
      digests: [n].
      known: [m], sorted, as `distinct` returns them.
    """
    if not len(known):
        return np.zeros(len(digests), bool)
    return known[np.minimum(np.searchsorted(known, digests), len(known) - 1)] == digests


def text_digests(texts: Iterable[str]) -> np.ndarray:
    """Digests [N] uint64 of texts, such as names of groups."""
    content = b"".join(
        hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=_TEXT_KEY).digest() for text in texts
    )
    return np.frombuffer(content, "<u8").astype(np.uint64)


def _digests(chunk: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(chunk).reshape(len(chunk), -1)
    if flat.dtype == np.uint8:
        if chunk.ndim == 4:
            return _hash(flat, _BYTES_KEY)
        return _hash(flat.astype(np.float32) / np.float32(255), _FLOAT_KEY)
    floats = flat.astype(np.float32, copy=False) + np.float32(0)  # -0 becomes 0
    if chunk.ndim != 4:
        return _hash(floats, _FLOAT_KEY)
    out = _hash(floats, _FLOAT_KEY)
    unit = floats.max(axis=1, initial=0) <= 1
    levels = np.where(unit[:, None], floats * np.float32(255), floats)
    rounded = np.rint(levels)
    whole = ((np.abs(levels - rounded) <= _TOLERANCE) & (rounded >= 0) & (rounded <= 255)).all(axis=1)
    out[whole] = _hash(rounded[whole].astype(np.uint8), _BYTES_KEY)
    return out


def _hash(rows: np.ndarray, key: bytes) -> np.ndarray:
    """Digests [n] of the bytes of rows [n, ...] in C order."""
    rows = np.ascontiguousarray(rows)
    content = b"".join(hashlib.blake2b(row.data, digest_size=8, key=key).digest() for row in rows)
    return np.frombuffer(content, "<u8").astype(np.uint64)
