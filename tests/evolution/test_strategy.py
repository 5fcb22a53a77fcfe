"""Evolution strategies: mean and variance of the estimates, chunking, shaping, non-finite members, low-rank noise, memory."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_landscapes import CURVATURES, KEY, MEAN, cubic, quadratic, random_variables

from ev3_distill import students
from ev3_distill.evolution import (
    Block,
    EvolutionConfig,
    Population,
    estimate,
    estimate_by_blocks,
    evolution,
    lowrank,
    parameters_named,
)
from ev3_distill.evolution.noise import full_rank, low_rank
from ev3_distill.evolution.population import CHUNK_BYTES
from ev3_distill.evolution.shaping import SHAPINGS
from ev3_distill.types import Variables


@functools.cache
def repeated_estimates(fitness, rank, sigma):
    """4,000 independent estimates with 4 pairs each, [4000, P]."""

    population = Population(pairs=4, sigma=sigma, rank=rank, shaping="centered", chunk=4)

    def estimate_once(key):
        return jax.flatten_util.ravel_pytree(estimate(key, MEAN, fitness, population)[0])[0]

    return np.asarray(jax.jit(jax.vmap(estimate_once))(jax.random.split(KEY, 4000)), np.float64)


# The estimate.


@pytest.mark.parametrize(
    ("fitness", "rank", "sigma"),
    [(quadratic, None, 0.1), (quadratic, 1, 0.1), (cubic, None, 1.0)],
    ids=["quadratic", "quadratic, rank 1", "cubic"],
)
def test_estimate_is_unbiased_for_the_smoothed_gradient(fitness, rank, sigma):
    """The gradient of E f(x + sigma e) is that of f for a quadratic f, and 3 (x^2 + sigma^2) for the cube."""
    x = np.asarray(jax.flatten_util.ravel_pytree(MEAN)[0], np.float64)
    expected = 1 - np.asarray(CURVATURES) * x if fitness is quadratic else 3 * (x**2 + sigma**2)
    estimates = repeated_estimates(fitness, rank, sigma)
    standard_error = estimates.std(axis=0, ddof=1) / math.sqrt(len(estimates))
    assert (np.abs(estimates.mean(axis=0) - expected) < 5 * standard_error).all()


def test_variance_of_the_estimate_matches_theory():
    """Entry j of (grad . e) e has variance |grad|^2 + grad_j^2 for Gaussian e; n pairs divide it by n."""
    gradient = np.asarray(1 - CURVATURES * jax.flatten_util.ravel_pytree(MEAN)[0], np.float64)
    estimates = repeated_estimates(quadratic, None, 0.1)
    expected = (gradient @ gradient + gradient**2) / 4
    np.testing.assert_allclose(estimates.var(axis=0, ddof=1), expected, rtol=0.15)
    np.testing.assert_allclose(estimates.var(axis=0, ddof=1).sum(), expected.sum(), rtol=0.08)


@functools.cache
def seven_pair_estimate(rank, chunk, hold=None):
    population = Population(pairs=7, sigma=0.1, rank=rank, chunk=chunk, hold_noise=hold)
    return jax.jit(lambda key: estimate(key, MEAN, quadratic, population)[0])(KEY)


@pytest.mark.parametrize(("rank", "chunk"), [(None, 3), (None, 20), (1, 3)])
def test_estimate_does_not_depend_on_the_chunk_size(chunk, rank):
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(assert_close, seven_pair_estimate(rank, 1), seven_pair_estimate(rank, chunk, False))


def test_members_of_a_pair_share_their_random_key():
    def random_fitness(params, key):
        return jax.random.normal(key)

    gradient, stats = jax.jit(lambda key: estimate(key, MEAN, random_fitness, Population(pairs=16, sigma=0.1)))(KEY)
    assert stats.std > 0.5  # members of different pairs differ
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_updates_match_open_es_of_evosax():
    """Open-ES of evosax (Apache-2.0, 0.3.2) minimizes a given population; with our noise, both means stay equal."""
    algorithms = pytest.importorskip("evosax.algorithms", reason="needs evosax, only for comparison")
    pairs, sigma, optimizer = 8, 0.1, optax.adam(0.05)
    strategy = evolution(optimizer, EvolutionConfig(pairs=pairs, sigma=sigma))
    state, start = strategy.init(MEAN), jax.flatten_util.ravel_pytree(MEAN)[0]
    open_es = algorithms.Open_ES(2 * pairs, MEAN, optimizer=optimizer, std_schedule=optax.constant_schedule(sigma))
    evosax_state = open_es.init(KEY, MEAN, open_es.default_params)
    noise, step = full_rank(MEAN), stepped(strategy, quadratic)
    for generation in range(5):
        key = jax.random.fold_in(KEY, generation)
        noise_rows = jnp.stack([noise.draw(jax.random.fold_in(key, 2 * i)) for i in range(pairs)])
        population = evosax_state.mean + sigma * jnp.concatenate([noise_rows, -noise_rows])
        losses = jnp.stack([-quadratic(row) for row in population])
        unraveled = jax.vmap(jax.flatten_util.ravel_pytree(MEAN)[1])(population)
        evosax_state, _ = open_es.tell(KEY, unraveled, losses, evosax_state, open_es.default_params)
        state, _ = step(state)
        mean = jax.flatten_util.ravel_pytree(state.mean)[0]
        np.testing.assert_allclose(mean, evosax_state.mean, rtol=0, atol=1e-6)
    assert float(jnp.abs(mean - start).max()) > 0.1


# Blocks.


def test_estimate_by_blocks_estimates_each_block_separately():
    """Two blocks, and a parameter in neither. Fitness is linear, so many pairs average to its gradient."""
    mean = {**MEAN, "unused": jnp.ones(3)}
    population = Population(pairs=300, sigma=0.1, shaping="centered")
    blocks = [
        Block(parameters_named("w"), population),
        Block(parameters_named("b"), dataclasses.replace(population, pairs=200, chunk=8)),
    ]

    def linear(params, key):
        failure = jnp.where(params["b"][0] > 0.55, jnp.nan, 0.0)
        return 2 * params["w"].sum() - 3 * params["b"].sum() + params["unused"].sum() + failure

    run = jax.jit(lambda key: estimate_by_blocks(key, mean, linear, blocks))
    gradient, stats = run(KEY)
    np.testing.assert_allclose(gradient["w"], 2, atol=1.0)
    assert (gradient["b"] < -1).all() and (gradient["unused"] == 0).all()
    assert 0 < int(stats.failed) < 40 and float(stats.mean) == pytest.approx(float(linear(mean, KEY)), abs=0.1)
    assert float(stats.best) > float(stats.mean) + float(stats.std)
    estimate_w = jax.jit(lambda key: estimate(key, {"w": MEAN["w"]}, lambda w, k: linear(mean | w, k), population)[0])
    alone = estimate_w(jax.random.fold_in(KEY, 0))
    np.testing.assert_allclose(gradient["w"], alone["w"], rtol=1e-4, atol=1e-4)


def test_members_of_a_block_share_the_layers_before_it():
    network, variables, inputs = small_network("conv4:width=6")
    block = Block(parameters_named(r"\['convs'\]\[2\]"), Population(pairs=8, sigma=0.1, chunk=4))

    def fitness(params, key):
        return network.apply(Variables(params, variables.stats), inputs, train=True)[0].mean()

    def run(key):
        return estimate_by_blocks(key, variables.params, fitness, [block])

    convolutions = re.findall(r"f32\[([\d,]+)\] = students_conv", str(jax.make_jaxpr(run)(KEY)))
    # 3 images. A chunk of 4 pairs (8 members) has 48 filters in the third layer and 24 images in the last one.
    assert convolutions == ["3,16,16,6", "3,8,8,6", "3,4,4,48", "24,2,2,6"]


# Shaping.

SCORES = st.lists(st.tuples(*[st.integers(-20, 20)] * 2), min_size=6, max_size=6)
SHAPED = {name: jax.jit(shaping) for name, shaping in SHAPINGS.items()}


@given(SCORES, st.sampled_from(list(SHAPINGS)))
@settings(max_examples=40, deadline=None)
def test_shaped_differences_are_antisymmetric_and_ignore_a_constant(scores, shaping):
    scores = jnp.array(scores, jnp.float32)
    shaped = SHAPED[shaping](scores)
    np.testing.assert_allclose(SHAPED[shaping](scores[:, ::-1]), -shaped, atol=1e-6)
    np.testing.assert_allclose(SHAPED[shaping](scores + 8), shaped, atol=1e-5)
    assert (shaped[scores[:, 0] == scores[:, 1]] == 0).all()  # ties share a rank


@given(SCORES)
@settings(max_examples=40, deadline=None)
def test_rank_shaping_depends_on_order_only_and_z_scores_ignore_scale(scores):
    scores = jnp.array(scores, jnp.float32)
    np.testing.assert_array_equal(SHAPED["rank"](scores), SHAPED["rank"](jnp.exp(scores / 4)))
    np.testing.assert_allclose(SHAPED["z-score"](scores), SHAPED["z-score"](16 * scores), atol=1e-5)


def test_shapings_match_hand_computed_values():
    scores = jnp.array([[3.0, 1.0], [2.0, 2.0], [0.0, 5.0]])  # ranks 0 to 5: (4, 1), (2.5, 2.5), (0, 5)
    np.testing.assert_allclose(SHAPED["rank"](scores), [0.6, 0, -1], atol=1e-6)
    np.testing.assert_allclose(SHAPED["centered"](scores), [2, 0, -5])
    std = np.std([3, 1, 2, 2, 0, 5])
    np.testing.assert_allclose(SHAPED["z-score"](scores), np.array([2, 0, -5]) / std, rtol=1e-6)


# Non-finite fitness.


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_non_finite_members_rank_last_and_are_counted(shaping):
    """The estimate is finite: it points away from a non-finite half-space, and is zero if all members are non-finite."""

    @jax.jit
    def run(value, limit):
        def fitness(params, key):
            return jnp.where(params["b"][0] > limit, value, quadratic(params))

        return estimate(KEY, MEAN, fitness, Population(pairs=64, sigma=0.05, shaping=shaping))

    for value in (math.nan, math.inf, -math.inf):
        gradient, stats = run(value, 0.3)
        assert int(stats.failed) == 64  # one of each pair
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        assert float(gradient["b"][0]) < 0 and math.isfinite(float(stats.mean)) and math.isfinite(float(stats.std))
        gradient, stats = run(value, -100.0)
        assert int(stats.failed) == 128
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


# Strategy.


def stepped(strategy, fitness):
    return jax.jit(lambda state: strategy.step(KEY, state, fitness))


def test_decay_shrinks_the_mean_at_zero_gradient():
    strategy = evolution(optax.adam(0.1), EvolutionConfig(pairs=2, sigma=0.1, decay=0.01))
    step, state = stepped(strategy, lambda params, key: jnp.float32(0)), strategy.init(MEAN)
    for _ in range(10):
        state, _ = step(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.99**10 * b, rtol=1e-5), state.mean, MEAN)


@pytest.mark.parametrize("rank", [None, 1])
def test_elitism_moves_to_the_best_member_only_if_it_beats_the_mean(rank):
    """At rate 0 the mean moves only to better members, never to NaN ones; at a good rate elitism changes nothing."""

    def fitness(params, key):
        score = quadratic(params)
        return jnp.where(params["b"][0] < 0.2, jnp.nan, score)

    strategy = evolution(optax.sgd(0.0), EvolutionConfig(pairs=3, sigma=0.1, rank=rank, elitism=True))
    step, state = stepped(strategy, fitness), strategy.init(MEAN)
    score = float(quadratic(MEAN))
    for _ in range(6):
        state, stats = step(state)
        new_score = float(quadratic(state.mean))
        assert new_score == pytest.approx(max(score, float(stats.best)), rel=1e-5)
        score = new_score
    assert score > float(quadratic(MEAN)) + 0.1
    means = []
    for elitism in (False, True):
        config = EvolutionConfig(pairs=64, sigma=1e-3, shaping="centered", rank=rank, elitism=elitism)
        strategy = evolution(optax.sgd(0.1), config)
        means.append(stepped(strategy, quadratic)(strategy.init(MEAN))[0].mean)
    jax.tree.map(np.testing.assert_array_equal, *means)


def test_sigma_follows_its_schedule():
    """Fitness w^2 with the mean fixed at 0 (rate 0): the mean fitness grows with sigma squared."""
    schedule = optax.piecewise_constant_schedule(0.1, {1: 10.0})
    strategy = evolution(optax.sgd(0.0), EvolutionConfig(pairs=32, sigma=schedule))
    step = stepped(strategy, lambda params, key: (params["w"] ** 2).sum())
    state, first = step(strategy.init(jax.tree.map(jnp.zeros_like, MEAN)))
    state, _ = step(state)
    _, third = step(state)
    assert 50 < float(third.mean / first.mean) < 200


@pytest.mark.parametrize("options", [{"pairs": 0}, {"pairs": 2, "chunk": 0}, {"pairs": 2, "shaping": "none"}])
def test_invalid_population_is_rejected(options):
    with pytest.raises(ValueError, match="a population needs pairs >= 1"):
        Population(sigma=0.1, **options)


# Low-rank noise.

FAMILIES = {
    "mlp:hidden=6": (5,),
    "conv4:width=6": (16, 16, 2),
    "mobilenet:blocks=1": (8, 8, 3),
    "vit:width=12,depth=1": (8, 8, 3),
}


def small_network(name):
    network = students.from_name(name, FAMILIES[name], 4)
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(3, *FAMILIES[name])), jnp.float32)
    return network, random_variables(network), inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_low_rank_member_equals_the_network_with_dense_noise(name, monkeypatch):
    network, variables, inputs = small_network(name)
    noise = low_rank(variables.params, 1)
    assert noise.size < full_rank(variables.params).size
    noise_row = noise.draw(KEY)
    dense_shapes = []
    dense = lowrank.Factored.dense
    monkeypatch.setattr(lowrank.Factored, "dense", lambda self: dense_shapes.append(self.mean.shape) or dense(self))

    def logits(params):
        return network.apply(Variables(params, variables.stats), inputs, train=True)[0]

    member_logits = jax.jit(lambda noise_row: noise.member(logits, noise_row, jnp.float32(0.3)))(noise_row)

    @jax.jit
    def dense_logits(noise_row):
        added = noise.weigh(jnp.ones(1), noise_row[None])
        return logits(jax.tree.map(lambda x, e: x + 0.3 * e, variables.params, added))

    np.testing.assert_allclose(member_logits, dense_logits(noise_row), rtol=2e-3, atol=2e-3)
    if name.split(":")[0] in ("mlp", "conv4"):
        assert dense_shapes == []  # no dense matrix is built for products and convolutions


def test_low_rank_members_share_the_products_with_the_mean():
    """Under vmap over members, only the low-rank factors have a matrix per member."""
    network, variables, inputs = small_network("mlp:hidden=6")
    noise = low_rank(variables.params, 1)

    def logits(params):
        return network.apply(Variables(params, variables.stats), inputs, train=False)[0]

    def population(noise_rows):
        return jax.vmap(lambda row: noise.member(logits, row, jnp.float32(0.1)))(noise_rows)

    text = str(jax.make_jaxpr(population)(jnp.zeros((9, noise.size))))
    assert "9,5,6]" not in text and "9,6,4]" not in text


def test_factored_convolution_supports_strides_padding_and_dilation():
    x = jax.random.normal(KEY, (2, 9, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 2, 3, 5))
    left, right = jax.random.normal(jax.random.key(2), (18, 2)), jax.random.normal(jax.random.key(3), (5, 2))

    def convolve(kernel):
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 1), [(1, 2), (0, 1)], rhs_dilation=(1, 2), dimension_numbers=axes
        )

    factored = lowrank.Factored(kernel, left, right)
    np.testing.assert_allclose(lowrank.evaluate(convolve, [factored]), convolve(factored.dense()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "contract", [lambda x, w: x @ w, lambda x, w: x @ w.T.T, lambda x, w: jnp.einsum("bi,oi->bo", x, w.T)]
)
def test_factored_product_is_recognized_in_other_forms(contract):
    x, w = jax.random.normal(KEY, (4, 6)), jax.random.normal(jax.random.key(1), (6, 3))
    left, right = jax.random.normal(jax.random.key(2), (6, 1)), jax.random.normal(jax.random.key(3), (3, 1))
    factored = lowrank.Factored(w, left, right)
    product = lowrank.evaluate(lambda w: contract(x, w), [factored])
    np.testing.assert_allclose(product, contract(x, factored.dense()), rtol=1e-4, atol=1e-4)


# Memory.


def compile_estimate(pairs, width=64, chunk=None):
    network = students.from_name(f"mlp:hidden={width}", (32,), 8)
    shapes = jax.eval_shape(network.init, KEY).params
    inputs = jax.random.normal(KEY, (4, 32))

    def fitness(params, key):
        return network.apply(Variables(params, {}), inputs, train=False)[0].mean()

    population = Population(pairs=pairs, sigma=0.1, chunk=chunk, hold_noise=False)

    def run(key, params):
        return estimate(key, params, fitness, population)

    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return jax.jit(run).lower(KEY, shapes).compile(), size


def test_each_member_adds_at_most_16_bytes():
    few, many = 2048, 65536
    temporary = [compile_estimate(pairs)[0].memory_analysis().temp_size_in_bytes for pairs in (few // 2, many // 2)]
    assert (temporary[1] - temporary[0]) / (many - few) <= 16
    assert temporary[1] < 16 * many + 12 * CHUNK_BYTES[True]


def test_no_buffer_holds_the_noise_of_all_members():
    program, size = compile_estimate(1024, chunk=4)
    shapes = re.findall(r"[fsu]\d+\[([\d,]+)\]", program.as_text())
    largest = max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)
    assert largest <= 2 * 4 * size
