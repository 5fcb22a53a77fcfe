"""States of arms and of the clock, for tests of the allocation."""

import jax.numpy as jnp

from ev3_distill.types import ArmsState, Clock


def arms_of(*, value, leader=0, racing=None, raced=0, lag=None):
    """Arms with these values, after the race unless `racing` says which still race."""
    count = len(value)
    racing = jnp.arange(count) == leader if racing is None else jnp.array(racing)
    counts = jnp.zeros(count, jnp.int32)
    return ArmsState(
        states=(),
        value=jnp.array(value, jnp.float32),
        lag=jnp.zeros(count) if lag is None else jnp.array(lag, jnp.float32),
        cost=counts,
        wins=counts,
        promotions=counts,
        leader=jnp.int32(leader),
        racing=racing,
        raced=jnp.int32(raced),
        asked=jnp.int32(-1),
        length=jnp.float32(1),
    )


def clock_of(**fields):
    """A clock at 0, except for these fields."""
    return Clock(**{name: jnp.int32(fields.get(name, 0)) for name in Clock._fields})
