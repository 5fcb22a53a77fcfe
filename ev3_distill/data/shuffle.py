"""The order in which the rows of a split are visited: random reshuffling as a pure function of seed and step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.data.splits import generator
from ev3_distill.errors import InputError

ORDER_STREAM = 1  # of the seed's random streams, see splits


class Order(NamedTuple):
    """In which the rows of a split are visited: data, so that one compiled program serves every seed."""

    base: jax.Array  # [n] int32, a random permutation
    multipliers: jax.Array  # [M] uint32, coprime to n
    salt: jax.Array  # uint32


def order(n: int, seed: int) -> Order:
    """Random reshuffling as a function of the step alone: no iterator, so a resume needs only the step. See `rows`.

    Args:
      n: rows, from 1 to 2**31 - 1.
      seed: of the order.
    """
    if not 1 <= n < 2**31:
        raise InputError(f"an order needs 1 to 2^31 - 1 rows; got {n}: give the explore split more or less")
    rng = generator(seed, ORDER_STREAM)
    return Order(
        base=jnp.asarray(rng.permutation(n), jnp.int32),
        multipliers=jnp.asarray(_multipliers(n, rng), jnp.uint32),
        salt=jnp.asarray(rng.integers(2**32, dtype=np.uint32)),
    )


def rows(order: Order, step: jax.Array, *, batch_size: int) -> jax.Array:
    """The rows of a step's batch, [batch_size] int32; may be called under jit.

    Epoch e visits base[(a_e * j + b_e) mod n] at j = 0, 1, ..., where base is one random permutation, a_e one of up to
    64 multipliers coprime to n and b_e a hash of e. Each row comes at most once in an epoch of n // batch_size batches,
    every epoch groups and leaves out others, and a batch costs a few integer operations and one gather.

    Args:
      order: of n rows.
      step: global step, int32, not negative.
      batch_size: where it exceeds n, batches go round the rows again.
    """
    n = order.base.shape[0]
    epoch, batch = jnp.divmod(jnp.asarray(step).astype(jnp.uint32), np.uint32(steps_per_epoch(n, batch_size)))
    j = (batch * np.uint32(batch_size) + jnp.arange(batch_size, dtype=jnp.uint32)) % np.uint32(n)
    a = order.multipliers[epoch % np.uint32(order.multipliers.shape[0])]  # a cycle: neighbouring epochs never share one
    b = _hash(epoch ^ order.salt) % np.uint32(n)
    return order.base[(a * j + b) % np.uint32(n)]


def epoch_of(order: Order, step: jax.Array, *, batch_size: int) -> jax.Array:
    """The epoch of a step, uint32 from 0."""
    return jnp.asarray(step).astype(jnp.uint32) // np.uint32(steps_per_epoch(order.base.shape[0], batch_size))


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in which each of n rows comes at most once."""
    return max(n // batch_size, 1)


def _multipliers(n: int, rng: np.random.Generator) -> np.ndarray:
    """Up to 64 numbers a coprime to n, with a * (n - 1) + (n - 1) < 2**32.

    None is above n / 2, because n - a walks the same cycle backwards and groups the same neighbours.
    """
    candidates = np.arange(1, max(min(n // 2 + 1, 2**32 // n), 2))
    return rng.permutation(candidates[np.gcd(candidates, n) == 1])[:64]


def _hash(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, a bijection of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
