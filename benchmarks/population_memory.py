"""Memory of a population, and of one evaluation beside the gradient by reverse mode, in bytes."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ev3_distill import students
from ev3_distill.benchmarks.population_speed import SIGMA, random_problem, zero_variables
from ev3_distill.evolution import Population, estimate
from ev3_distill.runtime.compile import jit
from ev3_distill.types import PyTree, Variables

PART = 50  # images that an evaluation embeds at once


def of_population(members: int, *, width: int) -> dict[str, Any]:
    """A compiled generation of a Conv4: its temporary bytes, the number of parameters, and the bytes of Adam's state."""
    network = students.from_name(f"conv4:width={width}", (28, 28, 1), 5)
    params = zero_variables(network).params
    fitness = random_problem(network, (28, 28, 1)).fitness

    def generation(key: jax.Array, mean: PyTree) -> PyTree:
        return estimate(key, mean, fitness, Population(pairs=members // 2, sigma=SIGMA, chunk=1, hold_noise=False))

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"parameters": size, "bytes": _temporary_bytes(generation, params), "optimizer": 2 * 4 * size}


def of_process(members: int) -> dict[str, Any]:
    """A process of its own that runs one generation of a small MLP: its peak resident bytes, and the number of parameters."""
    code = f"from ev3_distill.benchmarks import population_memory; population_memory.print_own_peak({members})"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def print_own_peak(members: int) -> None:
    """Runs one generation and prints what `of_process` returns, as JSON."""
    network = students.from_name("mlp:hidden=64", (64,), 5)
    params = zero_variables(network).params
    inputs = jnp.ones((4, 64))

    def fitness(params: PyTree, key: jax.Array) -> jax.Array:
        return network.apply(Variables(params, {}), inputs, train=False)[0].mean()

    run = jit(lambda key: estimate(key, params, fitness, Population(pairs=members // 2, sigma=SIGMA, chunk=16)))
    jax.block_until_ready(run(jax.random.key(0)))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    unit = 1024 if sys.platform != "darwin" else 1  # of ru_maxrss
    print(json.dumps({"parameters": size, "bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def of_unrolled(steps: int) -> dict[str, Any]:
    """A learner of `steps` steps of gradient descent: bytes of one evaluation, and of the gradient by reverse mode."""
    network = students.from_name("conv4:width=8", (28, 28, 1), 5)
    variables = zero_variables(network)
    images = jnp.zeros((2, 25, 28, 28, 1))
    labels = jnp.arange(25) % 5

    def loss(params: PyTree, inputs: jax.Array) -> jax.Array:
        logits = network.apply(variables._replace(params=params), inputs, train=True)[0]
        return -jax.nn.log_softmax(logits)[jnp.arange(25), labels].mean()

    def learned(params: PyTree, key: jax.Array, images: jax.Array) -> jax.Array:
        def descend(now: PyTree, _: None) -> tuple[PyTree, None]:
            gradient = jax.grad(loss)(now, images[0])
            return jax.tree.map(lambda x, g: x - 0.1 * g, now, gradient), None

        return -loss(jax.lax.scan(descend, params, None, length=steps)[0], images[1])

    return _evaluation_and_reverse(learned, variables.params, images)


def of_episode(count: int) -> dict[str, Any]:
    """A prototype loss over `count` images: bytes of one evaluation, whole and in parts, and of the gradient."""
    network = students.from_name("conv4:width=8", (28, 28, 1), 5)
    variables = zero_variables(network)
    images = jnp.zeros((count, 28, 28, 1))
    assert network.features is not None
    features = network.features

    def embed(params: PyTree, images: jax.Array, train: bool) -> jax.Array:
        return features(variables._replace(params=params), images, train=train)[0][1]["embedding"]

    def score(embedded: jax.Array) -> jax.Array:
        support, query = jnp.split(embedded.reshape(-1, 5, embedded.shape[-1]), 2)
        distances = jnp.square(query[:, :, None] - support.mean(0)).sum(-1)
        return jnp.diagonal(jax.nn.log_softmax(-distances), axis1=1, axis2=2).mean()

    def whole(params: PyTree, key: jax.Array, images: jax.Array) -> jax.Array:
        return score(embed(params, images, True))

    def parts(params: PyTree, key: jax.Array, images: jax.Array) -> jax.Array:
        def some(start: jax.Array) -> jax.Array:
            return embed(params, jax.lax.dynamic_slice_in_dim(images, start, PART), False)

        return score(jax.lax.map(some, PART * jnp.arange(count // PART)).reshape(count, -1))

    measured = _evaluation_and_reverse(whole, variables.params, images)
    return {**measured, "in parts": _evaluation_and_reverse(parts, variables.params, images)["evaluation"]}


def _evaluation_and_reverse(fitness: Callable[..., jax.Array], params: PyTree, data: jax.Array) -> dict[str, Any]:
    def evaluated(key: jax.Array, mean: PyTree, data: jax.Array) -> PyTree:
        return estimate(key, mean, lambda p, k: fitness(p, k, data), Population(pairs=1, sigma=SIGMA))[0]

    def reverse(key: jax.Array, mean: PyTree, data: jax.Array) -> PyTree:
        return jax.grad(fitness)(mean, key, data)

    return {"evaluation": _temporary_bytes(evaluated, params, data), "reverse": _temporary_bytes(reverse, params, data)}


def _temporary_bytes(function: Callable[..., Any], *shapes: PyTree) -> int:
    key = jax.random.key(0)
    compiled = jit(function).lower(key, *shapes).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)
