"""Distillation losses on logits: factories that return `(student logits [B, K], batch) -> scalar`, one formula each.

Logits are finite float32 and K is at least 2; a loss is in nats unless its docstring says otherwise. Over examples every loss
is the mean weighted by `batch.weight`, and 0 where the weights sum to 0. Losses that need the label (cross_entropy, dkd, nkd)
leave examples with label -1 out of that mean. Nothing here stops gradients: the teacher's logits are data. Hyperparameters are
checked when the factory is called, except where JAX traces them (hypergradients).

In the formulas s and t are the logits of student and teacher, y the label, q and p the softmax of s / T and t / T.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ev3_distill.tasks.classification.loss_combinators import balanced, mix, negated, taught_by
from ev3_distill.tasks.classification.loss_terms import (
    LOGIT_FLOOR,
    Scalar,
    at_target,
    check,
    check_factor,
    check_temperature,
    correlation,
    kl,
    labeled_weight,
    log_others,
    log_softmaxes,
    log_target_or_not,
    standardize,
    weighted_mean,
)
from ev3_distill.types import Batch, Loss

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
    "taught_by",
    "trusted_kd",
]


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
    check("label_smoothing", label_smoothing, lambda a: 0 <= a < 1, "at least 0 and below 1", "0 turns it off")

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q = jax.nn.log_softmax(logits)
        hard, uniform = at_target(log_q, batch.targets), log_q.mean(-1)
        return weighted_mean(-(1 - label_smoothing) * hard - label_smoothing * uniform, labeled_weight(batch))

    return loss


def kd(*, temperature: Scalar = 4.0) -> Loss:
    """Knowledge distillation: T^2 KL(p || q).

    T^2 keeps the gradient's scale as T grows; it then tends to (s - t) / K on centered logits, half that of logit_mse.

    Args:
      temperature: T, above 0.

    Returns:
      The loss.

    References:
      Hinton et al., Distilling the knowledge in a neural network, 2015, section 2.
    """
    check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q, log_p = log_softmaxes(logits, batch, temperature)
        return temperature**2 * weighted_mean(kl(log_p, log_q), batch.weight)

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
        return weighted_mean(jnp.square(logits - batch.teacher["logits"]).mean(-1), batch.weight)

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
    check_factor("alpha", alpha)
    check_factor("beta", beta)
    check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        s, t = logits / temperature, batch.teacher["logits"] / temperature
        target = kl(log_target_or_not(t, batch.targets), log_target_or_not(s, batch.targets))
        others = kl(log_others(t, batch.targets), log_others(s, batch.targets))
        return temperature**2 * weighted_mean(alpha * target + beta * others, labeled_weight(batch))

    return loss


def dist(*, beta: Scalar = 1.0, gamma: Scalar = 1.0, temperature: Scalar = 1.0) -> Loss:
    """DIST: T^2 (beta (1 - mean_i r(q_i., p_i.)) + gamma (1 - mean_k r(q_.k, p_.k))), r Pearson's correlation.

    The first term (inter-class) correlates classes within each example, the second (intra-class) examples within each
    class; the second weights examples within its means, variances and covariance. Where teacher or student is constant,
    r is 0, so the smallest value, at q = p, is above 0; with one example the second term is constant. Correlations have no
    unit.

    Args:
      beta: weight of the inter-class term, at least 0.
      gamma: weight of the intra-class term, at least 0.
      temperature: T, above 0.

    Returns:
      The loss.

    References:
      Huang et al., Knowledge distillation from a stronger teacher, 2022; T^2 as in the authors' code.
    """
    check_factor("beta", beta)
    check_factor("gamma", gamma)
    check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        q, p = (jnp.exp(log) for log in log_softmaxes(logits, batch, temperature))
        inter = weighted_mean(1 - correlation(q, p, jnp.ones(q.shape[-1])), batch.weight)
        intra = 1 - correlation(q.T, p.T, batch.weight).mean()
        intra = jnp.where(batch.weight.sum() > 0, intra, 0.0)
        return temperature**2 * (beta * inter + gamma * intra)

    return loss


def nkd(*, gamma: Scalar = 1.5, temperature: Scalar = 1.0) -> Loss:
    """Normalized distillation: -p_y log q_y at T = 1, plus gamma T^2 (-sum_{k != y} p^_k log q^_k) at T.

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
    check_factor("gamma", gamma)
    check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q, log_p = log_softmaxes(logits, batch, 1.0)
        target = -jnp.exp(at_target(log_p, batch.targets)) * at_target(log_q, batch.targets)
        log_q_hat = log_others(logits / temperature, batch.targets)
        log_p_hat = log_others(batch.teacher["logits"] / temperature, batch.targets)
        others = -(jnp.exp(log_p_hat) * log_q_hat).sum(-1)
        return weighted_mean(target + gamma * temperature**2 * others, labeled_weight(batch))

    return loss


def standardized_kd(*, base: Scalar = 2.0) -> Loss:
    """Distillation of standardized logits: b^2 KL(softmax(z(t) / b) || softmax(z(s) / b)).

    z(x) = (x - mean x) / std x over the classes of one example, with the population standard deviation, but at least 1e-3.
    It is invariant to positive affine maps of either's logits, so the student's scale is free.

    Args:
      base: b, the temperature relative to each example's std, above 0.

    Returns:
      The loss.

    References:
      Sun et al., Logit standardization in knowledge distillation, 2024.
    """
    check_temperature("base", base)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        classes = jnp.ones(logits.shape[-1])
        z_s = standardize(logits, classes, floor=LOGIT_FLOOR)
        z_t = standardize(batch.teacher["logits"], classes, floor=LOGIT_FLOOR)
        return base**2 * weighted_mean(kl(jax.nn.log_softmax(z_t / base), jax.nn.log_softmax(z_s / base)), batch.weight)

    return loss


def trusted_kd(*, temperature: Scalar = 4.0, label_smoothing: Scalar = 0.0) -> Loss:
    """Distillation where the teacher agrees with the label, else the label: w T^2 KL(p || q) - (1 - w) log q_y.

    w is the teacher's probability of the label at T = 1; 1 for an example without a label. The second term is at T = 1.

    Args:
      temperature: T, positive.
      label_smoothing: of the second term, in [0, 1); see `cross_entropy`.

    Returns:
      The loss.
    """
    check_temperature("temperature", temperature)
    check("label_smoothing", label_smoothing, lambda a: 0 <= a < 1, "at least 0 and below 1", "0 turns it off")

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q, log_p = log_softmaxes(logits, batch, temperature)
        labeled = batch.targets >= 0
        trust = jnp.where(labeled, at_target(jax.nn.softmax(batch.teacher["logits"]), batch.targets), 1.0)
        log_student = jax.nn.log_softmax(logits)
        hard = (1 - label_smoothing) * at_target(log_student, batch.targets) + label_smoothing * log_student.mean(-1)
        return weighted_mean(trust * temperature**2 * kl(log_p, log_q) - (1 - trust) * hard, batch.weight)

    return loss


def reverse_kl(*, temperature: Scalar = 1.0) -> Loss:
    """Reverse divergence, which seeks the teacher's modes: KL(q || p), without the factor T^2 of kd.

    Args:
      temperature: T, above 0.

    Returns:
      The loss.

    References:
      Gu et al., MiniLLM: knowledge distillation of large language models, 2023.
    """
    check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q, log_p = log_softmaxes(logits, batch, temperature)
        return weighted_mean(kl(log_q, log_p), batch.weight)

    return loss


def jsd(*, beta: Scalar = 0.5, temperature: Scalar = 1.0) -> Loss:
    """Generalized Jensen-Shannon divergence: b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, without T^2.

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
    check("beta", beta, lambda b: 0 < b < 1, "above 0 and below 1", way_out)
    check_temperature("temperature", temperature)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        log_q, log_p = log_softmaxes(logits, batch, temperature)
        log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
        return weighted_mean(beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m), batch.weight)

    return loss


LOSSES: dict[str, Callable[..., Loss]] = {
    "kd": kd,
    "ce": cross_entropy,
    "mse": logit_mse,
    "dkd": dkd,
    "dist": dist,
    "nkd": nkd,
    "standardized_kd": standardized_kd,
    "trusted_kd": trusted_kd,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}
