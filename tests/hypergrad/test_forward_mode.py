"""Forward mode: the tangents that training carries give the exact hypergradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_one_step import FAST_COMPILE, assert_close, float64, hypergradients, student, warm_opt_state

from ev3_distill.hypergrad import forward_mode_init, forward_mode_step

__all__ = ["float64"]  # a fixture


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.05)])
def test_forward_mode_is_exact_over_all_steps_or_the_last_one(float64, optimizer):
    """Decay 1 differentiates all steps, decay 0 only the last one; the parameters do not depend on the decay."""
    params, hyper, loss, val_loss = student()
    state = jax.jit(functools.partial(warm_opt_state, optimizer))(params, jax.jit(jax.grad(loss))(params, hyper, 0))

    def train_loss(params, hyper, t):
        return loss(params, hyper, 0)

    @functools.partial(jax.jit, static_argnames="decay", compiler_options=FAST_COMPILE)
    def run(params, state, hyper, *, decay):
        def advance(carry, _):
            before = carry
            carry, gradient, info = forward_mode_step(
                carry, hyper, train_loss, val_loss, optimizer=optimizer, decay=decay
            )
            return carry, (gradient, info, before.params, before.opt_state)

        return jax.lax.scan(advance, forward_mode_init(params, state, hyper), length=3)

    inner = {"optimizer": optimizer, "opt_state": state}
    undecayed, decayed = run(params, state, hyper, decay=1.0), run(params, state, hyper, decay=0.0)
    _, (_, _, all_params, states) = decayed
    before, state_before = jax.tree.map(lambda leaf: leaf[-1], (all_params, states))
    query = {"forward": ("forward", inner | {"steps": 3})}
    all_steps = hypergradients(params, hyper, train_loss, val_loss, query)["forward"]
    query = {"jvp": ("jvp", inner | {"opt_state": state_before})}
    last_step = hypergradients(before, hyper, train_loss, val_loss, query)["jvp"]
    for (_, (gradients, infos, *_)), (gradient, info) in ((undecayed, all_steps), (decayed, last_step)):
        assert_close(jax.tree.map(lambda leaf: leaf[-1], gradients), gradient, rtol=1e-8)
        np.testing.assert_allclose(infos.val_loss[-1], info.val_loss, rtol=1e-12)
        assert infos.finite.all()
    assert (undecayed[1][0]["ignored"] == 0).all()
    assert_close(undecayed[0].params, decayed[0].params, rtol=0, atol=0)


def test_non_finite_tangents_are_reset(float64):
    """A step with a non-finite derivative gives a zero gradient; later steps give non-zero ones again."""
    params, hyper, loss, val_loss = student()
    optimizer, carry = optax.sgd(0.1), None
    for broken in (False, True, False):
        carry = forward_mode_init(params, optimizer.init(params), hyper) if carry is None else carry

        def train_loss(params, hyper, t, broken=broken):
            singular = jnp.sqrt(0 * hyper["temperature"]) if broken else 0.0  # finite value, infinite derivative
            return loss(params, hyper, t) * (1 + singular)

        carry, gradient, info = jax.jit(
            functools.partial(forward_mode_step, train_loss=train_loss, val_loss=val_loss, optimizer=optimizer)
        )(carry, hyper)
        assert jax.tree.all(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), (carry, gradient)))
        assert info.finite and bool(gradient["mix"].any()) != broken


def test_zero_gradient_under_adam_gives_zero_tangents():
    """Adam's first step has no finite derivative at gradient 0; such parameters count as constant."""
    params, optimizer, lam = {"seen": jnp.ones(2), "unseen": jnp.ones(3)}, optax.adam(0.1, eps=0.5), jnp.float32(2)

    def train_loss(params, lam, t):
        return lam * jnp.square(params["seen"]).sum() + 0 * params["unseen"].sum()

    carry, gradient, info = forward_mode_step(
        forward_mode_init(params, optimizer.init(params), lam), lam, train_loss, optax.tree.norm, optimizer=optimizer
    )
    assert info.finite and gradient < 0
    seen, unseen = carry.tangents[:2]
    assert (seen < 0).all() and (unseen == 0).all()
