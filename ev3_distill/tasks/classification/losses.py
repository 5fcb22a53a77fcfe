"""Distillation losses on logits: factories that return `(student logits [B, K], batch) -> scalar`, one formula each.

Logits are finite float32 and K is at least 2; a loss is in nats unless its docstring says otherwise. Over examples
every loss is the mean weighted by `batch.weight`, 0 where the weights sum to 0. Losses that ask for the label
(cross_entropy, dkd, nkd) leave examples with label -1 out of that mean. Nothing here stops gradients: the teacher's
logits are data. Hyperparameters are checked when the factory is called, except where JAX traces them (hypergradients).

In the formulas s and t are the logits of student and teacher, y the label, q and p the softmax of s / T and t / T.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.types import Batch, Loss, Objective

__all__ = [
    "LOSSES",
    "balanced",
    "cross_entropy",
    "dist",
    "dkd",
    "jsd",
    "kd",
    "logit_mse",
    "mix",
    "negated",
    "nkd",
    "reverse_kl",
    "standardized_kd",
]

Scalar = float | jax.Array  # a hyperparameter; an array where it is differentiated

# A standard deviation below its floor counts as the floor: where nothing varies, correlation and z-score are 0, and no
# gradient exceeds 1 / floor. Float32 rounds probabilities to some 1e-7, logits of common size to some 1e-6.
_PROBABILITY_FLOOR = 1e-6
_LOGIT_FLOOR = 1e-3


def cross_entropy(*, label_smoothing: Scalar = 0.0) -> Loss:
    """Cross-entropy with the labels: -sum_k y'_k log q_k at T = 1, where y' = (1 - a) onehot(y) + a / K.

    Ignores the teacher, so it is not stationary at s = t.

    Args:
      label_smoothing: a, in [0, 1).

    Returns:
      The loss.

    References:
      Szegedy et al., Rethinking the Inception architecture for computer vision, 2016 (label smoothing).
    """
    _check("label_smoothing", label_smoothing, lambda a: 0 <= a < 1, "at least 0 and below 1", "0 turns it off")

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q = jax.nn.log_softmax(logits)
        hard, uniform = _target(log_q, batch.targets), log_q.mean(-1)
        return _mean(-(1 - label_smoothing) * hard - label_smoothing * uniform, _labelled_weight(batch))

    return loss


def kd(*, temperature: Scalar = 4.0) -> Loss:
    """Knowledge distillation: T^2 KL(p || q).

    T^2 keeps the gradient's scale as T grows; it then tends to (s - t) / K on centred logits, half that of logit_mse.

    Args:
      temperature: T, above 0.

    Returns:
      The loss.

    References:
      Hinton et al., Distilling the knowledge in a neural network, 2015, section 2.
    """
    _check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q, log_p = _log_softmaxes(logits, batch, temperature)
        return temperature**2 * _mean(_kl(log_p, log_q), batch.weight)

    return loss


def logit_mse() -> Loss:
    """Squared error of logits, mean over classes: (1 / K) sum_k (s_k - t_k)^2, in squared logits.

    Ba & Caruana take half the sum over classes, K / 2 times this; Kim et al. the sum, K times this.

    Returns:
      The loss.

    References:
      Ba & Caruana, Do deep nets really need to be deep?, 2014.
      Kim et al., Comparing Kullback-Leibler divergence and mean squared error loss in knowledge distillation, 2021.
    """

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        return _mean(jnp.square(logits - batch.teacher["logits"]).mean(-1), batch.weight)

    return loss


def dkd(*, alpha: Scalar = 1.0, beta: Scalar = 8.0, temperature: Scalar = 4.0) -> Loss:
    """Decoupled distillation: T^2 (alpha KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta KL(p^ || q^)).

    p^ and q^ are the softmax over the K - 1 classes that are not the label. kd is alpha = 1, beta = 1 - p_y.

    Args:
      alpha: weight of the target class term, at least 0.
      beta: weight of the non-target term, at least 0.
      temperature: T, above 0.

    Returns:
      The loss.

    References:
      Zhao et al., Decoupled knowledge distillation, 2022; T^2 as in the authors' code.
    """
    _check_factor("alpha", alpha)
    _check_factor("beta", beta)
    _check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        s, t = logits / temperature, batch.teacher["logits"] / temperature
        target = _kl(_log_target_or_not(t, batch.targets), _log_target_or_not(s, batch.targets))
        others = _kl(_log_others(t, batch.targets), _log_others(s, batch.targets))
        return temperature**2 * _mean(alpha * target + beta * others, _labelled_weight(batch))

    return loss


def dist(*, beta: Scalar = 1.0, gamma: Scalar = 1.0, temperature: Scalar = 1.0) -> Loss:
    """DIST: T^2 (beta (1 - mean_i r(q_i., p_i.)) + gamma (1 - mean_k r(q_.k, p_.k))), r Pearson's correlation.

    The first term (inter-class) correlates classes within each example, the second (intra-class) examples within each
    class; the second weights examples within its means, variances and covariance. Where teacher or student is constant,
    r is 0: the least value, at q = p, is then above 0, and with one example the second term is constant. Correlations
    have no unit.

    Args:
      beta: weight of the inter-class term, at least 0.
      gamma: weight of the intra-class term, at least 0.
      temperature: T, above 0.

    Returns:
      The loss.

    References:
      Huang et al., Knowledge distillation from a stronger teacher, 2022; T^2 as in the authors' code.
    """
    _check_factor("beta", beta)
    _check_factor("gamma", gamma)
    _check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        q, p = (jnp.exp(log) for log in _log_softmaxes(logits, batch, temperature))
        inter = _mean(1 - _correlation(q, p, jnp.ones(q.shape[-1])), batch.weight)
        intra = 1 - _correlation(q.T, p.T, batch.weight).mean()
        intra = jnp.where(batch.weight.sum() > 0, intra, 0.0)
        return temperature**2 * (beta * inter + gamma * intra)

    return loss


def nkd(*, gamma: Scalar = 1.5, temperature: Scalar = 1.0) -> Loss:
    """Normalised distillation: -p_y log q_y at T = 1, plus gamma T^2 (-sum_{k != y} p^_k log q^_k) at T.

    p^ and q^ are the softmax over the K - 1 classes that are not the label. Not stationary at s = t: the first term
    pulls q_y to 1; the second is stationary there, at gamma T^2 times the entropy of p^.

    Args:
      gamma: weight of the non-target term, at least 0.
      temperature: T of the non-target term, above 0.

    Returns:
      The loss.

    References:
      Yang et al., From knowledge distillation to self-knowledge distillation: a unified approach with normalized loss
      and customized soft labels, 2023.
    """
    _check_factor("gamma", gamma)
    _check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q, log_p = _log_softmaxes(logits, batch, 1.0)
        target = -jnp.exp(_target(log_p, batch.targets)) * _target(log_q, batch.targets)
        log_q_hat = _log_others(logits / temperature, batch.targets)
        log_p_hat = _log_others(batch.teacher["logits"] / temperature, batch.targets)
        others = -(jnp.exp(log_p_hat) * log_q_hat).sum(-1)
        return _mean(target + gamma * temperature**2 * others, _labelled_weight(batch))

    return loss


def standardized_kd(*, base: Scalar = 2.0) -> Loss:
    """Distillation of standardised logits: b^2 KL(softmax(z(t) / b) || softmax(z(s) / b)).

    z(x) = (x - mean x) / std x over the classes of one example, population std, which counts as 1e-3 where it is less.
    Indifferent to positive affine maps of either's logits, so it leaves the student's scale free.

    Args:
      base: b, the temperature relative to each example's std, above 0.

    Returns:
      The loss.

    References:
      Sun et al., Logit standardization in knowledge distillation, 2024.
    """
    _check_temperature("base", base)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        classes = jnp.ones(logits.shape[-1])
        z_s = _standardize(logits, classes, floor=_LOGIT_FLOOR)
        z_t = _standardize(batch.teacher["logits"], classes, floor=_LOGIT_FLOOR)
        return base**2 * _mean(_kl(jax.nn.log_softmax(z_t / base), jax.nn.log_softmax(z_s / base)), batch.weight)

    return loss


def reverse_kl(*, temperature: Scalar = 1.0) -> Loss:
    """Reverse divergence, which seeks the teacher's modes: KL(q || p), without kd's factor T^2.

    Args:
      temperature: T, above 0.

    Returns:
      The loss.

    References:
      Gu et al., MiniLLM: knowledge distillation of large language models, 2023.
    """
    _check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q, log_p = _log_softmaxes(logits, batch, temperature)
        return _mean(_kl(log_q, log_p), batch.weight)

    return loss


def jsd(*, beta: Scalar = 0.5, temperature: Scalar = 1.0) -> Loss:
    """Generalised Jensen-Shannon divergence: b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, without T^2.

    Bounded by the entropy of (b, 1 - b). As b falls to 0, the loss over b tends to KL(p || q); as b rises to 1, the
    loss over 1 - b tends to KL(q || p).

    Args:
      beta: b, above 0 and below 1.
      temperature: T, above 0.

    Returns:
      The loss.

    References:
      Agarwal et al., On-policy distillation of language models: learning from self-generated mistakes, 2023.
    """
    way_out = "for the limits use kd (towards 0) or reverse_kl (towards 1)"
    _check("beta", beta, lambda b: 0 < b < 1, "above 0 and below 1", way_out)
    _check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q, log_p = _log_softmaxes(logits, batch, temperature)
        log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
        return _mean(beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m), batch.weight)

    return loss


def mix(*weighted: tuple[Scalar, Loss]) -> Loss:
    """A weighted sum of losses: sum_j w_j loss_j.

    Args:
      *weighted: at least one pair (w_j, loss_j), w_j at least 0.

    Returns:
      The loss.

    References:
      Hinton et al., Distilling the knowledge in a neural network, 2015, section 2 (cross_entropy and kd).
    """
    if not weighted:
        raise ValueError("mix needs at least one pair (weight, loss); got none: try mix((1.0, kd()))")
    for position, (factor, _) in enumerate(weighted):
        _check_factor(f"weight {position} of mix", factor)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        first, *rest = (factor * part(logits, batch) for factor, part in weighted)
        return sum(rest, start=first)

    return loss


LOSSES: dict[str, Callable[..., Loss]] = {
    "kd": kd,
    "ce": cross_entropy,
    "mse": logit_mse,
    "dkd": dkd,
    "dist": dist,
    "nkd": nkd,
    "standardized_kd": standardized_kd,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


def balanced(loss: Loss, *, power: float = 1.0) -> Loss:
    """The loss with every class of the batch weighed alike: an example's weight is divided by that of its class in the batch.

    In expectation that is re-weighting by the inverse of the classes' shares, with no need to know them. Examples without a
    label keep their weight. Less than all of it leaves more to the common classes, and to calibration, which suffers where
    rare ones are foretold too often.

    Args:
      loss: any of these.
      power: of the class's weight; 1 balances wholly, 1/2 half way, 0 not.

    Returns:
      The loss.

    References:
      King and Zeng, Logistic regression in rare events data, 2001, section 4.2 (weighting by class).
    """

    def by_class(logits: jax.Array, batch: Batch) -> jax.Array:
        same = (batch.targets[:, None] == batch.targets) & (batch.targets >= 0)
        of_class = (same * batch.weight).sum(-1)
        share = jnp.where(of_class > 0, batch.weight / jnp.where(of_class > 0, of_class, 1.0) ** power, 0.0)
        return loss(logits, batch._replace(weight=jnp.where(batch.targets >= 0, share, batch.weight)))

    return by_class


def negated(objective: Objective) -> Loss:
    """The loss that falls as a score per example rises: its negated mean over labelled examples, in the score's units.

    Args:
      objective: one of `objectives.py` or `goals.py` that has a gradient, such as `goals.brier`.
    """

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        return -_mean(objective(logits, batch), _labelled_weight(batch))

    return loss


def taught_by(loss: Loss, feature: str, *, share: float = 1.0) -> Loss:
    """The loss under another teacher, whose logits come as a feature: z = (1 - share) z_teacher + share z_feature.

    Args:
      loss: any of these.
      feature: its name in `Batch.teacher`, [B, K].
      share: 1 for the other teacher alone, 1/2 for the ensemble of both.
    """

    def of_other(logits: jax.Array, batch: Batch) -> jax.Array:
        said = (1 - share) * batch.teacher["logits"] + share * batch.teacher[feature]
        return loss(logits, batch._replace(teacher={**batch.teacher, "logits": said}))

    return of_other


def _check(name: str, value: Any, holds: Callable[[Any], Any], rule: str, way_out: str) -> None:
    if isinstance(value, jax.core.Tracer):  # not known yet
        return
    if not holds(np.asarray(value)):  # to compare an array of JAX would be traced wherever something else is
        raise ValueError(f"{name} must be {rule}; got {value}: {way_out}")


def _check_temperature(name: str, value: Any) -> None:
    _check(name, value, lambda v: 0 < v < math.inf, "finite and above 0", "1 is the plain softmax, 2 to 8 are softer")


def _check_factor(name: str, value: Any) -> None:
    _check(name, value, lambda v: 0 <= v < math.inf, "finite and at least 0", "0 turns the term off")


def _mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted mean over the last axis; 0 where the weights sum to 0."""
    total = weight.sum()
    return (weight * values).sum(-1) / jnp.where(total > 0, total, 1.0)


def _labelled_weight(batch: Batch) -> jax.Array:
    return jnp.where(batch.targets >= 0, batch.weight, 0.0)


def _log_softmaxes(logits: jax.Array, batch: Batch, temperature: Scalar) -> tuple[jax.Array, jax.Array]:
    """The logarithms of q and p, [B, K] each."""
    return jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(batch.teacher["logits"] / temperature)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis. A log-probability of finite logits is finite, so p = 0 meets no 0 * inf."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def _target(values: jax.Array, labels: jax.Array) -> jax.Array:
    """The label's column, [B]; the first column stands in where there is no label."""
    return jnp.take_along_axis(values, jnp.maximum(labels, 0)[:, None], -1)[:, 0]


def _others(values: jax.Array, labels: jax.Array) -> jax.Array:
    """The columns that are not the label's, [B, K - 1], in cyclic order from the label on."""
    classes = values.shape[-1]
    return jnp.take_along_axis(values, (labels[:, None] + jnp.arange(1, classes)) % classes, -1)


def _log_others(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The log-softmax over the classes that are not the label, [B, K - 1]."""
    return jax.nn.log_softmax(_others(logits, labels))


def _log_target_or_not(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The log-probabilities [B, 2] of the label and of all other classes together, exact where either is near 1."""
    others = jax.nn.logsumexp(_others(logits, labels), axis=-1)
    return jax.nn.log_softmax(jnp.stack([_target(logits, labels), others], -1))


def _standardize(values: jax.Array, weight: jax.Array, *, floor: float) -> jax.Array:
    """The z-scores over the last axis under its weights, by the population std."""
    values = values - jax.lax.stop_gradient(values.max(-1, keepdims=True))  # makes what is constant exactly 0
    values = values - _mean(values, weight)[..., None]
    variance = _mean(jnp.square(values), weight)[..., None]
    return values / jnp.sqrt(jnp.maximum(variance, floor**2))


def _correlation(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
    """Pearson's correlation over the last axis under its weights; 0 where either is constant."""
    z_a, z_b = (_standardize(x, weight, floor=_PROBABILITY_FLOOR) for x in (a, b))
    return _mean(z_a * z_b, weight)
