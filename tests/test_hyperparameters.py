"""Hyperparameters stay in range, move as plain SGD moves their free numbers, and lower the held-out loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill import hyperparameters as hp
from ev3_distill import losses
from ev3_distill.hypergrad import hypergradient
from ev3_distill.types import Batch, Variables

few = settings(deadline=None, max_examples=25)
RANGES = {
    "POSITIVE": st.floats(1e-3, 1e3),
    "LOG": st.floats(1e-3, 1e3),
    "SHARE": st.floats(1e-3, 0.999),
    "FREE": st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
}


@pytest.mark.parametrize("name", RANGES)
@few
@given(st.data())
def test_bijections_lead_there_and_back(name, data):
    value = data.draw(RANGES[name])
    bijection = getattr(hp, name)
    free = bijection.inverse(jnp.float32(value))
    assert jnp.isfinite(free)
    np.testing.assert_allclose(bijection.forward(free), value, rtol=2e-3)


@few
@given(st.lists(st.floats(1e-3, 1), min_size=2, max_size=5))
def test_the_simplex_there_and_back(parts):
    shares = jnp.asarray(parts, jnp.float32) / sum(parts)
    free = hp.SIMPLEX.inverse(shares)
    assert free.shape == (len(parts) - 1,)
    np.testing.assert_allclose(hp.SIMPLEX.forward(free), shares, rtol=1e-4)
    np.testing.assert_allclose(hp.SIMPLEX.forward(free).sum(), 1, rtol=1e-6)


SPACE = {"temperature": hp.POSITIVE, "mix": hp.SIMPLEX, "rate": hp.LOG}
HYPER = {"temperature": 4.0, "mix": jnp.array([0.9, 0.1]), "rate": 0.01}


def test_spaces():
    free = hp.unconstrain(SPACE, HYPER)
    assert {name: x.shape for name, x in free.items()} == {"temperature": (), "mix": (1,), "rate": ()}
    back = hp.constrain(SPACE, free)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), back, HYPER)


@few
@given(st.floats(-50, 50), st.integers(1, 5))
def test_no_step_leaves_the_range(size, steps):
    optimizer = optax.sgd(1.0)
    tuned = hp.start(SPACE, HYPER, optimizer)
    for _ in range(steps):
        tuned = hp.outer_step(tuned, jax.tree.map(lambda x: jnp.full_like(x, size), tuned.free), optimizer)
    hyper = hp.constrain(SPACE, tuned.free)
    assert hyper["temperature"] >= 0 and hyper["rate"] >= 0 and (hyper["mix"] >= 0).all()
    np.testing.assert_allclose(hyper["mix"].sum(), 1, rtol=1e-6)


def test_outer_steps_and_their_average():
    optimizer = optax.sgd(0.5)
    tuned = hp.start(hp.FREE, 1.0, optimizer)
    for _ in range(2):
        tuned = hp.outer_step(tuned, jnp.float32(1), optimizer, decay=0.75)
    assert tuned.free == 0 and tuned.steps == 2  # 1, 0.5, 0
    np.testing.assert_allclose(tuned.average, 0.75 * (0.75 * 1 + 0.25 * 0.5) + 0.25 * 0)
    np.testing.assert_allclose(hp.tuned_values(hp.LOG, tuned), np.exp(tuned.average))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    optimizer = optax.adam(0.1)
    tuned = hp.start(SPACE, HYPER, optimizer)
    gradient = jax.tree.map(jnp.ones_like, tuned.free) | {"rate": jnp.float32(bad)}
    after = hp.outer_step(tuned, gradient, optimizer)
    jax.tree.map(np.testing.assert_array_equal, after, tuned)
    fine = gradient | {"rate": jnp.float32(1)}
    jax.tree.map(np.testing.assert_array_equal, hp.outer_step(tuned, fine, optimizer, sound=jnp.bool_(False)), tuned)
    assert hp.outer_step(tuned, gradient | {"rate": jnp.float32(1)}, optimizer).steps == 1


def batch(seed, n=64):
    """Two classes that a line separates, a teacher that is wrong, and labels that are right."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    y = (x[:, 0] > 0).astype(np.int32)
    wrong = 4.0 * np.eye(2)[1 - y]
    return Batch(
        *(jnp.asarray(a) for a in (x.astype(np.float32), y, wrong.astype(np.float32))), jnp.arange(n), jnp.ones(n)
    )


def test_distillation_is_kd_and_ce_of_weighted_examples():
    of = batch(0)
    logits = jax.random.normal(jax.random.key(0), (64, 2))
    weights = jax.random.uniform(jax.random.key(1), (64,))
    got = hp.distillation({"temperature": 3.0, "mix": jnp.array([0.2, 0.8]), "weights": weights})(logits, of)
    weighted = of._replace(weight=weights)
    want = 0.2 * losses.kd(temperature=3.0)(logits, weighted) + 0.8 * losses.cross_entropy()(logits, weighted)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    each = jnp.stack([weights, jnp.ones(64)], 1)
    got = hp.distillation({"temperature": 3.0, "mix": jnp.array([0.2, 0.8]), "weights": each})(logits, of)
    want = 0.2 * losses.kd(temperature=3.0)(logits, weighted) + 0.8 * losses.cross_entropy()(logits, of)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    plain = hp.distillation({"temperature": 3.0, "mix": jnp.array([0.2, 0.8])})(logits, of)
    want = 0.2 * losses.kd(temperature=3.0)(logits, of) + 0.8 * losses.cross_entropy()(logits, of)
    np.testing.assert_allclose(plain, want, rtol=1e-6)


@pytest.mark.parametrize("method", ["jvp", "guided", "evograd"])
def test_tuning_turns_from_a_teacher_that_is_wrong(method):
    """Plain SGD outer steps on a student in training: the mix leaves the teacher for the labels."""
    train, val = batch(0), batch(1)
    inner, outer, space = optax.sgd(0.5), optax.sgd(20.0), {"mix": hp.SIMPLEX, "temperature": hp.POSITIVE}
    tuned = hp.start(space, {"mix": jnp.array([0.5, 0.5]), "temperature": 2.0}, outer)

    def apply(variables, inputs, *, train, key=None):
        return inputs @ variables.params["w"], variables

    def loss(free, logits, of):
        return hp.distillation(hp.constrain(space, free))(logits, of)

    options = {"rate": 0.5, "copies": 16} if method == "evograd" else {"optimizer": inner}

    @jax.jit
    def advance(i, carry):
        params, tuned = carry
        train_loss, val_loss = hp.student_losses(
            apply, Variables(params, {}), train, val, loss=loss, val_loss=losses.cross_entropy()
        )
        gradient, _ = hypergradient(
            jax.random.fold_in(jax.random.key(0), i), params, tuned.free, train_loss, val_loss, method=method, **options
        )
        updates, _ = inner.update(jax.grad(train_loss)(params, tuned.free, 0), inner.init(params))
        return optax.apply_updates(params, updates), hp.outer_step(tuned, gradient, outer)

    params, tuned = jax.lax.fori_loop(0, 60, advance, ({"w": jnp.zeros((3, 2))}, tuned))
    assert hp.tuned_values(space, tuned)["mix"][1] > 0.8
    assert ((val.inputs @ params["w"]).argmax(1) == val.labels).mean() > 0.9


def test_weights_of_examples():
    of = batch(0)._replace(index=jnp.arange(64)[::-1])
    assert (hp.table_weights(jnp.arange(100.0), of) == jnp.arange(64.0)[::-1]).all()
    net = hp.weight_net(jax.random.key(0), inputs=2, outputs=3, hidden=16)
    seen = jnp.array([[0.0, 1.0], [1e3, 1e30]])
    assert (hp.net_weights(net, seen) == 0.5).all()
    net["w2"] = jax.random.normal(jax.random.key(1), (16, 3))
    weights = hp.net_weights(net, seen)
    assert weights.shape == (2, 3) and ((weights >= 0) & (weights <= 1)).all() and jnp.unique(weights).size > 2
    slopes = jax.grad(lambda net, seen: hp.net_weights(net, seen).sum(), (0, 1))(net, seen)
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(slopes[0])) and (slopes[1] == 0).all()
