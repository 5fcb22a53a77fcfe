"""Every hypergradient method is exact: for one step, several steps, or a weighted mean of copies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from ev3_distill.arms.tunable_loss import distillation
from ev3_distill.hypergrad import METHODS, hypergradient, student_train_loss, student_val_loss
from ev3_distill.tasks.classification import losses
from ev3_distill.types import Batch, Variables

KEY = jax.random.key(0)
ONE_STEP = ("jvp", "t1t2", "guided", "unrolled", "forward")
MULTI_STEP = ("unrolled", "forward")
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EVOGRAD_OPTIONS = {"copies": 4, "sigma": 1e-2, "tau": 0.5}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def student(seed=0):
    """A network with one hidden layer, and its kd and ce loss with a temperature, a mix and example weights, in float64."""
    rng = np.random.default_rng(seed)
    x, teacher, y = rng.normal(size=(2, 7, 3)), rng.normal(0, 2, (7, 4)), rng.integers(0, 4, (2, 7))
    params = {"w": rng.normal(size=(3, 5)), "out": (rng.normal(size=(5, 4)),)}
    hyper = {"temperature": 2.5, "mix": np.array([0.7, 0.3]), "weights": rng.uniform(0.5, 2, 7), "ignored": np.ones(2)}
    train, val = (
        Batch(jnp.asarray(x_), jnp.asarray(y_), {"logits": jnp.asarray(teacher)}, jnp.arange(7), jnp.ones(7))
        for x_, y_ in zip(x, y, strict=True)
    )

    def forward(params, x):
        return jnp.tanh(x @ params["w"]) @ params["out"][0]

    def train_loss(params, hyper, t):
        return distillation(hyper)(forward(params, train.inputs * (1 + 0.1 * t)), train)

    def val_loss(params):
        return losses.cross_entropy()(forward(params, val.inputs), val)

    return *(jax.tree.map(jnp.asarray, tree) for tree in (params, hyper)), train_loss, val_loss


def hypergradients(params, hyper, train_loss, val_loss, queries, *, key=KEY):
    """Results by name of `queries`, which holds (method, options). Compiled as one program to save test time."""

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def compute(key, params, hyper):
        return {
            name: hypergradient(key, params, hyper, train_loss, val_loss, method=method, **options)
            for name, (method, options) in queries.items()
        }

    return compute(key, params, hyper)


def queries_of_all_methods(optimizer):
    return {
        method: (method, EVOGRAD_OPTIONS if method == "evograd" else {"optimizer": optimizer}) for method in METHODS
    }


def warm_opt_state(optimizer, params, gradient):
    """Optimizer state after three steps."""
    state = optimizer.init(params)
    for factor in (1.0, -0.5, 2.0):
        _, state = optimizer.update(optax.tree.scale(factor, gradient), state, params)
    return state


def central_differences(function, hyper, e=1e-5):
    """Gradients of the M values of a function by central differences, and the values [M]."""
    flat, unravel = ravel_pytree(hyper)
    rows = jnp.stack([flat + side * row for side in (e, -e) for row in jnp.eye(len(flat))] + [flat])
    values = jax.jit(jax.vmap(lambda row: function(unravel(row))), compiler_options=FAST_COMPILE)(rows)
    above, below = jnp.split(values[:-1], 2)
    return [unravel(column) for column in ((above - below) / (2 * e)).T], values[-1]


def assert_close(one, other, *, rtol=1e-6, atol=1e-9):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), one, other)


def test_methods_agree_with_finite_differences(float64):
    """One and three steps of AdamW with a warm state, with respect to hyperparameters and learning rate."""
    params, hyper, train_loss, val_loss = student()
    optimizer = optax.adamw(0.05, weight_decay=0.1)
    gradient = jax.jit(jax.grad(train_loss))(params, hyper, 0)
    state = jax.jit(functools.partial(warm_opt_state, optimizer))(params, gradient)

    def losses_after_steps(inputs):
        def advance(carry, t):
            updates, opt_state = optimizer.update(
                jax.grad(train_loss)(carry[0], inputs["hyper"], t), carry[1], carry[0]
            )
            theta = optax.apply_updates(carry[0], optax.tree.scale(jnp.exp(inputs["log_rate"]), updates))
            return (theta, opt_state), val_loss(theta)

        return jax.lax.scan(advance, (params, state), jnp.arange(3))[1]

    inner = {"optimizer": optimizer, "opt_state": state}
    queries = {f"{method} of 1": (method, inner) for method in ONE_STEP}
    queries |= {f"{method} of 3": (method, inner | {"steps": 3}) for method in MULTI_STEP}
    queries["guided of 1"] = "guided", inner | {"radius": 1e-4}
    queries["jvp with its gradient passed in, of 1"] = "jvp", inner | {"gradient": gradient}
    queries["jvp with another gradient"] = "jvp", inner | {"gradient": optax.tree.scale(-1.0, gradient)}
    slopes, values = central_differences(losses_after_steps, {"hyper": hyper, "log_rate": jnp.zeros(())})
    results = hypergradients(params, hyper, train_loss, val_loss, queries)
    other, _ = results.pop("jvp with another gradient")
    assert not np.allclose(other["mix"], results["jvp of 1"][0]["mix"])  # a different step
    for name, (slope, info) in results.items():
        last = int(name[-1]) - 1
        expected, tolerance = slopes[last]["hyper"], 1e-4 if name.startswith("guided") else 2e-6
        assert_close(slope, expected, rtol=tolerance, atol=tolerance * float(optax.tree.norm(expected)))
        np.testing.assert_allclose(info.log_rate, slopes[last]["log_rate"], rtol=1e-6)
        np.testing.assert_allclose(info.val_loss, values[last], rtol=1e-12)
        assert info.finite and info.discarded == 0


def trees(*, most):
    """Random pytrees of float64 arrays, including scalars and empty containers."""
    shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
    arrays = st.tuples(shapes, st.integers(0, 99)).map(lambda case: np.random.default_rng(case[1]).normal(size=case[0]))
    nests = st.recursive(
        arrays, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    )
    return nests.filter(lambda tree: 0 < len(jax.tree.leaves(tree)) <= most)


@settings(deadline=None, max_examples=4)
@given(trees(most=3), trees(most=2))
def test_gradient_has_the_structure_of_any_pytree_and_methods_agree(params, hyper):
    with jax.enable_x64(True):

        def train_loss(theta, lambdas, t):
            angle = sum(jnp.sin(x).sum() for x in jax.tree.leaves(lambdas))
            return sum(jnp.square(jnp.cos(x * angle + i)).sum() for i, x in enumerate(jax.tree.leaves(theta)))

        def val_loss(theta):
            return sum(jnp.square(x - 0.3).sum() for x in jax.tree.leaves(theta))

        queries = queries_of_all_methods(optax.sgd(0.05))
        queries["guided"][1]["radius"] = 1e-5
        results = hypergradients(params, hyper, train_loss, val_loss, queries)
        gradients = {name: gradient for name, (gradient, _) in results.items()}
        for tree in gradients.values():
            assert jax.tree.structure(tree) == jax.tree.structure(hyper)
            assert [x.shape for x in jax.tree.leaves(tree)] == [x.shape for x in jax.tree.leaves(hyper)]
            assert all(x.dtype == jnp.float64 and jnp.isfinite(x).all() for x in jax.tree.leaves(tree))
        for method in ("jvp", "unrolled", "forward"):
            assert_close(gradients[method], gradients["t1t2"])
        assert_close(gradients["guided"], gradients["t1t2"], rtol=1e-4, atol=1e-6)


def test_unused_hyperparameter_gets_exactly_zero():
    params, hyper, train_loss, val_loss = student()
    queries = queries_of_all_methods(optax.adam(0.1))
    for gradient, _ in hypergradients(params, hyper, train_loss, val_loss, queries).values():
        assert (gradient["ignored"] == 0).all()
        assert all((jnp.abs(gradient[name]) > 0).all() for name in ("temperature", "mix", "weights"))
        assert gradient["weights"].dtype == jnp.float32


def test_evograd_equals_autodiff_through_its_weights(float64):
    """The reference differentiates softmax and the weighted mean of fixed copies, as the authors' code does."""
    params, hyper, train_loss, val_loss = student()
    k, sigma, tau = 3, 0.1, 0.5
    queries = {"evograd": ("evograd", {"copies": k, "sigma": sigma, "tau": tau, "at_once": 2})}
    evograd, info = hypergradients(params, hyper, train_loss, val_loss, queries)["evograd"]

    def perturbed(key):
        leaves, treedef = jax.tree.flatten(params)
        parts = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            treedef,
            [x + sigma * jax.random.rademacher(part, x.shape, x.dtype) for part, x in zip(parts, leaves, strict=True)],
        )

    copies = jax.vmap(perturbed)(jax.random.split(KEY, k))

    @jax.jit
    @jax.value_and_grad
    def reference(hyper):
        weights = jax.nn.softmax(-jax.vmap(lambda theta: train_loss(theta, hyper, 0))(copies) / tau)
        return val_loss(jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), copies))

    value, gradient = reference(hyper)
    assert_close(evograd, gradient)
    np.testing.assert_allclose(info.val_loss, value)
    assert jnp.isnan(info.log_rate)


def test_evograd_converges_to_a_randomly_projected_step_as_sigma_falls(float64):
    """The limit is -(sigma^2 / tau) / K sum_i <v, e_i - e'> <e_i - e', d2l/dtheta dlambda>, e' the mean of the e_i."""
    params, hyper, train_loss, val_loss = student()
    k, sigma, tau = 6, 1e-4, 0.5
    flat, unravel = ravel_pytree(params)
    _, back = ravel_pytree(hyper)

    options = {"copies": k, "sigma": sigma, "tau": tau}
    queries = {"published": ("evograd", options), "scaled": ("evograd", options | {"rate": 0.3})}
    results = hypergradients(params, hyper, train_loss, val_loss, queries)
    published = results["published"][0]

    def signs(key):
        parts = jax.random.split(key, len(jax.tree.leaves(params)))
        return jnp.concatenate(
            [
                jax.random.rademacher(part, x.shape, x.dtype).ravel()
                for part, x in zip(parts, jax.tree.leaves(params), strict=True)
            ]
        )

    e = jax.vmap(signs)(jax.random.split(KEY, k))
    e = e - e.mean(0)
    v, _ = ravel_pytree(jax.jit(jax.grad(val_loss))(params))
    of_hyper = jax.grad(train_loss, 1)
    cross = jax.jit(jax.jacfwd(lambda theta: ravel_pytree(of_hyper(unravel(theta), hyper, 0))[0]))(flat)
    projected = -(sigma**2 / tau) / k * (cross @ (e.T @ (e @ v)))
    assert_close(published, back(projected), rtol=1e-2, atol=1e-3 * float(jnp.abs(projected).max()))
    assert_close(results["scaled"][0], optax.tree.scale(0.3 * tau / sigma**2 * k / (k - 1), published))


def one_dimensional_losses():
    """l = (x - 1)^2 + lambda x^2 and V = (x - 1/2)^2, from section 4.1 of the EvoGrad paper."""
    return lambda x, lam, t: (x - 1) ** 2 + lam * x**2, lambda x: (x - 0.5) ** 2


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.0, 2.0])
def test_evograd_matches_the_published_closed_form_in_one_dimension(lam):
    """x ~ N(0, 1), 1,000 Gaussian copies, sigma 1, tau 0.5: within 3 standard errors of the closed form for K -> inf."""
    train_loss, val_loss = one_dimensional_losses()

    @jax.jit
    @jax.vmap
    def estimate(key):
        at, copies = jax.random.split(key)
        options = {"copies": 1000, "sigma": 1.0, "tau": 0.5, "noise": "gaussian", "at_once": 1000}
        x = jax.random.normal(at)
        return hypergradient(copies, x, jnp.float32(lam), train_loss, val_loss, method="evograd", **options)[0]

    estimates = estimate(jax.random.split(jax.random.key(int(100 * lam)), 400))
    closed = 8 * (8 * lam - 7) / (5 + 4 * lam) ** 3
    assert abs(estimates.mean() - closed) < 3 * estimates.std() / 20


def test_evograd_and_t1t2_equal_the_true_hypergradient_at_the_optimum():
    """At x*, EvoGrad with a small tau and T1-T2 with rate 1 / Hessian both give the implicit gradient."""
    train_loss, val_loss = one_dimensional_losses()
    lams = jnp.linspace(0.1, 2, 8)
    truth = (lams - 1) / (lams + 1) ** 3

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def estimate(lam, key):
        options = {"copies": 20_000, "sigma": 1.0, "tau": 0.02, "noise": "gaussian", "at_once": 20_000}
        return hypergradient(key, 1 / (1 + lam), lam, train_loss, val_loss, method="evograd", **options)[0]

    evograd = jnp.stack([estimate(lams, key) for key in jax.random.split(KEY, 20)]).mean(0)
    assert jnp.linalg.norm(evograd - truth) < 0.02 * jnp.linalg.norm(truth)
    for lam, expected in zip(lams, truth, strict=True):
        optimizer = optax.sgd(1 / (2 * (1 + lam)))
        t1t2, _ = hypergradient(KEY, 1 / (1 + lam), lam, train_loss, val_loss, optimizer=optimizer)
        np.testing.assert_allclose(t1t2, expected, rtol=1e-5, atol=1e-6)


def nan_loss_above(limit, statistic):
    """A student with a second train loss, which is NaN where a statistic of the parameters exceeds a limit."""
    params, hyper, train_loss, val_loss = student()

    def broken(params, hyper, t):
        return jnp.where(statistic(params) > limit, jnp.nan, 1.0) * train_loss(params, hyper, t)

    return params, hyper, broken, train_loss, val_loss


def test_copies_with_non_finite_loss_get_no_weight(float64):
    params, hyper, broken, train_loss, val_loss = nan_loss_above(
        float(student()[0]["w"][0, 0]), lambda params: params["w"][0, 0]
    )
    queries = {"evograd": ("evograd", {"copies": 9, "sigma": 0.05, "tau": 0.2})}
    gradient, info = hypergradients(params, hyper, broken, val_loss, queries)["evograd"]
    assert 0 < info.discarded < 8 and info.finite

    def huge_loss(params, hyper, t):  # finite, but the weight underflows to 0
        return jnp.where(params["w"][0, 0] > student()[0]["w"][0, 0], 1e9, train_loss(params, hyper, t))

    reference, info = hypergradients(params, hyper, huge_loss, val_loss, queries)["evograd"]
    assert_close(gradient, reference)
    assert info.discarded == 0


def test_non_finite_losses_give_a_zero_gradient():
    params, hyper, broken, train_loss, val_loss = nan_loss_above(-jnp.inf, lambda params: params["w"].sum())
    queries = queries_of_all_methods(optax.sgd(0.1))
    for train, val in ((broken, val_loss), (train_loss, lambda params: jnp.nan * val_loss(params))):
        results = hypergradients(params, hyper, train, val, queries)
        for gradient, info in results.values():
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
            assert not info.finite
        assert results["evograd"][1].discarded == (EVOGRAD_OPTIONS["copies"] if train is broken else 0)


def test_guided_gives_zero_and_counts_a_pair_with_non_finite_loss():
    params, hyper, train_loss, val_loss = student()
    limit = float(optax.tree.norm(params)) * (1 + 1e-6)

    def broken(params, hyper, t):
        return jnp.where(optax.tree.norm(params) > limit, jnp.nan, 1.0) * train_loss(params, hyper, t)

    options = {"optimizer": optax.sgd(0.1), "gradient": jax.jit(jax.grad(train_loss))(params, hyper, 0)}
    gradient, info = hypergradients(params, hyper, broken, val_loss, {"guided": ("guided", options)})["guided"]
    assert info.discarded >= 1 and not info.finite
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_zero_gradient_under_adam_gives_a_finite_hypergradient():
    """Adam's first step has no finite derivative at gradient 0; such parameters count as constant."""
    params = {"seen": jnp.ones(2), "unseen": jnp.ones(3)}

    def train_loss(params, lam, t):
        return lam * jnp.square(params["seen"]).sum() + 0 * params["unseen"].sum()

    gradient, info = hypergradient(
        KEY, params, jnp.float32(2), train_loss, optax.tree.norm, optimizer=optax.adam(0.1, eps=0.5)
    )
    assert info.finite and gradient < 0


def test_losses_are_deterministic_and_leave_batch_statistics_unchanged():
    """With dropout and batch statistics, repeated losses are equal and the variables stay the same."""
    train_flags = []

    def apply(variables, inputs, *, train, key=None):
        train_flags.append(train)
        hidden = inputs @ variables.params["w"]
        mean = hidden.mean(0) if train else variables.stats["mean"]
        mask = jax.random.bernoulli(KEY if key is None else key, 0.5, hidden.shape) if train else 1.0
        return jnp.tanh(hidden - mean) * mask, Variables(variables.params, {"mean": mean})

    variables = Variables({"w": jax.random.normal(KEY, (5, 3))}, {"mean": jnp.ones(3)})
    rng = np.random.default_rng(0)
    batches = [
        Batch(
            jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), jnp.asarray(rng.integers(0, 3, 4)),
            {"logits": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}, jnp.arange(4), jnp.ones(4),
        ) for _ in range(2)
    ]  # fmt: skip
    hyper = {"temperature": jnp.float32(2), "mix": jnp.array([0.5, 0.5])}
    train, val = batches
    train_loss = student_train_loss(
        apply, variables.stats, train, lambda hyper, *of: distillation(hyper)(*of), key=jax.random.key(1)
    )
    val_loss = student_val_loss(
        apply, variables.stats, val, losses.cross_entropy(), key=jax.random.key(1), batch_statistics=False
    )
    before = jax.tree.map(jnp.copy, variables)
    values = [(train_loss(variables.params, hyper, 0), val_loss(variables.params)) for _ in "12"]
    assert values[0] == values[1] and train_flags == [True, False] * 2
    queries = {method: (method, {"optimizer": optax.sgd(0.1)}) for method in ("jvp", "unrolled")}
    results = hypergradients(variables.params, hyper, train_loss, val_loss, queries)
    assert_close(results["jvp"][0], results["unrolled"][0], rtol=1e-4, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def temporary_bytes(function, *args):
    """Temporary memory of a compiled function in bytes."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_evograd_memory_does_not_grow_with_copies():
    params, hyper = {"w": jnp.ones((400, 400))}, jnp.ones(3)

    def train_loss(params, hyper, t):
        return jnp.square(jnp.tanh(params["w"]).sum(1)[:3] * hyper).sum()

    def evograd(copies):
        options = {"method": "evograd", "copies": copies}
        return lambda key, params: hypergradient(
            key, params, hyper, train_loss, lambda p: jnp.square(p["w"]).sum(), **options
        )

    assert temporary_bytes(evograd(64), KEY, params) < 1.05 * temporary_bytes(evograd(2), KEY, params)


def test_forward_memory_does_not_grow_with_steps():
    params, _, train_loss, val_loss = student()
    hyper = jnp.float32(2)

    def bytes_of(method, steps):
        def loss(params, temperature, t):
            return train_loss(params, {"temperature": temperature, "mix": jnp.ones(2)}, t)

        options = {"method": method, "steps": steps, "optimizer": optax.sgd(0.1)}
        return temporary_bytes(lambda params: hypergradient(KEY, params, hyper, loss, val_loss, **options), params)

    assert bytes_of("forward", 64) < 1.1 * bytes_of("forward", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "evo"}, "the method must be one of jvp, guided, evograd, t1t2, unrolled, forward; got 'evo'"),
        ({"method": "evograd", "copies": 1}, "at least 2 copies; got 1"),
        ({"method": "evograd", "noise": "uniform"}, "noise must be one of rademacher, gaussian; got 'uniform'"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    params, hyper, train_loss, val_loss = student()
    with pytest.raises(ValueError, match=message):
        hypergradient(KEY, params, hyper, train_loss, val_loss, **options)
