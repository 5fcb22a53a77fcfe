"""Gradient estimates of unrolled computations with noise reuse."""

import jax
import jax.numpy as jnp
import numpy as np
from toy_landscapes import KEY

from ev3_distill.evolution import UnrollConfig, noise_reuse


def test_noise_reuse_is_unbiased_over_an_episode():
    """x_t = 0.9 x_(t-1) + theta, loss x_t^2 / 2 over 8 steps: quadratic in theta, so smoothing changes no gradient."""
    horizon, window, theta = 8, 2, {"theta": jnp.array([0.4, -0.2])}

    def advance(params, x, t):
        x = 0.9 * x + params["theta"]
        return x, 0.5 * (x * x).sum()

    def mean_loss(params):
        x, total = jnp.ones(2), 0.0
        for t in range(horizon):
            x, loss = advance(params, x, t)
            total += loss
        return total / horizon

    pairs = 4000
    config = UnrollConfig(pairs=pairs, sigma=0.1, horizon=horizon, window=window)
    estimator = noise_reuse(lambda key: jnp.ones(2), advance, config)
    state = jax.jit(estimator.init)(KEY, theta)
    estimates = []
    run = jax.jit(estimator.estimate)
    for _ in range(4):  # constant theta, so average over a whole episode
        gradient, state, _ = run(KEY, theta, state)
        estimates.append(gradient["theta"])
    assert sorted(np.unique(state.step)) == [0, 2, 4, 6] and (state.episode >= 1).all()
    expected = jax.grad(mean_loss)(theta)["theta"]
    np.testing.assert_allclose(np.mean(estimates, axis=0), expected, atol=0.1 * float(jnp.abs(expected).max()))
