"""How programs are compiled: convolutions stay with the library that uses all cores, and the results stay what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill.runtime import compile

CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="options are for CPUs alone")


@pytest.fixture(autouse=True)
def fresh():
    compile.compiler_options.cache_clear()
    yield
    compile.compiler_options.cache_clear()


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@CPU
def test_convolutions_are_not_handed_to_one_core():
    x, kernel = (
        jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in ((4, 8, 8, 32), (3, 3, 32, 32))
    )
    plain, ours = jax.jit(convolved), compile.jit(convolved)
    told = [function.lower(x, kernel).compile().as_text() for function in (plain, ours)]
    assert ["ynn" in text for text in told] == [True, False]  # without the first there is nothing left to mend
    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), rtol=1e-4, atol=1e-4)


@CPU
def test_what_the_user_decides_stands(monkeypatch):
    assert compile.compiler_options()
    compile.compiler_options.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", f"--{compile.FUSION}=LIBRARY_FUSION_TYPE_DOT")
    assert compile.compiler_options() == {}


def test_another_jaxlib_may_not_know_the_option(monkeypatch):
    monkeypatch.setattr(compile, "FUSION", "xla_cpu_no_such_option")
    assert compile.compiler_options() == {}
    assert float(compile.jit(lambda x: x + 1)(1.0)) == 2.0
