"""Distillation losses on features: a layer of the student learns from a layer of the teacher, one formula each.

Features are float32 for the same B examples: vectors [B, D] or images [B, H, W, C]. A formula compares the student's s with
the teacher's t, `(s, t, weight [B], extra) -> scalar`. Over examples, pairs or triplets it is the mean weighted by the product
of their weights, and 0 where those sum to 0. An example of weight 0 does not count. Formulas have no unit, except fitnet
(squared units of t). Where two examples coincide or a feature is zero, its direction is 0 and no gradient flows through it.

The default weights, for CIFAR, come from the code of Tian et al., Contrastive representation distillation, 2020, and of Zhao
et al., Decoupled knowledge distillation, 2022.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.types import Batch, Loss, PyTree

__all__ = [
    "FEATURE_LOSSES",
    "FeatureLoss",
    "attention_transfer",
    "fitnet",
    "rkd",
    "similarity_preserving",
    "with_features",
]

Shape = Sequence[int]  # of one example's feature, without the batch axis
Outputs = tuple[jax.Array, Mapping[str, jax.Array]]  # of `Network.features`

_TINY = 1e-6  # smallest divisor
_COINCIDENT = 1e-5  # squared distance over squared norms below which float32 cannot tell two examples apart
_TRIPLETS = 1 << 20  # triplets per block, which bounds memory
_EXACT = jax.lax.Precision.HIGHEST  # differences of products need full float32


class FeatureLoss(NamedTuple):
    """A formula, its trainable part and its default weight."""

    compare: Callable[[jax.Array, jax.Array, jax.Array, PyTree], jax.Array]  # (s, t, weight [B], extra) -> scalar
    begin: Callable[[Shape, Shape], PyTree]  # shapes of s and t -> initial `extra`, which is trained with the student
    weight: float  # default weight beside a loss on logits


def fitnet() -> FeatureLoss:
    """Hints: mean_j (r(s)_j - t_j)^2 over positions and channels, r a learned affine map of channels.

    r is a 1x1 convolution; for vectors, a linear layer. Per axis, the larger image is averaged to the size of the smaller.
    Romero et al. take half the sum over j.

    Returns:
      The loss; its `extra` is {"kernel": [C_s, C_t], "bias": [C_t]}, its `compare` and `begin` raise InputError unless both
      features are vectors or both are images.

    References:
      Romero et al., FitNets: hints for thin deep nets, 2015, equation 3.
    """

    def begin(student: Shape, teacher: Shape) -> PyTree:
        _check_alike(student, teacher)
        kernel = np.random.default_rng(0).normal(size=(student[-1], teacher[-1])) / math.sqrt(student[-1])
        return {"kernel": kernel.astype(np.float32), "bias": np.zeros(teacher[-1], np.float32)}

    def compare(student: jax.Array, teacher: jax.Array, weight: jax.Array, extra: PyTree) -> jax.Array:
        _check_alike(student.shape[1:], teacher.shape[1:])
        student, teacher = _same_size(student, teacher)
        error = jnp.square(student @ extra["kernel"] + extra["bias"] - teacher)
        return _mean(error.reshape(len(weight), -1).mean(-1), weight)

    return FeatureLoss(compare, begin, 100.0)


def attention_transfer() -> FeatureLoss:
    """Attention: mean_x (a(s)_x - a(t)_x)^2 over positions x, where a(f)_x = m_x / |m|_2 and m_x = mean_c f_xc^2.

    Per axis, the larger image is averaged to the size of the smaller. The loss is invariant to each example's scale and to
    the number of channels. Zagoruyko & Komodakis write beta / 2 times the root of the sum, with beta = 1000 over the number of
    positions; their code computes 1000 times this.

    Returns:
      The loss; its `compare` and `begin` raise InputError unless both features are images.

    References:
      Zagoruyko & Komodakis, Paying more attention to attention, 2017, section 3.1, p = 2.
    """

    def begin(student: Shape, teacher: Shape) -> PyTree:
        _check_images(student, teacher)
        return ()

    def compare(student: jax.Array, teacher: jax.Array, weight: jax.Array, extra: PyTree) -> jax.Array:
        _check_images(student.shape[1:], teacher.shape[1:])
        student, teacher = (_attention(x) for x in _same_size(student, teacher))
        return _mean(jnp.square(student - teacher).mean(-1), weight)

    return FeatureLoss(compare, begin, 1000.0)


def rkd(*, distance: float = 25.0, angle: float = 50.0) -> FeatureLoss:
    """Relations: distance * mean_ij h(d(s)_ij - d(t)_ij) + angle * mean_ijk h(c(s)_ijk - c(t)_ijk).

    d(f)_ij = |f_i - f_j| / mean_kl |f_k - f_l|; c(f)_ijk is the cosine of the angle at f_i between f_j and f_k; h is Huber's
    loss, x^2 / 2 up to 1 and |x| - 1/2 beyond. Means are over pairs and triplets of distinct examples. The loss is invariant to
    shifts, rotations and the common scale. Features may differ in shape, and are flattened.

    Args:
      distance: weight of the first term, at least 0.
      angle: weight of the second term, at least 0; B^3 operations, in blocks of a few megabytes.

    Returns:
      The loss.

    References:
      Park et al., Relational knowledge distillation, 2019, equations 7 to 10; weights as for CIFAR-100.
    """
    for name, factor in (("distance", distance), ("angle", angle)):
        if not 0 <= factor < math.inf:
            raise InputError(f"{name} must be finite and at least 0; got {factor}: 0 turns the term off")

    def compare(student: jax.Array, teacher: jax.Array, weight: jax.Array, extra: PyTree) -> jax.Array:
        s, t = (_relations(_centered(x, weight), weight) for x in (student, teacher))
        total = jnp.float32(0)
        if distance:
            total += distance * _mean(_huber(s.distance / s.mean - t.distance / t.mean), _pairs(weight))
        if angle:
            total += angle * _angle_loss(s, t, weight)
        return total

    return FeatureLoss(compare, lambda student, teacher: (), 1.0)


def similarity_preserving() -> FeatureLoss:
    """Similarities: (1 / b^2) sum_ij (g(s)_ij - g(t)_ij)^2, g(f) the matrix f f^T with each row divided by its l2 norm.

    b is the number of examples with a weight above 0. The loss is invariant to rotations and the common scale. Features may
    differ in shape, and are flattened.

    Returns:
      The loss.

    References:
      Tung & Mori, Similarity-preserving knowledge distillation, 2019, equations 2 to 4; weight as for CIFAR-10.
    """

    def compare(student: jax.Array, teacher: jax.Array, weight: jax.Array, extra: PyTree) -> jax.Array:
        share = weight * (weight > 0).sum() / _or_one(weight.sum())  # mean 1 over examples with weight
        s, t = (_normed(_products(_scaled(x, weight)), share) for x in (student, teacher))
        return _mean(jnp.square(s - t), weight[:, None] * weight)

    return FeatureLoss(compare, lambda student, teacher: (), 3000.0)


FEATURE_LOSSES: dict[str, Callable[..., FeatureLoss]] = {
    "fitnet": fitnet,
    "at": attention_transfer,
    "rkd": rkd,
    "sp": similarity_preserving,
}


def with_features(
    loss: Loss, feature_loss: FeatureLoss, *, student: str, teacher: str, weight: float | None = None
) -> Callable[..., jax.Array]:
    """A loss on logits plus a weighted loss on features, for an arm whose `apply` is `Network.features`.

    Args:
      loss: on logits.
      feature_loss: one of this module.
      student: name of the student's feature.
      teacher: name of the teacher's feature in `batch.teacher`.
      weight: of the feature loss; None for its default.

    Returns:
      (outputs, batch, extra) -> scalar; `extra` may be omitted where the feature loss has none. It raises InputError where a
      feature is missing.
    """
    factor = feature_loss.weight if weight is None else weight

    def total(outputs: Outputs, batch: Batch, extra: PyTree = ()) -> jax.Array:
        logits, features = outputs
        s, t = _named(features, student, "student"), _named(batch.teacher, teacher, "teacher")
        return loss(logits, batch) + factor * feature_loss.compare(s, t, batch.weight, extra)

    return total


def _named(features: Mapping[str, jax.Array], name: str, owner: str) -> jax.Array:
    if name not in features:
        raise InputError(
            f"the {owner} must have the feature '{name}'; got {', '.join(features) or 'none'}: name one that it has"
        )
    return features[name]


def _check_alike(student: Shape, teacher: Shape) -> None:
    if len(student) != len(teacher) or len(student) not in (1, 3):
        raise InputError(
            f"a hint needs two vectors [D] or two images [H, W, C]; got {list(student)} and {list(teacher)}: name two of the "
            "same kind, or use rkd or sp"
        )


def _check_images(student: Shape, teacher: Shape) -> None:
    if len(student) != 3 or len(teacher) != 3:
        raise InputError(
            f"attention needs two images [H, W, C]; got {list(student)} and {list(teacher)}: name features before the "
            "pooling, or use rkd or sp"
        )


def _or_one(value: jax.Array) -> jax.Array:
    """A divisor: a sum or mean of non-negative values, replaced by 1 where it is 0."""
    return jnp.where(value > 0, value, 1.0)


def _mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted mean over all axes."""
    return (weight * values).sum() / _or_one(weight.sum())


def _root(values: jax.Array) -> jax.Array:
    """The square root, with gradient 0 at 0."""
    return jnp.where(values > 0, jnp.sqrt(_or_one(values)), 0.0)


def _huber(error: jax.Array) -> jax.Array:
    size = jnp.abs(error)
    return jnp.where(size < 1, 0.5 * size * size, size - 0.5)


def _same_size(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Averages both images to the smaller height and the smaller width; vectors stay as they are."""
    if student.ndim == 2:
        return student, teacher
    height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (1, 2))
    return _averaged(student, height, width), _averaged(teacher, height, width)


def _averaged(images: jax.Array, height: int, width: int) -> jax.Array:
    """Adaptive average pooling of [B, H, W, C], as in PyTorch."""
    if images.shape[1] != height:
        images = jnp.einsum("bhwc,ih->biwc", images, _bins(images.shape[1], height), precision=_EXACT)
    if images.shape[2] != width:
        images = jnp.einsum("bhwc,iw->bhic", images, _bins(images.shape[2], width), precision=_EXACT)
    return images


def _bins(size: int, bins: int) -> np.ndarray:
    """The matrix [bins, size] that averages the positions of each bin; bins overlap unless `bins` divides `size`."""
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        first, last = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def _attention(images: jax.Array) -> jax.Array:
    """The maps [B, H W] of images [B, H, W, C], of unit norm; zeros where the image is zero."""
    largest = jnp.abs(images).max((1, 2, 3), keepdims=True)
    images = images / jax.lax.stop_gradient(
        jnp.maximum(largest, _TINY)
    )  # the result has no scale; this prevents overflow
    maps = jnp.square(images).mean(-1).reshape(len(images), -1)
    return maps / jnp.maximum(_root(jnp.square(maps).sum(-1, keepdims=True)), _TINY)


def _scaled(features: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows [B, D] with magnitudes of at most 1, for losses without a scale; zeros for examples of weight 0."""
    rows = jnp.where(weight[:, None] > 0, features.reshape(len(weight), -1), 0.0)
    return rows / jax.lax.stop_gradient(jnp.maximum(jnp.abs(rows).max(), _TINY))


def _centered(features: jax.Array, weight: jax.Array) -> jax.Array:
    """`_scaled` rows minus their mean: differences stay the same and are more accurate."""
    rows = _scaled(features, weight)
    mean = (weight[:, None] * rows).sum(0) / _or_one(weight.sum())
    return rows - jax.lax.stop_gradient(mean)


def _products(rows: jax.Array) -> jax.Array:
    return jnp.matmul(rows, rows.T, precision=_EXACT)


def _normed(matrix: jax.Array, share: jax.Array) -> jax.Array:
    """Rows of unit norm; `share` [B] weights the columns."""
    norm = _root((share * jnp.square(matrix)).sum(-1, keepdims=True))
    return matrix / jnp.maximum(norm, _TINY)


def _pairs(weight: jax.Array) -> jax.Array:
    """The weights [B, B] of pairs of distinct examples."""
    return weight[:, None] * weight * (1 - jnp.eye(len(weight)))


class _Relations(NamedTuple):
    """Products and distances between B examples."""

    product: jax.Array  # [B, B] inner products
    distance: jax.Array  # [B, B], 0 where two examples coincide
    inverse: jax.Array  # [B, B] 1 / distance, 0 where two examples coincide
    mean: jax.Array  # mean distance, 1 where all coincide


def _relations(rows: jax.Array, weight: jax.Array) -> _Relations:
    product = _products(rows)
    norms = jnp.diagonal(product)
    both = norms[:, None] + norms
    squared = both - 2 * product
    distance = _root(jnp.where(squared > _COINCIDENT * both, squared, 0.0))
    inverse = jnp.where(distance > 0, 1 / _or_one(distance), 0.0)
    return _Relations(product, distance, inverse, _or_one(_mean(distance, _pairs(weight))))


def _angle_loss(student: _Relations, teacher: _Relations, weight: jax.Array) -> jax.Array:
    """The mean over triplets of distinct examples, in blocks that the backward pass recomputes."""
    size, pairs = len(weight), _pairs(weight)

    @jax.checkpoint
    def at(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = weight[i] * pairs * (jnp.arange(size) != i)[:, None] * (jnp.arange(size) != i)
        return (weights * _huber(_cosines(student, i) - _cosines(teacher, i))).sum(), weights.sum()

    block = max(1, min(size, _TRIPLETS // size**2))
    sums, totals = jax.lax.map(at, jnp.arange(size), batch_size=block)
    return sums.sum() / _or_one(totals.sum())


def _cosines(relations: _Relations, i: jax.Array) -> jax.Array:
    """Cosines of the angles [B, B] at example i."""
    product, inverse = relations.product, relations.inverse
    inner = product - product[i][:, None] - product[i] + product[i, i]
    return inner * inverse[i][:, None] * inverse[i]
