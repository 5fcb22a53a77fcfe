"""A distillation loss with tunable hyperparameters: temperature, mix of terms, weights of examples, noise on inputs.

References:
  Hinton et al., Distilling the knowledge in a neural network, 2015, section 2.
  Ren et al., Learning to reweight examples for robust deep learning, 2018 (a weight for each example).
  Shu et al., Meta-Weight-Net: Learning an explicit mapping for sample weighting, 2019 (a network from loss to weight).
  Bishop, Training with noise is equivalent to Tikhonov regularization, Neural Computation 7(1), 1995 (noise on inputs).
  Kingma and Welling, Auto-encoding variational Bayes, 2014, section 2.4 (the reparametrization that gives noise a slope).
"""

import jax
import jax.numpy as jnp

from ev3_distill.tasks.classification import losses
from ev3_distill.types import Batch, Loss, PyTree


def distillation(hyper: PyTree) -> Loss:
    """mix_0 kd(T) + mix_1 ce over weighted examples, for `hyper` with "temperature", "mix" [2] and optionally "weights".

    Args:
      hyper: in range. "weights" of the batch's examples multiply `batch.weight`: [B] in both terms, or [B, 2] with a column for
        each term. They are relative, because each term is a weighted mean.
    """
    terms = losses.kd(temperature=hyper["temperature"]), losses.cross_entropy()

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        weights = hyper.get("weights", jnp.ones_like(batch.weight))
        columns = weights.T if weights.ndim == 2 else (weights, weights)
        teacher_batch, label_batch = (batch._replace(weight=batch.weight * column) for column in columns)
        return hyper["mix"][0] * terms[0](logits, teacher_batch) + hyper["mix"][1] * terms[1](logits, label_batch)

    return loss


def table_weights(table: jax.Array, batch: Batch) -> jax.Array:
    """Weights [B] of a batch's examples: entries of a table [N] of positive numbers at `batch.index`."""
    return table[batch.index]


def weight_net(key: jax.Array, *, inputs: int = 1, outputs: int = 1, hidden: int = 100) -> PyTree:
    """Parameters of a network from an example's features, such as its loss, to weights; all weights start at 1/2."""
    return {
        "w1": jax.random.normal(key, (inputs, hidden)) / inputs**0.5, "b1": jnp.zeros(hidden),
        "w2": jnp.zeros((hidden, outputs)), "b2": jnp.zeros(outputs),
    }  # fmt: skip


def net_weights(net: PyTree, features: jax.Array) -> jax.Array:
    """Weights [B, O] in (0, 1) from nonnegative features [B, I], through which no gradient flows.

    The network sees log(1 + feature), so that a few extreme values do not saturate it.
    """
    values = jnp.log1p(jax.lax.stop_gradient(features))
    return jax.nn.sigmoid(jax.nn.relu(values @ net["w1"] + net["b1"]) @ net["w2"] + net["b2"])


def label_losses(logits: jax.Array, batch: Batch) -> jax.Array:
    """Features for `net_weights`: cross-entropy of student and teacher by the example's label, [B, 2]; 0 without a label."""

    def by_label(logits: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(batch.targets, 0)[:, None], -1)[:, 0]
        return jnp.where(batch.targets >= 0, -picked, 0.0)

    return jnp.stack([by_label(logits), by_label(batch.teacher["logits"])], 1)


def add_noise(inputs: jax.Array, strength: jax.Array | float, key: jax.Array) -> jax.Array:
    """x + s std(x) e for inputs [B, ...] with e ~ N(0, 1); for a fixed key, a function of s with slope std(x) e.

    Args:
      inputs: x, floating, or uint8, which counts as x / 255, as in networks.
      strength: s, above 0.
      key: of e, a new one for each step.

    Returns:
      [B, ...] floating. std(x) is one number, over the whole batch.

    References:
      Bishop 1995: for small s, equivalent to a penalty on the student's squared slope, of weight (s std(x))^2 / 2.
    """
    x = inputs.astype(jnp.float32) / 255 if inputs.dtype == jnp.uint8 else inputs
    return x + (strength * jax.lax.stop_gradient(x.std()) * jax.random.normal(key, x.shape, x.dtype)).astype(x.dtype)
