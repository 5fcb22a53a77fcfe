"""Contenders that evaluate a population: our estimate, two implementations that hold all members at once, and a lower bound."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ev3_distill import students
from ev3_distill.evolution import Fitness, Population, estimate
from ev3_distill.runtime import distributed
from ev3_distill.runtime.compile import jit
from ev3_distill.types import Network, PyTree, Variables

EXAMPLES = {1: 128, 3: 25}  # examples per member, by the number of axes of an input
SIGMA = 0.05
_TOGETHER = 8  # members whose examples make one batch of `no noise`

Generation = Callable[[jax.Array], PyTree]  # key -> a result that depends on all members


class Problem(NamedTuple):
    """A classification problem of random examples: their values do not affect speed or memory."""

    inputs: jax.Array  # [B, ...]
    fitness: Fitness


def contenders(name: str, shape: Sequence[int], pairs: int) -> dict[str, Generation]:
    """The contenders for a student by name.

    Args:
      name: the student.
      shape: of an input.
      pairs: antithetic pairs in a generation.
    """
    network = students.from_name(name, shape, 5)
    variables = network.init(jax.random.key(0))
    problem = random_problem(network, shape)
    fitness, params = problem.fitness, variables.params
    named = {
        "full rank": _ours(fitness, params, pairs, rank=None),
        "rank 1": _ours(fitness, params, pairs, rank=1),
        "ask, vmap, tell": _all_at_once(fitness, params, pairs),
    }
    if (evosax := _evosax(fitness, params, pairs)) is not None:
        named["evosax"] = evosax
    return {**named, "no noise": _no_noise(network, variables, problem.inputs, pairs)}


def random_problem(network: Network, shape: Sequence[int]) -> Problem:
    """Random examples with random labels of five classes."""
    rng = np.random.default_rng(0)
    count = EXAMPLES[len(shape)]
    inputs = jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 5, count))
    stats = zero_variables(network).stats

    def fitness(params: PyTree, key: jax.Array) -> jax.Array:
        logits = network.apply(Variables(params, stats), inputs, train=True)[0]
        return jax.nn.log_softmax(logits)[jnp.arange(count), labels].mean()

    return Problem(inputs, fitness)


def zero_variables(network: Network) -> Variables:
    """Variables of the network's shapes, all zero: their values do not affect speed or memory."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _ours(fitness: Fitness, params: PyTree, pairs: int, *, rank: int | None) -> Generation:
    """`estimate`, spread over all devices of all processes."""
    mesh = distributed.make_mesh()
    spread = distributed.spread_over(mesh) if mesh.size > 1 else distributed.Spread()

    def generation(key: jax.Array, params: PyTree) -> PyTree:
        now = jax.random.wrap_key_data(key)
        return estimate(now, params, fitness, Population(pairs=pairs, sigma=SIGMA, rank=rank), spread=spread)[0]

    run = jit(generation if mesh.size == 1 else distributed.on_all_devices(generation, mesh))
    placed = params if mesh.size == 1 else distributed.replicate(params, mesh)
    return lambda key: run(np.asarray(jax.random.key_data(key)), placed)


def _all_at_once(fitness: Fitness, params: PyTree, pairs: int) -> Generation:
    """The usual way: all noise and all members in memory, [N, P] each, and `vmap` over members."""
    vector, unravel = jax.flatten_util.ravel_pytree(params)

    @jit
    def generation(key: jax.Array, vector: jax.Array) -> jax.Array:
        half = jax.random.normal(key, (pairs, vector.size))
        population = vector + SIGMA * jnp.concatenate([half, -half])
        scores = jax.vmap(lambda member: fitness(unravel(member), key))(population)
        ranks = jnp.argsort(jnp.argsort(scores)) / (2 * pairs - 1) - 0.5
        return ranks @ ((population - vector) / SIGMA) / (2 * pairs * SIGMA)

    return lambda key: generation(key, vector)


def _evosax(fitness: Fitness, params: PyTree, pairs: int) -> Generation | None:
    """Open-ES of evosax; None if that library is not installed."""
    try:
        from evosax.algorithms import Open_ES
    except ImportError:
        return None
    strategy = Open_ES(2 * pairs, params, optimizer=optax.sgd(1.0), std_schedule=optax.constant_schedule(SIGMA))
    start = strategy.init(jax.random.key(0), params, strategy.default_params)

    @jit
    def generation(key: jax.Array, state: PyTree) -> PyTree:
        population, state = strategy.ask(key, state, strategy.default_params)
        losses = -jax.vmap(lambda member: fitness(member, key))(population)
        return strategy.tell(key, population, losses, state, strategy.default_params)[0].mean

    return lambda key: generation(key, start)


def _no_noise(network: Network, variables: Variables, inputs: jax.Array, pairs: int) -> Generation:
    """Forward passes of the mean on as many examples as all members see: the lower bound of the time."""

    @jit
    def passes(inputs: jax.Array) -> jax.Array:
        def some(i: jax.Array) -> jax.Array:
            many = jnp.tile(inputs + 1e-3 * i, (_TOGETHER, *[1] * (inputs.ndim - 1)))
            return network.apply(variables, many, train=True)[0].sum()

        return jax.lax.map(some, jnp.arange(2 * pairs // _TOGETHER, dtype=jnp.float32))

    return lambda key: passes(inputs)
