"""Toy fitness functions of six parameters (quadratic and cubic), and random variables for a network."""

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.types import Variables

KEY = jax.random.key(0)
CURVATURES = jnp.array([1.0, 2.0, 3.0, 0.5, 1.5, 4.0])
MEAN = {"w": jnp.array([[1.0, -1.0], [0.5, 2.0]]), "b": jnp.array([0.3, -0.7])}


def quadratic(params, key=None):
    x = jax.flatten_util.ravel_pytree(params)[0]
    return -0.5 * (CURVATURES * x * x).sum() + x.sum()


def cubic(params, key=None):
    return (jax.flatten_util.ravel_pytree(params)[0] ** 3).sum()


def random_variables(network, seed=0):
    """Random variables with the shapes of a network's own, without compiling its initializer."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, KEY)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, jnp.float32), shapes.params)
    return Variables(params, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes.stats))
