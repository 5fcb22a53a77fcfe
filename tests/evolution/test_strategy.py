"""Evolution strategies: right in mean and spread, the same whatever the chunks, and deaf to what is broken."""

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
from toy_landscapes import CURVES, KEY, MEAN, arrays_like, cubic, quadratic

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
def repeated(fitness, rank, sigma):
    """4,000 independent estimates from 4 pairs each, [4000, P]."""

    population = Population(pairs=4, sigma=sigma, rank=rank, shaping="centered", chunk=4)

    def one(key):
        return jax.flatten_util.ravel_pytree(estimate(key, MEAN, fitness, population)[0])[0]

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 4000)), np.float64)


# The estimate.


@pytest.mark.parametrize(
    ("fitness", "rank", "sigma"),
    [(quadratic, None, 0.1), (quadratic, 1, 0.1), (cubic, None, 1.0)],
    ids=["quadratic", "quadratic, rank 1", "cubic"],
)
def test_the_mean_of_estimates_is_the_gradient_of_the_smoothed_objective(fitness, rank, sigma):
    """E f(x + sigma e) has the gradient of f where that is quadratic, and 3 (x^2 + sigma^2) for the cube."""
    x = np.asarray(jax.flatten_util.ravel_pytree(MEAN)[0], np.float64)
    expected = 1 - np.asarray(CURVES) * x if fitness is quadratic else 3 * (x**2 + sigma**2)
    found = repeated(fitness, rank, sigma)
    standard_error = found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - expected) < 5 * standard_error).all()


def test_the_variance_is_that_of_theory():
    """Of the entries of ((grad . e) e), e Gaussian: |grad|^2 + grad_j^2 each, over the number of pairs."""
    gradient = np.asarray(1 - CURVES * jax.flatten_util.ravel_pytree(MEAN)[0], np.float64)
    found = repeated(quadratic, None, 0.1)
    expected = (gradient @ gradient + gradient**2) / 4
    np.testing.assert_allclose(found.var(axis=0, ddof=1), expected, rtol=0.15)
    np.testing.assert_allclose(found.var(axis=0, ddof=1).sum(), expected.sum(), rtol=0.08)


@functools.cache
def of_seven(rank, chunk, hold=None):
    population = Population(pairs=7, sigma=0.1, rank=rank, chunk=chunk, hold_noise=hold)
    return jax.jit(lambda key: estimate(key, MEAN, quadratic, population)[0])(KEY)


@pytest.mark.parametrize(("rank", "chunk"), [(None, 3), (None, 20), (1, 3)])
def test_chunks_change_nothing(chunk, rank):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, of_seven(rank, 1), of_seven(rank, chunk, False))


def test_members_of_a_pair_share_their_data():
    def noise_alone(params, key):
        return jax.random.normal(key)

    gradient, stats = jax.jit(lambda key: estimate(key, MEAN, noise_alone, Population(pairs=16, sigma=0.1)))(KEY)
    assert stats.std > 0.5  # pairs differ
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_agrees_with_evosax():
    """Open-ES of evosax (Apache-2.0; tried with 0.3.2) minimises, and holds a population: with ours, it goes where we go."""
    algorithms = pytest.importorskip("evosax.algorithms", reason="evosax, for comparison alone, is not installed")
    pairs, sigma, optimizer = 8, 0.1, optax.adam(0.05)
    ours = evolution(optimizer, EvolutionConfig(pairs=pairs, sigma=sigma))
    state, x = ours.init(MEAN), jax.flatten_util.ravel_pytree(MEAN)[0]
    theirs = algorithms.Open_ES(2 * pairs, MEAN, optimizer=optimizer, std_schedule=optax.constant_schedule(sigma))
    their_state = theirs.init(KEY, MEAN, theirs.default_params)
    noise, step = full_rank(MEAN), stepped(ours, quadratic)
    for generation in range(5):
        now = jax.random.fold_in(KEY, generation)
        drawn = jnp.stack([noise.draw(jax.random.fold_in(now, 2 * i)) for i in range(pairs)])
        population = their_state.mean + sigma * jnp.concatenate([drawn, -drawn])
        losses = jnp.stack([-quadratic(row) for row in population])
        unraveled = jax.vmap(jax.flatten_util.ravel_pytree(MEAN)[1])(population)
        their_state, _ = theirs.tell(KEY, unraveled, losses, their_state, theirs.default_params)
        state, _ = step(state)
        found = jax.flatten_util.ravel_pytree(state.mean)[0]
        np.testing.assert_allclose(found, their_state.mean, rtol=0, atol=1e-6)
    assert float(jnp.abs(found - x).max()) > 0.1


# Part by part.


def test_an_estimate_by_parts_is_each_parts_own():
    """Both parts at once, with a parameter in neither: linear, so that the mean over many pairs is the gradient itself."""
    mean = {**MEAN, "left out": jnp.ones(3)}
    population = Population(pairs=300, sigma=0.1, shaping="centered")
    blocks = [
        Block(parameters_named("w"), population),
        Block(parameters_named("b"), dataclasses.replace(population, pairs=200, chunk=8)),
    ]

    def linear(params, key):
        broken = jnp.where(params["b"][0] > 0.55, jnp.nan, 0.0)
        return 2 * params["w"].sum() - 3 * params["b"].sum() + params["left out"].sum() + broken

    run = jax.jit(lambda key: estimate_by_blocks(key, mean, linear, blocks))
    gradient, stats = run(KEY)
    np.testing.assert_allclose(gradient["w"], 2, atol=1.0)
    assert (gradient["b"] < -1).all() and (gradient["left out"] == 0).all()
    assert 0 < int(stats.failed) < 40 and float(stats.mean) == pytest.approx(float(linear(mean, KEY)), abs=0.1)
    assert float(stats.best) > float(stats.mean) + float(stats.std)
    own = jax.jit(lambda key: estimate(key, {"w": MEAN["w"]}, lambda w, k: linear(mean | w, k), population)[0])
    alone = own(jax.random.fold_in(KEY, 0))
    np.testing.assert_allclose(gradient["w"], alone["w"], rtol=1e-4, atol=1e-4)


def test_members_of_a_part_share_the_layers_before_it():
    network, variables, inputs = case("conv4:width=6")
    block = Block(parameters_named(r"\['convs'\]\[2\]"), Population(pairs=8, sigma=0.1, chunk=4))

    def fitness(params, key):
        return network.apply(Variables(params, variables.stats), inputs, train=True)[0].mean()

    def run(key):
        return estimate_by_blocks(key, variables.params, fitness, [block])

    convolutions = re.findall(r"f32\[([\d,]+)\] = students_conv", str(jax.make_jaxpr(run)(KEY)))
    # 3 images; 4 pairs at once have 48 filters in the third layer, and are 24 images in the last
    assert convolutions == ["3,16,16,6", "3,8,8,6", "3,4,4,48", "24,2,2,6"]


# Shaping.

SCORES = st.lists(st.tuples(*[st.integers(-20, 20)] * 2), min_size=6, max_size=6)
SHAPED = {name: jax.jit(shaping) for name, shaping in SHAPINGS.items()}


@given(SCORES, st.sampled_from(list(SHAPINGS)))
@settings(max_examples=40, deadline=None)
def test_shaped_differences_are_antisymmetric_and_deaf_to_a_constant(scores, shaping):
    scores = jnp.array(scores, jnp.float32)
    shaped = SHAPED[shaping](scores)
    np.testing.assert_allclose(SHAPED[shaping](scores[:, ::-1]), -shaped, atol=1e-6)
    np.testing.assert_allclose(SHAPED[shaping](scores + 8), shaped, atol=1e-5)
    assert (shaped[scores[:, 0] == scores[:, 1]] == 0).all()  # ties share a rank


@given(SCORES)
@settings(max_examples=40, deadline=None)
def test_ranks_see_order_alone_and_z_scores_no_scale(scores):
    scores = jnp.array(scores, jnp.float32)
    np.testing.assert_array_equal(SHAPED["rank"](scores), SHAPED["rank"](jnp.exp(scores / 4)))
    np.testing.assert_allclose(SHAPED["z-score"](scores), SHAPED["z-score"](16 * scores), atol=1e-5)


def test_shapings_by_hand():
    scores = jnp.array([[3.0, 1.0], [2.0, 2.0], [0.0, 5.0]])  # ranks 4 1, 2.5 2.5, 0 5 of 0 to 5
    np.testing.assert_allclose(SHAPED["rank"](scores), [0.6, 0, -1], atol=1e-6)
    np.testing.assert_allclose(SHAPED["centered"](scores), [2, 0, -5])
    std = np.std([3, 1, 2, 2, 0, 5])
    np.testing.assert_allclose(SHAPED["z-score"](scores), np.array([2, 0, -5]) / std, rtol=1e-6)


# What is broken.


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_broken_members_rank_last_and_are_counted(shaping):
    """Where half a space is broken, the estimate points away from it; where all is, nowhere. It is finite in any case."""

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


def test_decay_acts_on_the_mean_alone():
    ours = evolution(optax.adam(0.1), EvolutionConfig(pairs=2, sigma=0.1, decay=0.01))
    step, state = stepped(ours, lambda params, key: jnp.float32(0)), ours.init(MEAN)
    for _ in range(10):
        state, _ = step(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.99**10 * b, rtol=1e-5), state.mean, MEAN)


@pytest.mark.parametrize("rank", [None, 1])
def test_with_elitism_the_best_member_stays_where_it_beats_the_mean(rank):
    """At rate 0 the mean climbs by its best members alone, never down, and past broken ones; at a good rate it outruns them."""

    def fitness(params, key):
        score = quadratic(params)
        return jnp.where(params["b"][0] < 0.2, jnp.nan, score)

    ours = evolution(optax.sgd(0.0), EvolutionConfig(pairs=3, sigma=0.1, rank=rank, elitism=True))
    step, state = stepped(ours, fitness), ours.init(MEAN)
    score = float(quadratic(MEAN))
    for _ in range(6):
        state, stats = step(state)
        now = float(quadratic(state.mean))
        assert now == pytest.approx(max(score, float(stats.best)), rel=1e-5)
        score = now
    assert score > float(quadratic(MEAN)) + 0.1
    means = []
    for elitism in (False, True):
        config = EvolutionConfig(pairs=64, sigma=1e-3, shaping="centered", rank=rank, elitism=elitism)
        ours = evolution(optax.sgd(0.1), config)
        means.append(stepped(ours, quadratic)(ours.init(MEAN))[0].mean)
    jax.tree.map(np.testing.assert_array_equal, *means)


def test_sigma_follows_its_schedule():
    """Of a square around 0, which optimization at rate 0 does not leave, the fitness grows with sigma squared."""
    schedule = optax.piecewise_constant_schedule(0.1, {1: 10.0})
    ours = evolution(optax.sgd(0.0), EvolutionConfig(pairs=32, sigma=schedule))
    step = stepped(ours, lambda params, key: (params["w"] ** 2).sum())
    state, first = step(ours.init(jax.tree.map(jnp.zeros_like, MEAN)))
    state, _ = step(state)
    _, third = step(state)
    assert 50 < float(third.mean / first.mean) < 200


@pytest.mark.parametrize("options", [{"pairs": 0}, {"pairs": 2, "chunk": 0}, {"pairs": 2, "shaping": "none"}])
def test_invalid_population_is_rejected(options):
    with pytest.raises(ValueError, match="a population needs pairs >= 1"):
        Population(sigma=0.1, **options)


# Noise of low rank.

FAMILIES = {
    "mlp:hidden=6": (5,),
    "conv4:width=6": (16, 16, 2),
    "mobilenet:blocks=1": (8, 8, 3),
    "vit:width=12,depth=1": (8, 8, 3),
}


def case(name):
    network = students.from_name(name, FAMILIES[name], 4)
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(3, *FAMILIES[name])), jnp.float32)
    return network, arrays_like(network), inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_member_of_low_rank_is_the_network_at_its_matrices(name, monkeypatch):
    network, variables, inputs = case(name)
    noise = low_rank(variables.params, 1)
    assert noise.size < full_rank(variables.params).size
    drawn = noise.draw(KEY)
    made = []
    dense = lowrank.Factored.dense
    monkeypatch.setattr(lowrank.Factored, "dense", lambda self: made.append(self.mean.shape) or dense(self))

    def logits(params):
        return network.apply(Variables(params, variables.stats), inputs, train=True)[0]

    found = jax.jit(lambda drawn: noise.member(logits, drawn, jnp.float32(0.3)))(drawn)

    @jax.jit
    def moved(drawn):
        added = noise.weigh(jnp.ones(1), drawn[None])
        return logits(jax.tree.map(lambda x, e: x + 0.3 * e, variables.params, added))

    np.testing.assert_allclose(found, moved(drawn), rtol=2e-3, atol=2e-3)
    if name.split(":")[0] in ("mlp", "conv4"):
        assert made == []  # products and convolutions stay those of the mean


def test_members_of_low_rank_share_the_products_of_the_mean():
    """Under vmap over members no product has a matrix per member but those of the factors."""
    network, variables, inputs = case("mlp:hidden=6")
    noise = low_rank(variables.params, 1)

    def logits(params):
        return network.apply(Variables(params, variables.stats), inputs, train=False)[0]

    def population(drawn):
        return jax.vmap(lambda row: noise.member(logits, row, jnp.float32(0.1)))(drawn)

    text = str(jax.make_jaxpr(population)(jnp.zeros((9, noise.size))))
    assert "9,5,6]" not in text and "9,6,4]" not in text


def test_a_convolution_with_strides_padding_and_dilation():
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
def test_a_product_in_other_guises(contract):
    x, w = jax.random.normal(KEY, (4, 6)), jax.random.normal(jax.random.key(1), (6, 3))
    left, right = jax.random.normal(jax.random.key(2), (6, 1)), jax.random.normal(jax.random.key(3), (3, 1))
    factored = lowrank.Factored(w, left, right)
    found = lowrank.evaluate(lambda w: contract(x, w), [factored])
    np.testing.assert_allclose(found, contract(x, factored.dense()), rtol=1e-4, atol=1e-4)


# Memory.


def compiled(pairs, width=64, chunk=None):
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


def test_a_member_takes_at_most_16_bytes():
    few, many = 2048, 65536
    temporary = [compiled(pairs)[0].memory_analysis().temp_size_in_bytes for pairs in (few // 2, many // 2)]
    assert (temporary[1] - temporary[0]) / (many - few) <= 16
    assert temporary[1] < 16 * many + 12 * CHUNK_BYTES[True]


def test_no_buffer_holds_the_noise_of_all():
    program, size = compiled(1024, chunk=4)
    shapes = re.findall(r"[fsu]\d+\[([\d,]+)\]", program.as_text())
    largest = max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)
    assert largest <= 2 * 4 * size
