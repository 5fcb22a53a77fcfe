"""Tangents that training carries along are the derivative that they say they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_one_step import SWIFTLY, ask, assert_close, float64, student, warm

from ev3_distill.hypergrad import forward_mode_init, forward_mode_step

__all__ = ["float64"]  # a fixture


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.05)])
def test_a_training_that_carries_tangents_is_exact_over_all_its_steps(float64, optimizer):
    """And through the last alone where it forgets the others; its steps are those of a training that carries none."""
    params, hyper, loss, val_loss = student()
    state = jax.jit(functools.partial(warm, optimizer))(params, jax.jit(jax.grad(loss))(params, hyper, 0))

    def train_loss(params, hyper, t):
        return loss(params, hyper, 0)

    @functools.partial(jax.jit, static_argnames="decay", compiler_options=SWIFTLY)
    def run(params, state, hyper, *, decay):
        def advance(carry, _):
            before = carry
            carry, gradient, info = forward_mode_step(
                carry, hyper, train_loss, val_loss, optimizer=optimizer, decay=decay
            )
            return carry, (gradient, info, before.params, before.opt_state)

        return jax.lax.scan(advance, forward_mode_init(params, state, hyper), length=3)

    own = {"optimizer": optimizer, "opt_state": state}
    whole, last = run(params, state, hyper, decay=1.0), run(params, state, hyper, decay=0.0)
    _, (_, _, befores, states) = last
    before, state_before = jax.tree.map(lambda leaf: leaf[-1], (befores, states))
    found = ask(params, hyper, train_loss, val_loss, {"forward": ("forward", own | {"steps": 3})})["forward"]
    one = ask(before, hyper, train_loss, val_loss, {"jvp": ("jvp", own | {"opt_state": state_before})})["jvp"]
    for (_, (gradients, infos, *_)), (gradient, info) in ((whole, found), (last, one)):
        assert_close(jax.tree.map(lambda leaf: leaf[-1], gradients), gradient, rtol=1e-8)
        np.testing.assert_allclose(infos.val_loss[-1], info.val_loss, rtol=1e-12)
        assert infos.finite.all()
    assert (whole[1][0]["ignored"] == 0).all()
    assert_close(whole[0].params, last[0].params, rtol=0, atol=0)


def test_tangents_of_what_is_not_finite_are_forgotten(float64):
    """One broken step gives no slope; those after it have slopes of their own."""
    params, hyper, loss, val_loss = student()
    optimizer, begun = optax.sgd(0.1), None
    for broken in (False, True, False):
        carry = forward_mode_init(params, optimizer.init(params), hyper) if begun is None else begun

        def train_loss(params, hyper, t, broken=broken):
            kink = jnp.sqrt(0 * hyper["temperature"]) if broken else 0.0  # finite, without a derivative
            return loss(params, hyper, t) * (1 + kink)

        begun, gradient, info = jax.jit(
            functools.partial(forward_mode_step, train_loss=train_loss, val_loss=val_loss, optimizer=optimizer)
        )(carry, hyper)
        assert jax.tree.all(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), (begun, gradient)))
        assert info.finite and bool(gradient["mix"].any()) != broken


def test_an_optimizer_without_a_derivative_at_zero():
    """Adam at a gradient of 0 from a start: the parameter counts as still."""
    params, optimizer, lam = {"seen": jnp.ones(2), "unseen": jnp.ones(3)}, optax.adam(0.1, eps=0.5), jnp.float32(2)

    def train_loss(params, lam, t):
        return lam * jnp.square(params["seen"]).sum() + 0 * params["unseen"].sum()

    carry, gradient, info = forward_mode_step(
        forward_mode_init(params, optimizer.init(params), lam), lam, train_loss, optax.tree.norm, optimizer=optimizer
    )
    assert info.finite and gradient < 0
    seen, unseen = carry.tangents[:2]
    assert (seen < 0).all() and (unseen == 0).all()
