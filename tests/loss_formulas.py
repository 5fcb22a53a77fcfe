"""Losses as their papers have them, in float64, and batches on which ours are run."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.tasks.classification.losses import LOSSES
from ev3_distill.types import Batch

B, K = 6, 5


SETTINGS = {
    "kd": [{"temperature": 4.0}, {"temperature": 1.0}],
    "ce": [{"label_smoothing": 0.0}, {"label_smoothing": 0.3}],
    "mse": [{}],
    "dkd": [{"alpha": 1.0, "beta": 8.0, "temperature": 4.0}, {"alpha": 0.5, "beta": 2.0, "temperature": 1.5}],
    "dist": [{"beta": 1.0, "gamma": 1.0, "temperature": 1.0}, {"beta": 0.5, "gamma": 2.0, "temperature": 3.0}],
    "nkd": [{"gamma": 1.5, "temperature": 1.0}, {"gamma": 0.7, "temperature": 2.0}],
    "standardized_kd": [{"base": 2.0}, {"base": 0.7}],
    "trusted_kd": [{"temperature": 4.0, "label_smoothing": 0.0}, {"temperature": 1.5, "label_smoothing": 0.2}],
    "reverse_kl": [{"temperature": 1.0}, {"temperature": 2.5}],
    "jsd": [{"beta": 0.5, "temperature": 1.0}, {"beta": 0.2, "temperature": 2.0}],
}


def make_batch(teacher, labels=None, weight=None):
    teacher = jnp.asarray(teacher, jnp.float32)
    n = len(teacher)
    labels = jnp.zeros(n, jnp.int32) if labels is None else jnp.asarray(labels, jnp.int32)
    weight = jnp.ones(n) if weight is None else jnp.asarray(weight, jnp.float32)
    return Batch(jnp.zeros((n, 1)), labels, {"logits": teacher}, jnp.arange(n, dtype=jnp.int32), weight)


def draw(seed=0):
    """A student, a teacher, labels of which one is missing, and uneven weights of which one is 0."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 2, (2, B, K)).astype(np.float32)
    labels = rng.integers(0, K, B)
    labels[2] = -1
    weight = rng.uniform(0.2, 3, B).astype(np.float32)
    weight[4] = 0
    return student, teacher, labels, weight


@functools.cache
def _jitted(name):  # traced hyperparameters, so that all settings share a compilation
    return jax.jit(lambda kwargs, student, batch: jax.value_and_grad(LOSSES[name](**kwargs))(student, batch))


def run(name, kwargs, student, batch):
    """Value and gradient; a hyperparameter not given is that of the first settings, which are the defaults."""
    kwargs = {**SETTINGS[name][0], **kwargs}
    value, gradient = _jitted(name)(kwargs, jnp.asarray(student, jnp.float32), batch)
    return float(value), np.asarray(gradient)


@jax.jit
def all_losses(student, batch):
    return {name: jax.value_and_grad(factory())(student, batch) for name, factory in LOSSES.items()}


# The papers' formulas, in float64, example by example and class by class.


def softmax(row, temperature=1.0):
    exps = [math.exp(float(x) / temperature) for x in row]
    return [e / sum(exps) for e in exps]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def weighted_mean(pairs):
    pairs = list(pairs)
    return sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)


def without(row, y):
    return [x for k, x in enumerate(row) if k != y]


def pearson(a, b, w):
    mean_a, mean_b = (sum(wi * x for wi, x in zip(w, v, strict=True)) / sum(w) for v in (a, b))
    cov = sum(wi * (x - mean_a) * (y - mean_b) for wi, x, y in zip(w, a, b, strict=True))
    var_a = sum(wi * (x - mean_a) ** 2 for wi, x in zip(w, a, strict=True))
    var_b = sum(wi * (y - mean_b) ** 2 for wi, y in zip(w, b, strict=True))
    return cov / math.sqrt(var_a * var_b)


def ref_kd(s, t, y, w, *, temperature):
    tau = temperature
    return weighted_mean((w[i], tau**2 * kl(softmax(t[i], tau), softmax(s[i], tau))) for i in range(len(s)))


def ref_ce(s, t, y, w, *, label_smoothing):
    pairs = []
    for i in range(len(s)):
        if y[i] >= 0:
            q, total = softmax(s[i]), 0.0
            for k in range(len(q)):
                wanted = (1 - label_smoothing) * (k == y[i]) + label_smoothing / len(q)
                total -= wanted * math.log(q[k])
            pairs.append((w[i], total))
    return weighted_mean(pairs)


def ref_mse(s, t, y, w):
    pairs = []
    for i in range(len(s)):
        pairs.append((w[i], sum((float(a) - float(b)) ** 2 for a, b in zip(s[i], t[i], strict=True)) / len(s[i])))
    return weighted_mean(pairs)


def ref_dkd(s, t, y, w, *, alpha, beta, temperature):
    pairs = []
    for i in range(len(s)):
        if y[i] >= 0:
            p, q = softmax(t[i], temperature), softmax(s[i], temperature)
            py, qy = p[y[i]], q[y[i]]
            tckd = kl([py, 1 - py], [qy, 1 - qy])
            nckd = kl([x / (1 - py) for x in without(p, y[i])], [x / (1 - qy) for x in without(q, y[i])])
            pairs.append((w[i], temperature**2 * (alpha * tckd + beta * nckd)))
    return weighted_mean(pairs)


def ref_dist(s, t, y, w, *, beta, gamma, temperature):
    q, p = [softmax(row, temperature) for row in s], [softmax(row, temperature) for row in t]
    n, classes = len(q), len(q[0])
    inter = weighted_mean((w[i], 1 - pearson(q[i], p[i], [1.0] * classes)) for i in range(n))
    r = [pearson([q[i][k] for i in range(n)], [p[i][k] for i in range(n)], w) for k in range(classes)]
    return temperature**2 * (beta * inter + gamma * (1 - sum(r) / classes))


def ref_nkd(s, t, y, w, *, gamma, temperature):
    pairs = []
    for i in range(len(s)):
        if y[i] >= 0:
            target = -softmax(t[i])[y[i]] * math.log(softmax(s[i])[y[i]])
            p, q = softmax(t[i], temperature), softmax(s[i], temperature)
            others = 0.0
            for k in range(len(p)):
                if k != y[i]:
                    others -= p[k] / (1 - p[y[i]]) * math.log(q[k] / (1 - q[y[i]]))
            pairs.append((w[i], target + gamma * temperature**2 * others))
    return weighted_mean(pairs)


def ref_standardized_kd(s, t, y, w, *, base):
    def z(row):
        mean = sum(map(float, row)) / len(row)
        std = math.sqrt(sum((float(x) - mean) ** 2 for x in row) / len(row))
        return [(float(x) - mean) / std for x in row]

    return weighted_mean((w[i], base**2 * kl(softmax(z(t[i]), base), softmax(z(s[i]), base))) for i in range(len(s)))


def ref_trusted_kd(s, t, y, w, *, temperature, label_smoothing):
    pairs = []
    for i in range(len(s)):
        trust, by_label = 1.0, 0.0
        if y[i] >= 0:
            trust = softmax(t[i])[y[i]]
            by_label = ref_ce(s[i : i + 1], None, y[i : i + 1], [1.0], label_smoothing=label_smoothing)
        by_teacher = temperature**2 * kl(softmax(t[i], temperature), softmax(s[i], temperature))
        pairs.append((w[i], trust * by_teacher + (1 - trust) * by_label))
    return weighted_mean(pairs)


def ref_reverse_kl(s, t, y, w, *, temperature):
    return weighted_mean((w[i], kl(softmax(s[i], temperature), softmax(t[i], temperature))) for i in range(len(s)))


def ref_jsd(s, t, y, w, *, beta, temperature):
    pairs = []
    for i in range(len(s)):
        p, q = softmax(t[i], temperature), softmax(s[i], temperature)
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        pairs.append((w[i], beta * kl(p, m) + (1 - beta) * kl(q, m)))
    return weighted_mean(pairs)


REFERENCES = {
    "kd": ref_kd,
    "ce": ref_ce,
    "mse": ref_mse,
    "dkd": ref_dkd,
    "dist": ref_dist,
    "nkd": ref_nkd,
    "standardized_kd": ref_standardized_kd,
    "trusted_kd": ref_trusted_kd,
    "reverse_kl": ref_reverse_kl,
    "jsd": ref_jsd,
}
