"""Convolution and BatchNorm equal XLA's and Flax's, with gradients and transformations, by XLA and by compiled kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ev3_distill.students.layers import BatchNorm, Conv, compiled, convolve

# x, kernel, strides, groups: batches below, at and beside the chunk size; even, odd and flat images; kernels of all sorts
CASES = {
    "plain": ((16, 8, 8, 3), (3, 3, 3, 4), (1, 1), 1),
    "strided": ((5, 8, 8, 4), (3, 3, 4, 6), (2, 2), 1),
    "odd, in three chunks": ((37, 7, 9, 2), (3, 3, 2, 3), (2, 2), 1),
    "one pixel": ((2, 1, 1, 3), (3, 3, 3, 2), (2, 2), 1),
    "strides beyond the kernel": ((3, 9, 8, 2), (3, 2, 2, 2), (4, 3), 1),
    "large even kernel": ((3, 6, 5, 2), (4, 6, 2, 3), (1, 2), 1),
    "sequence": ((20, 1, 15, 2), (1, 5, 2, 3), (1, 2), 1),
    "pointwise": ((4, 5, 6, 3), (1, 1, 3, 4), (1, 1), 1),
    "pointwise, strided": ((4, 5, 6, 3), (1, 1, 3, 4), (2, 3), 1),
    "groups": ((18, 6, 6, 4), (3, 3, 2, 6), (1, 1), 2),
    "depthwise": ((4, 7, 8, 5), (3, 3, 1, 5), (1, 1), 5),
    "depthwise, strided": ((4, 7, 8, 5), (3, 3, 1, 5), (2, 2), 5),
    "depthwise, wide": ((4, 6, 6, 3), (5, 3, 1, 6), (2, 1), 3),
    "one channel": ((4, 6, 6, 1), (3, 3, 1, 4), (1, 1), 1),
    "many channels": ((18, 7, 6, 20), (3, 3, 20, 24), (1, 1), 1),
    "many channels, strided": ((33, 8, 9, 16), (3, 3, 16, 33), (2, 2), 1),
    "many channels, large even kernel": ((3, 6, 5, 9), (4, 6, 9, 17), (1, 2), 1),
    "many channels, pixels that no stride reaches": ((3, 9, 9, 10), (3, 2, 10, 9), (4, 3), 1),
    "long sequence": ((17, 1, 200, 12), (1, 5, 12, 8), (1, 2), 1),
    "large image": ((2, 65, 70, 8), (3, 3, 8, 9), (2, 2), 1),
    "image in bands": ((2, 150, 70, 20), (3, 5, 20, 17), (2, 1), 1),
    "many tiles": ((40, 15, 16, 18), (3, 3, 18, 35), (1, 1), 1),
    "depthwise, many channels": ((9, 9, 14, 37), (3, 5, 1, 37), (2, 2), 37),
}


@pytest.fixture(scope="module", params=["XLA", "kernels"], autouse=True)
def library(request):
    """Runs the tests with XLA and with the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EV3_DISTILL_KERNELS", "0" if request.param == "XLA" else "1")
        fresh()
        if request.param == "XLA":
            assert not compiled.available()
        elif not compiled.available():
            pytest.skip(f"the kernels do not work here: {compiled.reason()}")
        yield
    fresh()


def fresh():
    compiled.reason.cache_clear()
    jax.clear_caches()


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request):
    x, kernel, strides, groups = CASES[request.param]
    args, tangents = (normal(x), normal(kernel)), (normal(x, seed=1), normal(kernel, seed=1))
    return lambda *a: convolve(*a, strides, groups), lambda *a: reference(*a, strides, groups), args, tangents


def normal(shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def reference(x, kernel, strides, groups):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def assert_close(one, other, tolerance=1e-5):
    """Relative to the largest entry of each leaf."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape
        scale = float(jnp.abs(b).max()) + 1e-30
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, rtol=0, atol=tolerance)


def test_values_and_derivatives_equal_those_of_xla(case):
    ours, theirs, args, tangents = case

    def everything(f):
        def of(args, tangents):
            out, pulled = jax.vjp(f, *args)
            return out, pulled(normal(out.shape)), jax.jvp(f, args, tangents)

        return jax.jit(of)(args, tangents)

    assert_close(everything(ours), everything(theirs))


def test_kernels_are_called_if_available_and_for_float32_only():
    def text(dtype):
        of = jax.jit(jax.grad(lambda w: convolve(jnp.ones((2, 4, 4, 8), dtype), w).sum()))
        return of.lower(jnp.ones((3, 3, 8, 8), dtype)).as_text()

    assert text("float32").count("@ev3_convolution_kernel") == compiled.available()
    assert "ev3_convolution" not in text("bfloat16")


def test_a_shifting_kernel_by_hand():
    """A kernel that shifts left by one, and its gradients, are known."""
    x = jnp.arange(1.0, 7.0).reshape(1, 2, 3, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 2].set(2.0)
    out, pulled = jax.vjp(convolve, x, kernel)
    np.testing.assert_array_equal(out[0, :, :, 0], [[4, 6, 0], [10, 12, 0]])
    dx, dkernel = pulled(jnp.zeros_like(out).at[0, 0, 0, 0].set(1.0))
    np.testing.assert_array_equal(dx[0, :, :, 0], [[0, 2, 0], [0, 0, 0]])
    np.testing.assert_array_equal(dkernel[:, :, 0, 0], [[0, 0, 0], [0, 1, 2], [0, 4, 5]])


@pytest.mark.parametrize("axes", [(3, None), (None, 0), (0, 2)])
def test_vmap_equals_that_of_xla(axes):
    shapes = [(3, 5, 4, 2), (3, 3, 2, 4)]
    args = []
    for shape, axis in zip(shapes, axes, strict=True):
        full = list(shape)
        if axis is not None:
            full.insert(axis, 2)
        args.append(normal(full))

    def results(f):
        one = jax.value_and_grad(lambda *a: jnp.sin(f(*a)).sum(), argnums=(0, 1))
        of_sum = jax.grad(lambda *a: jnp.sin(jax.vmap(f, axes)(*a)).sum(), argnums=(0, 1))
        return jax.jit(jax.vmap(one, axes))(*args), jax.jit(of_sum)(*args)

    assert_close(results(convolve), results(lambda x, kernel: reference(x, kernel, (1, 1), 1)))


@pytest.mark.parametrize("groups", [1, 4])
def test_second_derivatives_equal_those_of_xla(groups):
    x, kernel = normal((3, 4, 4, 4)), normal((3, 3, 4 // groups, 4))

    def product(f):
        def loss(kernel):
            return jnp.sin(f(x, kernel, (1, 1), groups)).sum()

        forward_over_reverse = jax.jvp(jax.grad(loss), (kernel,), (jnp.cos(kernel),))[1]
        reverse_over_forward = jax.grad(lambda k: jax.jvp(loss, (k,), (jnp.cos(kernel),))[1])(kernel)
        return forward_over_reverse, reverse_over_forward

    assert_close(jax.jit(product, static_argnums=0)(convolve), jax.jit(product, static_argnums=0)(reference))


def test_conv_module_has_he_normal_kernel():
    conv = Conv(4, 6, (1, 3), strides=(1, 2), groups=2, rngs=nnx.Rngs(0))
    assert conv.kernel.shape == (1, 3, 2, 6)
    assert conv(jnp.ones((2, 1, 9, 4))).shape == (2, 1, 5, 6)
    wide = Conv(64, 64, rngs=nnx.Rngs(0)).kernel[...]
    np.testing.assert_allclose(wide.std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)  # He, fan out


def test_other_backends_use_the_standard_convolution(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
    assert "conv_general_dilated" in str(jax.make_jaxpr(lambda *a: convolve(*a, (1, 1), 2))(x, kernel))
    assert "students_conv" not in str(jax.make_jaxpr(convolve)(x, jnp.ones((3, 3, 2, 2))))


@pytest.mark.parametrize("shape", [(37, 5, 7, 6), (12, 6), (8, 3, 6)])
def test_batch_norm_equals_that_of_flax(shape):
    x, g = 0.5 + 2 * normal(shape), normal(shape, seed=1)
    pair = BatchNorm(6, rngs=nnx.Rngs(0)), nnx.BatchNorm(6, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
    results = []
    for norm in pair:
        norm.scale[...], norm.bias[...] = normal((6,)), normal((6,), seed=1)
        graph, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)
        params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

        def forward(params, x, graph=graph, stats=stats):
            norm = nnx.merge(graph, nnx.State(params), nnx.State(stats))
            out = norm(x)
            return out, nnx.to_pure_dict(nnx.split(norm, nnx.Param, nnx.BatchStat)[2])

        def both(params, x, forward=forward):
            out, pulled, moved = jax.vjp(forward, params, x, has_aux=True)
            return out, pulled(g), moved

        trained = jax.jit(both)(params, x)
        norm(x)
        norm.eval()
        results.append((trained, norm(x)))
    assert_close(*results)


def test_batch_norm_of_a_constant_is_its_bias():
    def forward(x):
        norm = BatchNorm(2, rngs=nnx.Rngs(0))
        norm.bias[...] = jnp.array([3.0, -1.0])
        return norm(x)

    out, pulled = jax.vjp(forward, jnp.full((4, 2), 5.0))
    np.testing.assert_allclose(out, [[3, -1]] * 4, atol=1e-4)
    assert jnp.isfinite(pulled(jnp.ones((4, 2)))[0]).all()


def test_batch_norm_follows_train_and_eval():
    norm = BatchNorm(1, rngs=nnx.Rngs(0))
    norm.eval()
    norm(jnp.full((2, 1), 4.0))
    assert norm.mean[...] == 0
    norm.train()
    norm(jnp.array([[2.0], [4.0]]))
    np.testing.assert_allclose((norm.mean[0], norm.var[0]), (0.3, 1.0), rtol=1e-6)  # .1 * 3, .9 * 1 + .1 * 1
