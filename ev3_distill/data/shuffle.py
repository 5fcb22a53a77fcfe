"""Stateless shuffling: the order in which the rows of a split are visited, a pure function of seed and step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.data.splits import generator
from ev3_distill.errors import InputError

ORDER_STREAM = 1  # random stream of the seed, see splits.generator


class Order(NamedTuple):
    """The order in which rows are visited, as arrays, so that one compiled program serves every seed."""

    base: jax.Array  # [n] int32, a random permutation
    multipliers: jax.Array  # [M] uint32, coprime to n
    salt: jax.Array  # uint32


def make_order(n: int, seed: int) -> Order:
    """Draws the order of n rows. It needs no iterator: to resume, a run needs only the step, see `batch_rows`.

    Args:
      n: number of rows, from 1 to 2**31 - 1.
      seed: of the order.

    Raises:
      InputError: n is out of range.
    """
    if not 1 <= n < 2**31:
        raise InputError(
            f"a shuffled split needs 1 to 2^31 - 1 rows; got {n}: make the explore split larger or smaller"
        )
    rng = generator(seed, ORDER_STREAM)
    return Order(
        base=jax.device_put(rng.permutation(n).astype(np.int32)),
        multipliers=jax.device_put(np.asarray(_multipliers(n, rng), np.uint32)),
        salt=jax.device_put(rng.integers(2**32, dtype=np.uint32)),
    )


def batch_rows(order: Order, step: jax.Array, *, batch_size: int) -> jax.Array:
    """The rows of the batch of a step, [batch_size] int32. Works under jit.

    Epoch e visits base[(a_e * j + b_e) mod n] at j = 0, 1, ..., where base is one random permutation, a_e one of up to
    64 multipliers coprime to n and b_e a hash of e. Each row occurs at most once in an epoch of n // batch_size batches.
    Every epoch groups rows differently and leaves out others. A batch costs a few integer operations and one gather.

    Args:
      order: of n rows.
      step: global step, int32, not negative.
      batch_size: if it exceeds n, a batch repeats rows.
    """
    n = order.base.shape[0]
    epoch, batch = jnp.divmod(jnp.asarray(step).astype(jnp.uint32), np.uint32(steps_per_epoch(n, batch_size)))
    j = (batch * np.uint32(batch_size) + jnp.arange(batch_size, dtype=jnp.uint32)) % np.uint32(n)
    a = order.multipliers[epoch % np.uint32(order.multipliers.shape[0])]  # cyclic: consecutive epochs never share one
    b = _hash(epoch ^ order.salt) % np.uint32(n)
    return order.base[(a * j + b) % np.uint32(n)]


def epoch_of(order: Order, step: jax.Array, *, batch_size: int) -> jax.Array:
    """The epoch of a step, uint32 from 0."""
    return jnp.asarray(step).astype(jnp.uint32) // np.uint32(steps_per_epoch(order.base.shape[0], batch_size))


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Number of batches in which each of n rows occurs at most once."""
    return max(n // batch_size, 1)


def _multipliers(n: int, rng: np.random.Generator) -> np.ndarray:
    """Up to 64 numbers a coprime to n, with a * (n - 1) + (n - 1) < 2**32.

    None is above n / 2, because n - a visits the same cycle backwards and groups the same neighbors.
    """
    candidates = np.arange(1, max(min(n // 2 + 1, 2**32 // n), 2))
    return rng.permutation(candidates[np.gcd(candidates, n) == 1])[:64]


def _hash(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, a bijection of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
