"""Losses on features: ours by name, and as their papers have them, in float64."""

import math

import numpy as np

from ev3_distill.tasks.classification.feature_losses import FEATURE_LOSSES, rkd

FORMULAS = {
    "fitnet": FEATURE_LOSSES["fitnet"](),
    "at": FEATURE_LOSSES["at"](),
    "rkd-distance": rkd(distance=1.0, angle=0.0),
    "rkd-angle": rkd(distance=0.0, angle=1.0),
    "rkd": rkd(),
    "sp": FEATURE_LOSSES["sp"](),
}


# The papers' formulas in float64, example by example.


def pooled(image, height, width):
    out = np.zeros((height, width, image.shape[2]))
    for i in range(height):
        for j in range(width):
            rows = range(i * image.shape[0] // height, math.ceil((i + 1) * image.shape[0] / height))
            columns = range(j * image.shape[1] // width, math.ceil((j + 1) * image.shape[1] / width))
            out[i, j] = np.mean([image[r, c] for r in rows for c in columns], axis=0)
    return out


def matched(one, other):
    if one.ndim == 1:
        return one, other
    size = [min(one.shape[axis], other.shape[axis]) for axis in (0, 1)]
    return pooled(one, *size), pooled(other, *size)


def weighted_mean(pairs):
    pairs = list(pairs)
    return sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)


def ref_fitnet(s, t, w, extra):
    pairs = []
    for i in range(len(s)):
        one, other = matched(s[i], t[i])
        error = one @ np.asarray(extra["kernel"], float) + np.asarray(extra["bias"], float) - other
        pairs.append((w[i], (error**2).mean()))
    return weighted_mean(pairs)


def ref_at(s, t, w, extra):
    pairs = []
    for i in range(len(s)):
        one, other = ((x**2).sum(-1).ravel() for x in matched(s[i], t[i]))
        error = one / math.sqrt((one**2).sum()) - other / math.sqrt((other**2).sum())
        pairs.append((w[i], (error**2).mean()))
    return weighted_mean(pairs)


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def distinct(n, count):
    return [index for index in np.ndindex(*[n] * count) if len(set(index)) == count]


def norm(x):
    return math.sqrt((x.ravel() ** 2).sum())


def ref_rkd_distance(s, t, w, extra):
    pairs = distinct(len(s), 2)
    mean_s, mean_t = (weighted_mean((w[i] * w[j], norm(f[i] - f[j])) for i, j in pairs) for f in (s, t))
    return weighted_mean(
        (w[i] * w[j], huber(norm(s[i] - s[j]) / mean_s - norm(t[i] - t[j]) / mean_t)) for i, j in pairs
    )


def ref_rkd_angle(s, t, w, extra):
    def cosine(f, i, j, k):
        one, other = (f[j] - f[i]).ravel(), (f[k] - f[i]).ravel()
        return one @ other / norm(one) / norm(other)

    return weighted_mean(
        (w[i] * w[j] * w[k], huber(cosine(s, i, j, k) - cosine(t, i, j, k))) for i, j, k in distinct(len(s), 3)
    )


def ref_sp(s, t, w, extra):
    b, total = sum(x > 0 for x in w), 0.0
    share = [x * b / sum(w) for x in w]

    def similarities(f):
        g = [[f[i].ravel() @ f[j].ravel() for j in range(len(f))] for i in range(len(f))]
        return [[x / math.sqrt(sum(v * y * y for v, y in zip(share, row, strict=True))) for x in row] for row in g]

    g_s, g_t = similarities(s), similarities(t)
    for i, j in np.ndindex(len(s), len(s)):
        total += share[i] * share[j] * (g_s[i][j] - g_t[i][j]) ** 2
    return total / b**2


REFERENCES = {
    "fitnet": ref_fitnet,
    "at": ref_at,
    "rkd-distance": ref_rkd_distance,
    "rkd-angle": ref_rkd_angle,
    "rkd": lambda *args: 25 * ref_rkd_distance(*args) + 50 * ref_rkd_angle(*args),
    "sp": ref_sp,
}
