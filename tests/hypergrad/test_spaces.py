"""Hyperparameter spaces, outer steps, tunable losses, and held-out losses in parts."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.arms import tunable_loss
from ev3_distill.hypergrad import (
    averaged_values,
    hypergradient,
    outer_init,
    outer_step,
    student_train_loss,
    student_val_loss,
)
from ev3_distill.hypergrad import spaces as hp
from ev3_distill.tasks.classification import losses
from ev3_distill.types import Batch, Variables

few_examples = settings(deadline=None, max_examples=25)
RANGES = {
    "POSITIVE": st.floats(1e-3, 1e3),
    "LOG": st.floats(1e-3, 1e3),
    "UNIT_INTERVAL": st.floats(1e-3, 0.999),
    "FREE": st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
}


@pytest.mark.parametrize("name", RANGES)
@few_examples
@given(st.data())
def test_bijections_round_trip(name, data):
    value = data.draw(RANGES[name])
    bijection = getattr(hp, name)
    free = bijection.inverse(jnp.float32(value))
    assert jnp.isfinite(free)
    np.testing.assert_allclose(bijection.forward(free), value, rtol=2e-3)


@few_examples
@given(st.lists(st.floats(1e-3, 1), min_size=2, max_size=5))
def test_simplex_round_trips(parts):
    shares = jnp.asarray(parts, jnp.float32) / sum(parts)
    free = hp.SIMPLEX.inverse(shares)
    assert free.shape == (len(parts) - 1,)
    np.testing.assert_allclose(hp.SIMPLEX.forward(free), shares, rtol=1e-4)
    np.testing.assert_allclose(hp.SIMPLEX.forward(free).sum(), 1, rtol=1e-6)


SPACE = {"temperature": hp.POSITIVE, "mix": hp.SIMPLEX, "rate": hp.LOG}
HYPER = {"temperature": 4.0, "mix": jnp.array([0.9, 0.1]), "rate": 0.01}


def test_nested_space_round_trips():
    free = hp.unconstrain(SPACE, HYPER)
    assert {name: x.shape for name, x in free.items()} == {"temperature": (), "mix": (1,), "rate": ()}
    back = hp.constrain(SPACE, free)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), back, HYPER)


@few_examples
@given(st.floats(-50, 50), st.integers(1, 5))
def test_outer_steps_stay_in_range(size, steps):
    optimizer = optax.sgd(1.0)
    tuned = outer_init(SPACE, HYPER, optimizer)
    for _ in range(steps):
        tuned = outer_step(tuned, jax.tree.map(lambda x: jnp.full_like(x, size), tuned.free), optimizer)
    hyper = hp.constrain(SPACE, tuned.free)
    assert hyper["temperature"] >= 0 and hyper["rate"] >= 0 and (hyper["mix"] >= 0).all()
    np.testing.assert_allclose(hyper["mix"].sum(), 1, rtol=1e-6)


def test_outer_steps_follow_sgd_and_keep_an_average():
    optimizer = optax.sgd(0.5)
    tuned = outer_init(hp.FREE, 1.0, optimizer)
    for _ in range(2):
        tuned = outer_step(tuned, jnp.float32(1), optimizer, decay=0.75)
    assert tuned.free == 0 and tuned.steps == 2  # 1, 0.5, 0
    np.testing.assert_allclose(tuned.average, 0.75 * (0.75 * 1 + 0.25 * 0.5) + 0.25 * 0)
    np.testing.assert_allclose(averaged_values(hp.LOG, tuned), np.exp(tuned.average))


def test_average_decays_by_nine_tenths_by_default():
    state = outer_step(outer_init(hp.FREE, 1.0, optax.sgd(1.0)), jnp.float32(1), optax.sgd(1.0))
    assert state.free == 0
    np.testing.assert_allclose(state.average, 0.9)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_gradient_changes_nothing(bad):
    optimizer = optax.adam(0.1)
    tuned = outer_init(SPACE, HYPER, optimizer)
    gradient = jax.tree.map(jnp.ones_like, tuned.free) | {"rate": jnp.float32(bad)}
    after = outer_step(tuned, gradient, optimizer)
    jax.tree.map(np.testing.assert_array_equal, after, tuned)
    finite = gradient | {"rate": jnp.float32(1)}
    jax.tree.map(np.testing.assert_array_equal, outer_step(tuned, finite, optimizer, valid=jnp.bool_(False)), tuned)
    assert outer_step(tuned, finite, optimizer).steps == 1


def batch(seed, n=64):
    """Two linearly separable classes with correct labels and a teacher that is always wrong."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    y = (x[:, 0] > 0).astype(np.int32)
    wrong = 4.0 * np.eye(2)[1 - y]
    return Batch(
        jnp.asarray(x.astype(np.float32)),
        jnp.asarray(y),
        {"logits": jnp.asarray(wrong.astype(np.float32))},
        jnp.arange(n),
        jnp.ones(n),
    )


def test_distillation_is_a_mix_of_weighted_kd_and_ce():
    data = batch(0)
    logits = jax.random.normal(jax.random.key(0), (64, 2))
    weights = jax.random.uniform(jax.random.key(1), (64,))
    hyper = {"temperature": 3.0, "mix": jnp.array([0.2, 0.8])}
    loss = tunable_loss.distillation(hyper | {"weights": weights})(logits, data)
    weighted = data._replace(weight=weights)
    expected = 0.2 * losses.kd(temperature=3.0)(logits, weighted) + 0.8 * losses.cross_entropy()(logits, weighted)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    weights_per_loss = jnp.stack([weights, jnp.ones(64)], 1)
    loss = tunable_loss.distillation(hyper | {"weights": weights_per_loss})(logits, data)
    expected = 0.2 * losses.kd(temperature=3.0)(logits, weighted) + 0.8 * losses.cross_entropy()(logits, data)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    loss = tunable_loss.distillation(hyper)(logits, data)
    expected = 0.2 * losses.kd(temperature=3.0)(logits, data) + 0.8 * losses.cross_entropy()(logits, data)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["jvp", "guided", "evograd"])
def test_tuning_moves_the_mix_away_from_a_wrong_teacher(method):
    """SGD outer steps during training move the mix from the teacher to the labels."""
    train, val = batch(0), batch(1)
    inner, outer, space = optax.sgd(0.5), optax.sgd(20.0), {"mix": hp.SIMPLEX, "temperature": hp.POSITIVE}
    tuned = outer_init(space, {"mix": jnp.array([0.5, 0.5]), "temperature": 2.0}, outer)

    def apply(variables, inputs, *, train, key=None):
        return inputs @ variables.params["w"], variables

    def loss(free, logits, of):
        return tunable_loss.distillation(hp.constrain(space, free))(logits, of)

    options = {"rate": 0.5, "copies": 16} if method == "evograd" else {"optimizer": inner}

    @jax.jit
    def advance(i, carry):
        params, tuned = carry
        train_loss = student_train_loss(apply, {}, train, loss)
        val_loss = student_val_loss(apply, {}, val, losses.cross_entropy())
        gradient, _ = hypergradient(
            jax.random.fold_in(jax.random.key(0), i), params, tuned.free, train_loss, val_loss, method=method, **options
        )
        updates, _ = inner.update(jax.grad(train_loss)(params, tuned.free, 0), inner.init(params))
        return optax.apply_updates(params, updates), outer_step(tuned, gradient, outer)

    params, tuned = jax.lax.fori_loop(0, 60, advance, ({"w": jnp.zeros((3, 2))}, tuned))
    assert averaged_values(space, tuned)["mix"][1] > 0.8
    assert ((val.inputs @ params["w"]).argmax(1) == val.targets).mean() > 0.9


def test_input_noise_is_scaled_by_the_standard_deviation_of_the_batch():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (500, 4, 5)), jnp.float32)
    key, other = jax.random.split(jax.random.key(0))
    noise = tunable_loss.add_noise(x, 0.5, key) - x
    assert abs(noise.mean()) < 0.05 and abs(noise.std() / (0.5 * x.std()) - 1) < 0.02
    np.testing.assert_allclose(tunable_loss.add_noise(x, 1.0, key) - x, 2 * noise, rtol=1e-3, atol=1e-4)
    assert not jnp.allclose(tunable_loss.add_noise(x, 0.5, other), tunable_loss.add_noise(x, 0.5, key), atol=0.1)
    constant = jnp.full((3, 2), 7.0)  # standard deviation 0
    assert (tunable_loss.add_noise(constant, 0.5, key) == 7).all()
    gradient = jax.grad(lambda x: tunable_loss.add_noise(x, 0.5, key).sum())(x)
    assert (gradient == 1).all()  # the standard deviation is not differentiated


def test_noise_on_bytes_applies_after_scaling_to_1():
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3)), jnp.uint8)
    key = jax.random.key(0)
    noisy = tunable_loss.add_noise(pixels, 0.1, key)
    assert noisy.dtype == jnp.float32
    np.testing.assert_array_equal(noisy, tunable_loss.add_noise(pixels.astype(jnp.float32) / 255, 0.1, key))


def noisy_losses(space):
    """Parameters of a small network, and its losses with tunable input noise, in float64."""
    train, val = (of._replace(inputs=of.inputs.astype(float)) for of in (batch(0, 16), batch(1, 16)))
    first, second = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(first, (3, 6)), "out": jax.random.normal(second, (6, 2))}

    def apply(variables, inputs, *, train, key=None):
        return jnp.tanh(inputs @ variables.params["w"]) @ variables.params["out"], variables

    def loss(free, logits, of):
        return tunable_loss.distillation(hp.constrain(space, free))(logits, of)

    def inputs_of(free, of):
        return tunable_loss.add_noise(of.inputs, hp.constrain(space, free)["noise"], jax.random.key(5))

    train_loss = student_train_loss(apply, {}, train, loss, inputs_of=inputs_of)
    return params, train_loss, student_val_loss(apply, {}, val, losses.cross_entropy())


def test_hypergradient_of_input_noise_is_exact():
    """Forward over reverse, reverse over reverse and central differences agree."""
    with jax.enable_x64(True):
        space = {"temperature": hp.LOG, "mix": hp.SIMPLEX, "noise": hp.LOG}
        free = hp.unconstrain(space, {"temperature": 2.0, "mix": jnp.array([0.3, 0.7]), "noise": 0.4})
        params, train_loss, val_loss = noisy_losses(space)
        inner, key, h = optax.adam(0.1, eps=1e-3), jax.random.key(0), 1e-5

        def val_loss_after_step(noise):
            gradient = jax.grad(train_loss)(params, free | {"noise": noise}, 0)
            updates, _ = inner.update(gradient, inner.init(params), params)
            return val_loss(optax.apply_updates(params, updates))

        @jax.jit
        def slopes():
            exact = {
                method: hypergradient(key, params, free, train_loss, val_loss, method=method, optimizer=inner)[0]
                for method in ("jvp", "unrolled")
            }
            above, below = val_loss_after_step(free["noise"] + h), val_loss_after_step(free["noise"] - h)
            return exact, (above - below) / (2 * h)

        exact, difference = slopes()
        assert difference.dtype == jnp.float64 and abs(difference) > 1e-4
        np.testing.assert_allclose(exact["jvp"]["noise"], difference, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), exact["jvp"], exact["unrolled"])


def test_inputs_of_changes_only_the_inputs_of_the_training_pass():
    """The held-out pass and the batch passed to the loss stay the same."""
    of, passes = batch(0, 4)._replace(inputs=jnp.arange(12.0).reshape(4, 3)), []

    def apply(variables, inputs, *, train, key=None):
        passes.append((train, inputs))
        return inputs[:, :2], variables

    def loss(hyper, logits, loss_batch):
        assert loss_batch is of
        return logits.sum()

    for inputs_of, factor in ((None, 1), (lambda hyper, of: hyper * of.inputs, 3)):
        train_loss = student_train_loss(apply, {}, of, loss, inputs_of=inputs_of)
        val_loss = student_val_loss(apply, {}, of, lambda logits, of: logits.sum(), batch_statistics=False)
        assert train_loss({}, jnp.float32(3), 0) == factor * of.inputs[:, :2].sum()
        assert val_loss({}) == of.inputs[:, :2].sum()
    assert [train for train, _ in passes] == [True, False] * 2
    assert passes[0][1] is of.inputs and passes[3][1] is of.inputs


def losses_in_parts(parts):
    """Parameters, train and held-out losses, and the expected held-out loss of a network that subtracts the batch mean."""

    def apply(variables, inputs, *, train, key=None):
        return jnp.tanh((inputs - inputs.mean(0)) @ variables.params["w"]), variables

    def loss(hyper, logits, of):
        return hyper * losses.cross_entropy()(logits, of)

    def of_whole(params, of):
        return losses.cross_entropy()(apply(Variables(params, {}), of.inputs, train=True)[0], of)

    train, val = batch(0, 12), batch(1, 12)
    train_loss = student_train_loss(apply, {}, train, loss)
    val_loss = student_val_loss(apply, {}, val, losses.cross_entropy(), parts=parts)
    params = {"w": jax.random.normal(jax.random.key(0), (3, 2))}
    rows = np.split(np.arange(12), parts)

    def expected(params):
        return jnp.stack([of_whole(params, jax.tree.map(operator.itemgetter(of), val)) for of in rows]).mean()

    return params, (train_loss, val_loss), expected


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_held_out_loss_is_the_mean_over_its_parts(parts):
    params, (_, val_loss), expected = losses_in_parts(parts)
    tangent = {"w": jnp.ones((3, 2))}
    for loss in (val_loss, jax.jit(val_loss)):
        np.testing.assert_allclose(loss(params), expected(params), rtol=1e-6)
        value, gradient = jax.value_and_grad(loss)(params)
        np.testing.assert_allclose(value, expected(params), rtol=1e-6)
        np.testing.assert_allclose(gradient["w"], jax.grad(expected)(params)["w"], rtol=1e-5, atol=1e-7)
        along = jax.jvp(loss, (params,), (tangent,))[1]
        np.testing.assert_allclose(along, jnp.vdot(gradient["w"], tangent["w"]), rtol=1e-5)
    assert parts == 1 or not np.isclose(expected(params), losses_in_parts(1)[2](params), rtol=1e-4)


@pytest.mark.parametrize("method", ["jvp", "t1t2", "forward"])
def test_all_methods_support_a_held_out_loss_in_parts(method):
    params, (train_loss, val_loss), _ = losses_in_parts(2)
    inputs = jax.random.key(0), params, jnp.float32(1.3), train_loss, val_loss
    exact, _ = hypergradient(*inputs, method="unrolled", optimizer=optax.sgd(0.1))
    assert abs(exact) > 1e-4
    np.testing.assert_allclose(hypergradient(*inputs, method=method, optimizer=optax.sgd(0.1))[0], exact, rtol=1e-4)


def test_held_out_gradient_in_parts_has_no_array_of_the_whole_batch():
    """With two parts, the compiled gradient has no logits of the whole batch."""

    def has_whole_batch(parts):
        params, (_, val_loss), _ = losses_in_parts(parts)
        text = jax.jit(jax.grad(val_loss)).lower(params).compile().as_text()
        return "f32[12,2]" in text  # logits of the whole batch

    assert has_whole_batch(1) and not has_whole_batch(2)


def test_example_weights_from_a_table_and_from_a_network():
    data = batch(0)._replace(index=jnp.arange(64)[::-1])
    assert (tunable_loss.table_weights(jnp.arange(100.0), data) == jnp.arange(64.0)[::-1]).all()
    net = tunable_loss.weight_net(jax.random.key(0), inputs=2, outputs=3, hidden=16)
    features = jnp.array([[0.0, 1.0], [1e3, 1e30]])
    assert (tunable_loss.net_weights(net, features) == 0.5).all()
    net["w2"] = jax.random.normal(jax.random.key(1), (16, 3))
    weights = tunable_loss.net_weights(net, features)
    assert weights.shape == (2, 3) and ((weights >= 0) & (weights <= 1)).all() and jnp.unique(weights).size > 2
    slopes = jax.grad(lambda net, features: tunable_loss.net_weights(net, features).sum(), (0, 1))(net, features)
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(slopes[0])) and (slopes[1] == 0).all()
