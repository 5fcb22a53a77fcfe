"""Terms of distillation losses: checks of hyperparameters, weighted means, divergences and correlations.

Shapes: logits [B, K], labels [B] with -1 for none, weights [B].
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.types import Batch

Scalar = float | jax.Array  # a hyperparameter; an array where it is differentiated

# A standard deviation below its floor counts as the floor. Where nothing varies, correlation and z-score are therefore 0, and
# no gradient exceeds 1 / floor. Float32 rounds probabilities to about 1e-7, and logits of common size to about 1e-6.
PROBABILITY_FLOOR = 1e-6
LOGIT_FLOOR = 1e-3


def check(name: str, value: Any, holds: Callable[[Any], Any], rule: str, way_out: str) -> None:
    """Raises ValueError unless a hyperparameter follows the rule; one that JAX traces is not checked."""
    if isinstance(value, jax.core.Tracer):  # its value is unknown
        return
    if not holds(np.asarray(value)):  # numpy, because comparing a jax.Array inside a trace would be traced, too
        raise ValueError(f"{name} must be {rule}; got {value}: {way_out}")


def check_temperature(name: str, value: Any) -> None:
    """Raises ValueError unless a temperature is finite and above 0."""
    check(name, value, lambda v: 0 < v < math.inf, "finite and above 0", "1 is the plain softmax, 2 to 8 are softer")


def check_factor(name: str, value: Any) -> None:
    """Raises ValueError unless a weight is finite and at least 0."""
    check(name, value, lambda v: 0 <= v < math.inf, "finite and at least 0", "0 turns the term off")


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted mean over the last axis; 0 where the weights sum to 0."""
    total = weight.sum()
    return (weight * values).sum(-1) / jnp.where(total > 0, total, 1.0)


def labeled_weight(batch: Batch) -> jax.Array:
    """The weights, 0 for examples without a label."""
    return jnp.where(batch.targets >= 0, batch.weight, 0.0)


def log_softmaxes(logits: jax.Array, batch: Batch, temperature: Scalar) -> tuple[jax.Array, jax.Array]:
    """log q and log p, [B, K] each: the log-softmax of student and teacher at a temperature."""
    return jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(batch.teacher["logits"] / temperature)


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis. Log-probabilities of finite logits are finite, so p = 0 never gives 0 * inf."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def at_target(values: jax.Array, labels: jax.Array) -> jax.Array:
    """The label's column, [B]; the first column where there is no label."""
    return jnp.take_along_axis(values, jnp.maximum(labels, 0)[:, None], -1)[:, 0]


def _others(values: jax.Array, labels: jax.Array) -> jax.Array:
    """All columns but the label's, [B, K - 1], in cyclic order from the label on."""
    classes = values.shape[-1]
    return jnp.take_along_axis(values, (labels[:, None] + jnp.arange(1, classes)) % classes, -1)


def log_others(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The log-softmax over all classes but the label, [B, K - 1]."""
    return jax.nn.log_softmax(_others(logits, labels))


def log_target_or_not(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Log-probabilities [B, 2] of the label and of all other classes together, accurate where either is near 1."""
    others = jax.nn.logsumexp(_others(logits, labels), axis=-1)
    return jax.nn.log_softmax(jnp.stack([at_target(logits, labels), others], -1))


def standardize(values: jax.Array, weight: jax.Array, *, floor: float) -> jax.Array:
    """Weighted z-scores over the last axis, by the population standard deviation."""
    values = values - jax.lax.stop_gradient(values.max(-1, keepdims=True))  # constant values become exactly 0
    values = values - weighted_mean(values, weight)[..., None]
    variance = weighted_mean(jnp.square(values), weight)[..., None]
    return values / jnp.sqrt(jnp.maximum(variance, floor**2))


def correlation(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted Pearson correlation over the last axis; 0 where either is constant."""
    z_a, z_b = (standardize(x, weight, floor=PROBABILITY_FLOOR) for x in (a, b))
    return weighted_mean(z_a * z_b, weight)
