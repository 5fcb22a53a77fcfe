"""Every method is the derivative that it says it is: of one step, of several, or of a weighted mean of copies."""

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
OF_A_STEP = ("jvp", "t1t2", "guided", "unrolled", "forward")
OF_STEPS = ("unrolled", "forward")
EXACT = ("jvp", "t1t2", "unrolled", "forward")
SWIFTLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiled
RANDOM = {"copies": 4, "sigma": 1e-2, "tau": 0.5}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def student(seed=0):
    """A network of one hidden layer under kd and ce, whose loss has a temperature, a mix and weights; in float64."""
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


def ask(params, hyper, train_loss, val_loss, asked, *, key=KEY):
    """What methods say, by name; `asked` holds (method, options). One program: compiling is most of a test's time."""

    @functools.partial(jax.jit, compiler_options=SWIFTLY)
    def together(key, params, hyper):
        return {
            name: hypergradient(key, params, hyper, train_loss, val_loss, method=method, **options)
            for name, (method, options) in asked.items()
        }

    return together(key, params, hyper)


def of_every_method(optimizer):
    return {method: (method, RANDOM if method == "evograd" else {"optimizer": optimizer}) for method in METHODS}


def warm(optimizer, params, gradient):
    """The state of an optimizer after three steps."""
    state = optimizer.init(params)
    for factor in (1.0, -0.5, 2.0):
        _, state = optimizer.update(optax.tree.scale(factor, gradient), state, params)
    return state


def differences(function, hyper, e=1e-5):
    """The gradients [M] of a function with values [M] by central differences, and the values."""
    flat, unravel = ravel_pytree(hyper)
    rows = jnp.stack([flat + side * row for side in (e, -e) for row in jnp.eye(len(flat))] + [flat])
    values = jax.jit(jax.vmap(lambda row: function(unravel(row))), compiler_options=SWIFTLY)(rows)
    above, below = jnp.split(values[:-1], 2)
    return [unravel(column) for column in ((above - below) / (2 * e)).T], values[-1]


def assert_close(one, other, *, rtol=1e-6, atol=1e-9):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), one, other)


def test_methods_agree_with_finite_differences(float64):
    """One step and three of AdamW, whose state has seen gradients before, in hyperparameters and in the learning rate."""
    params, hyper, train_loss, val_loss = student()
    optimizer = optax.adamw(0.05, weight_decay=0.1)
    gradient = jax.jit(jax.grad(train_loss))(params, hyper, 0)
    state = jax.jit(functools.partial(warm, optimizer))(params, gradient)

    def reached(given):
        def advance(carry, t):
            updates, opt_state = optimizer.update(jax.grad(train_loss)(carry[0], given["hyper"], t), carry[1], carry[0])
            theta = optax.apply_updates(carry[0], optax.tree.scale(jnp.exp(given["log_rate"]), updates))
            return (theta, opt_state), val_loss(theta)

        return jax.lax.scan(advance, (params, state), jnp.arange(3))[1]

    own = {"optimizer": optimizer, "opt_state": state}
    asked = {f"{method} of 1": (method, own) for method in OF_A_STEP}
    asked |= {f"{method} of 3": (method, own | {"steps": 3}) for method in OF_STEPS}
    asked["guided of 1"] = "guided", own | {"radius": 1e-4}
    asked["jvp, with the gradient at hand, of 1"] = "jvp", own | {"gradient": gradient}
    asked["jvp, with another"] = "jvp", own | {"gradient": optax.tree.scale(-1.0, gradient)}
    slopes, values = differences(reached, {"hyper": hyper, "log_rate": jnp.zeros(())})
    found = ask(params, hyper, train_loss, val_loss, asked)
    assert not np.allclose(found.pop("jvp, with another")[0]["mix"], found["jvp of 1"][0]["mix"])  # another theta'
    for which, (slope, info) in found.items():
        last = int(which[-1]) - 1
        truth, tolerance = slopes[last]["hyper"], 1e-4 if which.startswith("guided") else 2e-6
        assert_close(slope, truth, rtol=tolerance, atol=tolerance * float(optax.tree.norm(truth)))
        np.testing.assert_allclose(info.log_rate, slopes[last]["log_rate"], rtol=1e-6)
        np.testing.assert_allclose(info.val_loss, values[last], rtol=1e-12)
        assert info.finite and info.discarded == 0


def trees(*, most):
    """Pytrees of float64 arrays of a few shapes, scalars and empty nests among them."""
    shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
    arrays = st.tuples(shapes, st.integers(0, 99)).map(lambda made: np.random.default_rng(made[1]).normal(size=made[0]))
    nests = st.recursive(
        arrays, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    )
    return nests.filter(lambda tree: 0 < len(jax.tree.leaves(tree)) <= most)


@settings(deadline=None, max_examples=4)
@given(trees(most=3), trees(most=2))
def test_any_pytree_keeps_its_form_and_methods_agree(params, hyper):
    with jax.enable_x64(True):

        def train_loss(theta, lambdas, t):
            angle = sum(jnp.sin(x).sum() for x in jax.tree.leaves(lambdas))
            return sum(jnp.square(jnp.cos(x * angle + i)).sum() for i, x in enumerate(jax.tree.leaves(theta)))

        def val_loss(theta):
            return sum(jnp.square(x - 0.3).sum() for x in jax.tree.leaves(theta))

        asked = of_every_method(optax.sgd(0.05))
        asked["guided"][1]["radius"] = 1e-5
        found = {name: gradient for name, (gradient, _) in ask(params, hyper, train_loss, val_loss, asked).items()}
        for got in found.values():
            assert jax.tree.structure(got) == jax.tree.structure(hyper)
            assert [x.shape for x in jax.tree.leaves(got)] == [x.shape for x in jax.tree.leaves(hyper)]
            assert all(x.dtype == jnp.float64 and jnp.isfinite(x).all() for x in jax.tree.leaves(got))
        for method in ("jvp", "unrolled", "forward"):
            assert_close(found[method], found["t1t2"])
        assert_close(found["guided"], found["t1t2"], rtol=1e-4, atol=1e-6)


def test_what_the_loss_ignores_gets_exactly_zero():
    params, hyper, train_loss, val_loss = student()
    for gradient, _ in ask(params, hyper, train_loss, val_loss, of_every_method(optax.adam(0.1))).values():
        assert (gradient["ignored"] == 0).all()
        assert all((jnp.abs(gradient[name]) > 0).all() for name in ("temperature", "mix", "weights"))
        assert gradient["weights"].dtype == jnp.float32


def test_evograd_is_the_gradient_through_its_weights(float64):
    """Autodiff through softmax and the weighted mean of copies that are held, as the authors' code does."""
    params, hyper, train_loss, val_loss = student()
    k, sigma, tau = 3, 0.1, 0.5
    options = {"copies": k, "sigma": sigma, "tau": tau}
    got, info = ask(params, hyper, train_loss, val_loss, {"evograd": ("evograd", options | {"at_once": 2})})["evograd"]

    def drawn(key):
        leaves, treedef = jax.tree.flatten(params)
        parts = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            treedef,
            [x + sigma * jax.random.rademacher(part, x.shape, x.dtype) for part, x in zip(parts, leaves, strict=True)],
        )

    copies = jax.vmap(drawn)(jax.random.split(KEY, k))

    @jax.jit
    @jax.value_and_grad
    def through(hyper):
        weights = jax.nn.softmax(-jax.vmap(lambda theta: train_loss(theta, hyper, 0))(copies) / tau)
        return val_loss(jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), copies))

    value, gradient = through(hyper)
    assert_close(got, gradient)
    np.testing.assert_allclose(info.val_loss, value)
    assert jnp.isnan(info.log_rate)


def test_evograd_tends_to_a_randomly_projected_step(float64):
    """As sigma falls: -(sigma^2 / tau) / K sum_i <v, e_i - e'> <e_i - e', d2l/dtheta dlambda>, e' the mean of the e_i."""
    params, hyper, train_loss, val_loss = student()
    k, sigma, tau = 6, 1e-4, 0.5
    flat, unravel = ravel_pytree(params)
    _, back = ravel_pytree(hyper)

    options = {"copies": k, "sigma": sigma, "tau": tau}
    asked = {"published": ("evograd", options), "scaled": ("evograd", options | {"rate": 0.3})}
    found = ask(params, hyper, train_loss, val_loss, asked)
    published = found["published"][0]

    def drawn(key):
        parts = jax.random.split(key, len(jax.tree.leaves(params)))
        return jnp.concatenate(
            [
                jax.random.rademacher(part, x.shape, x.dtype).ravel()
                for part, x in zip(parts, jax.tree.leaves(params), strict=True)
            ]
        )

    e = jax.vmap(drawn)(jax.random.split(KEY, k))
    e = e - e.mean(0)
    v, _ = ravel_pytree(jax.jit(jax.grad(val_loss))(params))
    of_hyper = jax.grad(train_loss, 1)
    cross = jax.jit(jax.jacfwd(lambda theta: ravel_pytree(of_hyper(unravel(theta), hyper, 0))[0]))(flat)
    projected = -(sigma**2 / tau) / k * (cross @ (e.T @ (e @ v)))
    assert_close(published, back(projected), rtol=1e-2, atol=1e-3 * float(jnp.abs(projected).max()))
    assert_close(found["scaled"][0], optax.tree.scale(0.3 * tau / sigma**2 * k / (k - 1), published))


def one_dimension():
    """l = (x - 1)^2 + lambda x^2 and V = (x - 1/2)^2, from the paper's section 4.1."""
    return lambda x, lam, t: (x - 1) ** 2 + lam * x**2, lambda x: (x - 0.5) ** 2


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.0, 2.0])
def test_one_dimension_as_published(lam):
    """x from N(0, 1), K = 1,000 Gaussian copies of sigma 1, tau .5: within 3 standard errors of the closed form of K -> inf."""
    train_loss, val_loss = one_dimension()

    @jax.jit
    @jax.vmap
    def estimate(key):
        at, copies = jax.random.split(key)
        options = {"copies": 1000, "sigma": 1.0, "tau": 0.5, "noise": "gaussian", "at_once": 1000}
        x = jax.random.normal(at)
        return hypergradient(copies, x, jnp.float32(lam), train_loss, val_loss, method="evograd", **options)[0]

    found = estimate(jax.random.split(jax.random.key(int(100 * lam)), 400))
    closed = 8 * (8 * lam - 7) / (5 + 4 * lam) ** 3
    assert abs(found.mean() - closed) < 3 * found.std() / 20


def test_one_dimension_at_the_optimum():
    """From x* EvoGrad of a small tau weights its copies by the inverse Hessian: the truth, as T1-T2 of that rate gives it."""
    train_loss, val_loss = one_dimension()
    lams = jnp.linspace(0.1, 2, 8)
    truth = (lams - 1) / (lams + 1) ** 3

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def estimate(lam, key):
        options = {"copies": 20_000, "sigma": 1.0, "tau": 0.02, "noise": "gaussian", "at_once": 20_000}
        return hypergradient(key, 1 / (1 + lam), lam, train_loss, val_loss, method="evograd", **options)[0]

    found = jnp.stack([estimate(lams, key) for key in jax.random.split(KEY, 20)]).mean(0)
    assert jnp.linalg.norm(found - truth) < 0.02 * jnp.linalg.norm(truth)
    for lam, want in zip(lams, truth, strict=True):
        optimizer = optax.sgd(1 / (2 * (1 + lam)))
        got, _ = hypergradient(KEY, 1 / (1 + lam), lam, train_loss, val_loss, optimizer=optimizer)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def broken_beyond(limit, at):
    """A loss that is nan where a parameter exceeds a limit."""
    params, hyper, train_loss, val_loss = student()

    def broken(params, hyper, t):
        return jnp.where(at(params) > limit, jnp.nan, 1.0) * train_loss(params, hyper, t)

    return params, hyper, broken, train_loss, val_loss


def test_copies_that_are_not_finite_get_no_weight(float64):
    params, hyper, broken, train_loss, val_loss = broken_beyond(
        float(student()[0]["w"][0, 0]), lambda params: params["w"][0, 0]
    )
    asked = {"evograd": ("evograd", {"copies": 9, "sigma": 0.05, "tau": 0.2})}
    gradient, info = ask(params, hyper, broken, val_loss, asked)["evograd"]
    assert 0 < info.discarded < 8 and info.finite

    def outlawed(params, hyper, t):  # finite, and of no weight
        return jnp.where(params["w"][0, 0] > student()[0]["w"][0, 0], 1e9, train_loss(params, hyper, t))

    whole, info = ask(params, hyper, outlawed, val_loss, asked)["evograd"]
    assert_close(gradient, whole)
    assert info.discarded == 0


def test_what_is_not_finite_gives_zero():
    params, hyper, broken, train_loss, val_loss = broken_beyond(-jnp.inf, lambda params: params["w"].sum())
    asked = of_every_method(optax.sgd(0.1))
    for train, val in ((broken, val_loss), (train_loss, lambda params: jnp.nan * val_loss(params))):
        found = ask(params, hyper, train, val, asked)
        for gradient, info in found.values():
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
            assert not info.finite
        assert found["evograd"][1].discarded == (RANDOM["copies"] if train is broken else 0)


def test_guided_leaves_out_a_pair_that_is_not_finite():
    params, hyper, train_loss, val_loss = student()
    limit = float(optax.tree.norm(params)) * (1 + 1e-6)

    def broken(params, hyper, t):
        return jnp.where(optax.tree.norm(params) > limit, jnp.nan, 1.0) * train_loss(params, hyper, t)

    options = {"optimizer": optax.sgd(0.1), "gradient": jax.jit(jax.grad(train_loss))(params, hyper, 0)}
    gradient, info = ask(params, hyper, broken, val_loss, {"guided": ("guided", options)})["guided"]
    assert info.discarded >= 1 and not info.finite
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_an_optimizer_without_a_derivative_at_zero():
    """Adam at a gradient of 0 from a start: its derivative is not finite, and the parameter counts as still."""
    params = {"seen": jnp.ones(2), "unseen": jnp.ones(3)}

    def train_loss(params, lam, t):
        return lam * jnp.square(params["seen"]).sum() + 0 * params["unseen"].sum()

    gradient, info = hypergradient(
        KEY, params, jnp.float32(2), train_loss, optax.tree.norm, optimizer=optax.adam(0.1, eps=0.5)
    )
    assert info.finite and gradient < 0


def test_copies_share_random_numbers_and_leave_no_statistics():
    """A student with dropout and batch statistics: of its losses nothing is random, and its variables are not touched."""
    seen = []

    def apply(variables, inputs, *, train, key=None):
        seen.append(train)
        hidden = inputs @ variables.params["w"]
        mean = hidden.mean(0) if train else variables.stats["mean"]
        kept = jax.random.bernoulli(KEY if key is None else key, 0.5, hidden.shape) if train else 1.0
        return jnp.tanh(hidden - mean) * kept, Variables(variables.params, {"mean": mean})

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
    twice = [(train_loss(variables.params, hyper, 0), val_loss(variables.params)) for _ in "12"]
    assert twice[0] == twice[1] and seen == [True, False] * 2
    asked = {method: (method, {"optimizer": optax.sgd(0.1)}) for method in ("jvp", "unrolled")}
    found = ask(variables.params, hyper, train_loss, val_loss, asked)
    assert_close(found["jvp"][0], found["unrolled"][0], rtol=1e-4, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def memory_of(function, *args):
    """Bytes that a program needs beside its arguments and results."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_evograd_is_flat_in_its_copies():
    params, hyper = {"w": jnp.ones((400, 400))}, jnp.ones(3)

    def train_loss(params, hyper, t):
        return jnp.square(jnp.tanh(params["w"]).sum(1)[:3] * hyper).sum()

    def of(copies):
        options = {"method": "evograd", "copies": copies}
        return lambda key, params: hypergradient(
            key, params, hyper, train_loss, lambda p: jnp.square(p["w"]).sum(), **options
        )

    assert memory_of(of(64), KEY, params) < 1.05 * memory_of(of(2), KEY, params)


def test_memory_of_forward_is_flat_in_its_steps():
    params, _, train_loss, val_loss = student()
    hyper = jnp.float32(2)

    def of(method, steps):
        def loss(params, temperature, t):
            return train_loss(params, {"temperature": temperature, "mix": jnp.ones(2)}, t)

        options = {"method": method, "steps": steps, "optimizer": optax.sgd(0.1)}
        return memory_of(lambda params: hypergradient(KEY, params, hyper, loss, val_loss, **options), params)

    assert of("forward", 64) < 1.1 * of("forward", 8)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "evo"}, "the method must be one of jvp, guided, evograd, t1t2, unrolled, forward; got 'evo'"),
        ({"method": "evograd", "copies": 1}, "at least 2 copies; got 1"),
        ({"method": "evograd", "noise": "uniform"}, "noise must be one of rademacher, gaussian; got 'uniform'"),
    ],
)
def test_mistakes_are_told(options, told):
    params, hyper, train_loss, val_loss = student()
    with pytest.raises(ValueError, match=told):
        hypergradient(KEY, params, hyper, train_loss, val_loss, **options)
