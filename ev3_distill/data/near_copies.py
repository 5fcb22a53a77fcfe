"""Near-copies: examples that are far closer to another one than the density of the data explains.

Every example becomes a short vector: an image (at least 6 x 6) the means of about 16 x 16 gray blocks, centered and scaled to
length 1; anything else its standardized numbers, randomly projected if there are many. In data of local dimension d the
distance to the nearest neighbor is below t times that to the K-th with probability 1 - (1 - t^d)^(K-1) (neighbors of a Poisson
process, as in the estimator of Facco et al. 2017). A near-copy is a neighbor at which this is at most CHANCE, and at
most CLOSEST times as far as the K-th neighbor. This adapts to data in which distinct examples resemble each other, such as
digits. Below LEAST_DIMENSION it cannot tell copies from neighbors, and nothing is reported. Identical examples are not counted.

A copy that is shifted, cropped or recolored counts as another example, and so does one of more than K copies.

References:
  E. Facco, M. d'Errico, A. Rodriguez, A. Laio: Estimating the intrinsic dimension of datasets by a minimal neighborhood
  information. Scientific Reports 7, 2017.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ev3_distill.data.sources import RowFile, in_chunks

__all__ = ["NearCopies", "count_near_copies", "duplicate_groups"]

CHANCE = 1e-4  # probability that an example without a near-copy counts as one
CLOSEST = 0.2  # largest ratio of the distances to the nearest and the K-th neighbor
LEAST_DIMENSION = 6.0
NEIGHBORS = 20  # K
FEWEST = 100  # examples, below which nothing is reported
SAMPLES = {"decide": 400, "test": 1000}  # examples that are compared with the rest, at most
REFERENCES = 100_000  # examples that they are compared with, at most
_BLOCKS = 16  # per side of an image
_NUMBERS = 256  # per example, at most
_CHUNK = 1 << 21  # distances at a time
_MEMORY_SHARE = 16  # 1 / the part of a memory limit that the vectors may take
_TINY = 1e-6  # squared distances below this part of the typical squared length are of identical examples


class NearCopies(NamedTuple):
    """Examples of a split that have a near-copy in another split."""

    copied: int
    sampled: int  # of how many that were compared


def count_near_copies(
    inputs: np.ndarray | RowFile, rows: Mapping[str, np.ndarray], *, seed: int = 0, memory: int | None = None
) -> dict[str, NearCopies]:
    """Counts the near-copies across splits of random samples of decide and test; splits without any are omitted.

    Args:
      inputs: [N, ...].
      rows: by split, as of `split_rows`.
      seed: of the samples.
      memory: limit in bytes, beyond which fewer examples are compared.
    """
    most = REFERENCES if memory is None else min(REFERENCES, memory // _MEMORY_SHARE // (4 * _NUMBERS))
    rng, split_of = np.random.default_rng(seed), np.full(len(inputs), -1)
    for i, name in enumerate(rows):
        split_of[rows[name]] = i
    sampled = {name: rng.permutation(rows[name])[:size] for name, size in SAMPLES.items()}
    among = np.flatnonzero(split_of >= 0)
    if len(among) > most:
        among = np.unique(np.concatenate([*sampled.values(), rng.permutation(among)[:most]]))
    if len(among) < FEWEST:
        return {}
    vectors = _vectors(inputs, among)
    queries = np.searchsorted(among, np.concatenate(list(sampled.values())))
    neighbors, is_near = _near(vectors, queries)
    crosses = is_near & (split_of[among[neighbors]] != split_of[among[queries]][:, None])
    parts = np.split(crosses.any(axis=1), np.cumsum([len(part) for part in sampled.values()])[:-1])
    return {
        name: NearCopies(int(part.sum()), len(part)) for name, part in zip(sampled, parts, strict=True) if part.any()
    }


def duplicate_groups(inputs: np.ndarray | RowFile) -> np.ndarray:
    """A number for each example [N], the same for examples that are identical or near-copies of each other.

    Compares all pairs: about two minutes for 50,000 images on two cores. Save it as the array `groups` of an npz file for
    `--groups`.

    Args:
      inputs: [N, ...].
    """
    from ev3_distill.data.splits import digests

    same = np.unique(digests(inputs), return_inverse=True)[1]
    links = [np.arange(len(inputs)), same + len(inputs)]  # each example with the node of its content
    edges = np.stack(links, axis=1)
    if len(inputs) >= FEWEST:
        neighbors, is_near = _near(_vectors(inputs, np.arange(len(inputs))), np.arange(len(inputs)))
        edges = np.concatenate([edges, np.stack([np.nonzero(is_near)[0], neighbors[is_near]], axis=1)])
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes = len(inputs) + int(same.max()) + 1
    graph = coo_array((np.ones(len(edges), bool), edges.T), shape=(nodes, nodes))
    return np.unique(connected_components(graph, directed=False)[1][: len(inputs)], return_inverse=True)[1]


def _near(vectors: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The K nearest neighbors [Q, K] of each query that are not identical to it, and which are near-copies [Q, K] bool."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    least, step = _TINY * float(np.median(squares)), max(1, _CHUNK // len(vectors))
    neighbors, distances = [], []
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        square = squares[part][:, None] + squares - 2 * vectors[part] @ vectors.T
        square[square <= least] = np.inf  # itself among others
        neighbors.append(_smallest(square, NEIGHBORS))
        distances.append(np.take_along_axis(square, neighbors[-1], axis=1))
    distance = np.sqrt(np.concatenate(distances))
    ordered = np.sort(distance, axis=1)
    middle, last = ordered[:, NEIGHBORS // 2 - 1], ordered[:, -1]
    usable = np.isfinite(last)
    spread = float(np.median(np.log(last[usable] / middle[usable]))) if usable.any() else 1.0
    dimension = np.log(2) / max(spread, 1e-9)
    ratio = min(CLOSEST, (CHANCE / (NEIGHBORS - 1)) ** (1 / dimension)) if dimension >= LEAST_DIMENSION else 0.0
    return np.concatenate(neighbors), distance < (ratio * np.where(usable, last, 0.0))[:, None]


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """The columns [R, count] of the smallest values of each row [R, C]; without ties three times as fast as argpartition."""
    last = np.partition(values, count - 1, axis=1)[:, count - 1 : count]
    rows, columns = np.nonzero(values <= last)
    if len(rows) == count * len(values):
        return columns.reshape(len(values), count)
    return np.argpartition(values, count - 1, axis=1)[:, :count]


def _vectors(inputs: np.ndarray | RowFile, rows: np.ndarray) -> np.ndarray:
    """Short vectors [R, D] float32 of these rows, which are ascending."""
    wanted, first, parts = np.zeros(len(inputs), bool), 0, []
    wanted[rows] = True
    is_image = inputs.ndim == 4 and min(inputs.shape[1:3]) >= 6
    numbers = int(np.prod(inputs.shape[1:]))
    random = np.random.default_rng(0)
    projection = (
        random.normal(size=(numbers, _NUMBERS)).astype(np.float32) if numbers > _NUMBERS and not is_image else None
    )
    for chunk in in_chunks(inputs):
        part = np.asarray(chunk[wanted[first : first + len(chunk)]])
        first += len(chunk)
        flat = _blocks(part) if is_image else part.reshape(len(part), -1).astype(np.float32)
        parts.append(flat if projection is None else flat @ projection)
    vectors = np.concatenate(parts)
    if is_image:
        vectors -= vectors.mean(axis=1, keepdims=True)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    spread = vectors.std(axis=0)
    return np.asarray((vectors - vectors.mean(axis=0)) / np.where(spread > 0, spread, 1))


def _blocks(images: np.ndarray) -> np.ndarray:
    """Mean gray values of about 16 x 16 blocks [N, H, W, C] -> [N, D]."""
    sizes = [max(1, round(side / _BLOCKS)) for side in images.shape[1:3]]
    counts = [side // size for side, size in zip(images.shape[1:3], sizes, strict=True)]
    inner = images[:, : counts[0] * sizes[0], : counts[1] * sizes[1]]
    blocks = inner.reshape(len(images), counts[0], sizes[0], counts[1], sizes[1], -1)
    return blocks.mean(axis=(2, 4, 5), dtype=np.float32).reshape(len(images), -1)
