"""Promotions for a broken guard on the worst class: how often is the worst class no better afterwards? A part of `safety`.

A test concerns a champion and a candidate on CLASSES classes of PER_CLASS examples. The champion is right on 70 % of one class
and on 90 % of the others, in the population. Candidates:

- `new worst class`: 90 % on that class, 70 % on another one: the worst class is as bad as before;
- `equal`: as accurate as the champion on each class, independent of it;
- `better`: 90 % on every class.

Rules: `every class` is the test of a run. `one class` tests the champion's worst class alone. Both test each of TESTS
candidates under the error budget of a run. A promotion of a candidate that is not `better` is false.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ev3_distill.config import EV3
from ev3_distill.core import adapt, paired_tests
from ev3_distill.runtime.compile import jit
from ev3_distill.types import ErrorBudget

DELTA = EV3.delta
CLASSES, PER_CLASS, TESTS = 4, 250, 10
CANDIDATES, RULES = ("new worst class", "equal", "better"), ("every class", "one class")
LOW, HIGH = 0.7, 0.9

Carry = tuple[ErrorBudget, jax.Array]


@functools.cache
def simulate(candidates: str, rule: str) -> Callable[[jax.Array], jax.Array]:
    """Keys [R] -> whether each of R runs promoted one of its TESTS candidates."""
    strata = jnp.arange(CLASSES * PER_CLASS) % CLASSES

    def hits(key: jax.Array, accuracy: jax.Array) -> jax.Array:
        return (jax.random.uniform(key, strata.shape) < accuracy[strata]).astype(jnp.float32)

    def of_champion(worst: jax.Array) -> jax.Array:
        return jnp.full(CLASSES, HIGH).at[worst].set(LOW)

    def test(champion: jax.Array, carry: Carry, key: jax.Array) -> tuple[Carry, None]:
        budget, promoted = carry
        candidate_key, class_key = jax.random.split(key)
        other = jax.random.randint(class_key, (), 1, CLASSES)
        accuracy = {
            "new worst class": of_champion(other),
            "equal": of_champion(jnp.int32(0)),
            "better": jnp.full(CLASSES, HIGH),
        }[candidates]
        candidate = hits(candidate_key, accuracy)
        if rule == "every class":
            p_value = paired_tests.least_mean(candidate, champion, strata, number=CLASSES, focus=jnp.int32(0))[3]
        else:
            p_value = paired_tests.mcnemar(candidate * (strata == 0), champion * (strata == 0))[2]
        passed = p_value <= adapt.level(budget, jnp.bool_(False))
        budget = adapt.spend(budget, jnp.bool_(False), jnp.bool_(True), passed)
        return (budget, promoted | passed), None

    def one(key: jax.Array) -> jax.Array:
        first, rest = jax.random.split(key)
        champion = hits(first, of_champion(jnp.int32(0)))
        start = adapt.initial_budget(DELTA), jnp.bool_(False)
        (_, promoted), _ = jax.lax.scan(functools.partial(test, champion), start, jax.random.split(rest, TESTS))
        return promoted

    runs: Callable[[jax.Array], jax.Array] = jit(lambda keys: jax.lax.map(one, keys, batch_size=50))
    return runs
