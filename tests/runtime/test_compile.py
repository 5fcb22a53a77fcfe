"""Compiler options keep convolutions on all cores and do not change results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill.runtime import compile

CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the options are for CPUs")


@pytest.fixture(autouse=True)
def fresh():
    compile.compiler_options.cache_clear()
    yield
    compile.compiler_options.cache_clear()


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@CPU
def test_convolutions_are_not_passed_to_the_single_core_library():
    x, kernel = (
        jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in ((4, 8, 8, 32), (3, 3, 32, 32))
    )
    plain, ours = jax.jit(convolved), compile.jit(convolved)
    texts = [function.lower(x, kernel).compile().as_text() for function in (plain, ours)]
    assert ["ynn" in text for text in texts] == [True, False]  # if the first fails, the option is obsolete
    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), rtol=1e-4, atol=1e-4)


@CPU
@pytest.mark.parametrize("name", compile.OPTIONS)
def test_xla_flags_of_the_user_take_precedence(monkeypatch, name):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compile.compiler_options() == compile.OPTIONS
    compile.compiler_options.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=0")
    assert compile.compiler_options() == {key: value for key, value in compile.OPTIONS.items() if key != name}


@CPU
def test_unknown_option_is_left_out_and_the_others_stay(monkeypatch):
    known = {"xla_llvm_disable_expensive_passes": True}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(compile, "OPTIONS", {"xla_cpu_no_such_option": "x", **known})
    assert compile.compiler_options() == known
    assert float(compile.jit(lambda x: x + 1)(1.0)) == 2.0
