"""Growth keeps the function of every family and of a user's student, and everything new learns."""

import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from student_zoo import (
    CLASSES,
    DRAWN,
    MEMBERS,
    MOVES,
    Own,
    at,
    bits,
    both,
    case,
    every_case,
    every_member,
    factory_of,
    member,
    own_grows,
    quick,
    relative_difference,
    shapes,
    trained,
)

from ev3_distill import students
from ev3_distill.arms import arms_named
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.arms.optimizers import adamw, muon, sgd
from ev3_distill.errors import InputError
from ev3_distill.students.growth import Space, grow, growth_map, moves
from ev3_distill.types import Batch, Stretch


def test_every_family_grows():
    assert set(MEMBERS) == set(MOVES) == {*students.FAMILIES, "own"}
    for name, of_name in MOVES.items():
        assert [*moves(member(name).network.spec, factory=factory_of(name))] == [
            m for m in of_name if isinstance(m, str)
        ]


@every_case
def test_growth_keeps_the_function(name, move):
    one = case(name, move)
    assert shapes(one.variables) == shapes(jax.eval_shape(one.growth.network.init, jax.random.key(0)))
    assert relative_difference(one.eval_logits, one.member.eval_logits) < 1e-5
    assert relative_difference(one.train_logits, one.member.train_logits) < 1e-4
    assert json.loads(json.dumps(one.growth.network.spec)) == one.growth.network.spec


@every_case
def test_every_parameter_learns_and_copies_diverge(name, move):
    """After some training, every entry has moved and no two copies are equal."""
    one = case(name, move)
    for path, leaf in one.growth.params.items():
        after, before = (np.asarray(at(variables.params, path)) for variables in (one.trained, one.variables))
        assert np.abs(after - before).min() > 0, path
        for dimension, index in leaf.copies if after.ndim > 1 else ():
            rows = np.moveaxis(after, dimension, 0)
            pairs = [(i, j) for j in range(len(index)) for i in range(j) if index[i] == index[j]]
            assert pairs
            assert min(np.abs(rows[i] - rows[j]).max() for i, j in pairs) > 1e-4, path


@every_case
def test_moments_grow_with_the_parameters(name, move):
    """Growth keeps the inner product of gradient and direction, and a step m / sqrt(v) grows as parameters do."""
    one, rng = case(name, move), np.random.default_rng(1)
    params = one.member.variables.params
    g, d, v = (jax.tree.map(lambda leaf: rng.uniform(0.5, 2, leaf.shape).astype(np.float32), params) for _ in range(3))
    grown_g, grown_v = one.growth.like_gradient(g), one.growth.like_second_moment(v)
    for tree in (grown_g, grown_v):
        assert shapes(tree) == shapes(one.variables.params)
    zero = one.growth.like_params(jax.tree.map(np.zeros_like, g))
    steps, grown_d = (
        jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), one.growth.like_params(tree), zero)
        for tree in (jax.tree.map(lambda m, v: m / np.sqrt(v), g, v), d)
    )
    old, new = (jax.tree.map(np.vdot, *pair) for pair in ((g, d), (grown_g, grown_d)))
    np.testing.assert_allclose(*(sum(jax.tree.leaves(products)) for products in (new, old)), rtol=1e-5)
    for path, leaf in one.growth.params.items():
        of_step, of_g, of_v = (np.asarray(at(tree, path)) for tree in (steps, grown_g, grown_v))
        if leaf.new is None:
            np.testing.assert_allclose(of_g / np.sqrt(of_v), of_step, rtol=1e-4)
        else:
            assert not of_g.any()
            assert 0.5 < of_v.min() == of_v.max() < 2


@pytest.mark.parametrize(("name", "move"), [("mlp", '"wider"'), ("mlp", '"deeper"'), ("own", '"wider"')])
def test_grown_gradients_are_the_means_over_copies(name, move):
    """Over copies, a grown gradient is the mean of the true ones; elsewhere it is exact; for drawn units it is zero."""
    one = case(name, move)
    old = quick(functools.partial(trained, one.member.network))(one.member.variables, one.member.inputs)[2]
    grown = one.growth.like_gradient(old)
    for path, leaf in one.growth.params.items():
        truth, mean = (np.asarray(at(tree, path)) for tree in (one.gradient, grown))
        if leaf.new is not None:
            continue
        if name in DRAWN and leaf.copies:
            copied = np.broadcast_to(leaf.gradient == 1, truth.shape)
            assert not mean[~copied].any()
            truth, mean = truth[copied], mean[copied]
        for dimension, index in leaf.copies if name not in DRAWN else ():
            if (np.asarray(leaf.gradient) < 1).any():  # sums over copies, then
                order = np.argsort(index, kind="stable")
                firsts = np.searchsorted(index[order], np.arange(index.max() + 1))
                truth, mean = (
                    np.add.reduceat(tree.take(order, dimension), firsts, dimension) for tree in (truth, mean)
                )
        np.testing.assert_allclose(truth, mean, rtol=1e-4, atol=1e-6)


@every_case
def test_a_grown_network_can_be_saved_and_loaded(name, move, tmp_path):
    one = case(name, move)
    students.save(tmp_path / "student", one.growth.network, one.variables)
    network, variables = students.load(tmp_path, factory=factory_of(name))
    assert network.spec == one.growth.network.spec
    assert bits(variables) == bits(one.variables)


@every_member
def test_a_grown_network_can_grow_again(name):
    """First by the last named move, then by the first."""
    one, named = member(name), [move for move in MOVES[name] if isinstance(move, str)]
    first = case(name, json.dumps(named[-1]))
    network, variables = grow(
        jax.random.key(4), first.growth.network.spec, first.variables, named[0], factory=factory_of(name)
    )
    logits = quick(lambda variables, inputs: network.apply(variables, inputs, train=False)[0])(variables, one.inputs)
    assert relative_difference(logits, one.eval_logits) < 1e-5
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) > sum(
        leaf.size for leaf in jax.tree.leaves(first.variables)
    )


@pytest.mark.parametrize(("name", "move"), [("mlp", "wider"), ("mlp", "deeper"), ("transformer", "deeper")])
def test_growth_is_determined_by_its_key(name, move):
    one = member(name)
    of = [grow(jax.random.key(key), one.network.spec, one.variables, move)[1] for key in (3, 3, 4)]
    assert bits(of[0]) == bits(of[1])
    assert (bits(of[0]) != bits(of[2])) == (
        (name, move) != ("mlp", "deeper")
    )  # an inserted identity has no random part
    assert jax.tree.structure(of[0]) == jax.tree.structure(of[2])


# Optimizer states and arms.


@pytest.mark.parametrize("optimizer", [adamw(1e-2), muon(1e-2), sgd(1e-2)], ids=["adamw", "muon", "sgd"])
@every_case
def test_a_grown_optimizer_state_fits_the_larger_network(name, move, optimizer):
    one = case(name, move)
    arms = [gradient_arm("a", network.apply, None, optimizer) for network in (one.member.network, one.growth.network)]
    assert arms[0].grow is not None
    state = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), jax.eval_shape(arms[0].init, one.member.variables)
    )
    assert shapes(arms[0].grow(state, one.growth)) == shapes(jax.eval_shape(arms[1].init, one.variables))


@pytest.mark.parametrize(
    ("optimizer", "factor"), [(sgd(1e-2), 0.9**2), (optax.sgd(1e-2, momentum=0.9), 0.9)], ids=["one vector", "tree"]
)
@pytest.mark.parametrize(("name", "move"), [("mlp", '"wider"'), ("mlp", '"deeper"')])
def test_the_momentum_of_sgd_grows_as_gradients_do(name, move, optimizer, factor):
    """After a step from rest, a step without gradient moves by what is left of the momentum; Nesterov's by one factor more."""
    one = case(name, move)
    arm = gradient_arm("a", one.member.network.apply, None, optimizer)
    old = quick(functools.partial(trained, one.member.network))(one.member.variables, one.member.inputs)[2]
    state = arm.init(one.member.variables)
    zero, grown_zero = (jax.tree.map(jnp.zeros_like, tree) for tree in (old, one.variables.params))
    _, opt_state = optimizer.update(old, state.opt_state, zero)
    grown = arm.grow(state._replace(opt_state=opt_state), one.growth)
    rest, _ = optimizer.update(grown_zero, grown.opt_state, grown_zero)
    expected = jax.tree.map(lambda g: -1e-2 * factor * np.asarray(g), one.growth.like_gradient(old))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), rest, expected)


@pytest.mark.parametrize(("name", "move"), [("mlp", '"wider"'), ("mlp", '"deeper"')])
def test_the_moments_of_muon_grow_as_gradients_and_their_squares_do(name, move):
    """Of kernels the mean of gradients, of the rest Adam's two moments."""
    one = case(name, move)
    arm = gradient_arm("a", one.member.network.apply, None, muon(1e-2))
    old = quick(functools.partial(trained, one.member.network))(one.member.variables, one.member.inputs)[2]
    state = arm.init(one.member.variables)
    _, opt_state = muon(1e-2).update(old, state.opt_state, one.member.variables.params)
    grown = arm.grow(state._replace(opt_state=opt_state), one.growth).opt_state.inner_states
    of_muon, of_adam = (grown[kind].inner_state[0] for kind in ("muon", "adam"))
    mean = leaves_by_path(one.growth.like_gradient(old))
    square = leaves_by_path(one.growth.like_second_moment(jax.tree.map(jnp.square, old)))
    kernels, rest, squares = map(leaves_by_path, (of_muon.mu, of_adam.mu, of_adam.nu))
    assert kernels.keys() == {path for path in mean if "kernel" in path}
    assert rest.keys() == squares.keys() == mean.keys() - kernels.keys()
    for path in kernels:
        np.testing.assert_allclose(kernels[path], 0.05 * mean[path], rtol=1e-5, atol=1e-9)
    for path in rest:
        np.testing.assert_allclose(rest[path], 0.1 * mean[path], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(squares[path], 1e-3 * square[path], rtol=1e-4, atol=1e-9)


def leaves_by_path(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def batch(inputs):
    n = len(inputs)
    teacher = 4 * jax.nn.one_hot(jnp.arange(n) % CLASSES, CLASSES)
    return Batch(inputs, jnp.arange(n, dtype=jnp.int32) % CLASSES, {"logits": teacher}, jnp.arange(n), jnp.ones(n))


def arm_of(name, network, inputs) -> tuple[Callable, Callable, Callable]:
    (arm,) = arms_named(network.apply, [name])

    @quick
    def run(state, steps):
        stretch = Stretch(jnp.int32(0), steps, jnp.float32(0.3), jnp.float32(0))
        return arm.propose(state, lambda step: (batch(inputs), jax.random.key(5)), stretch)

    return arm.init, run, arm.grow


@pytest.mark.parametrize(
    ("arm", "name", "move"),
    [("kd4", "mlp", "wider"), ("kd4", "mlp", {"hidden": [6, 9, 13]}), ("kd4-muon", "convnet1d", "wider")],
)
def test_an_arm_continues_after_growth(arm, name, move):
    """The average computes the same, the state fits, and the next step changes the logits about as it would have before."""
    one = case(name, json.dumps(move))
    network, inputs = one.member.network, one.member.inputs
    init, run, grow_arm = arm_of(arm, network, inputs)
    state, average = run(init(one.member.variables), jnp.int32(20))
    state = state._replace(iterate=average)
    grown = grow_arm(state, one.growth)
    new_init, new_run, _ = arm_of(arm, one.growth.network, inputs)
    assert shapes(grown) == shapes(jax.eval_shape(new_init, one.variables))

    logits = [quick(functools.partial(both, each)) for each in (network, one.growth.network)]
    assert relative_difference(logits[1](grown.average, inputs)[0], logits[0](average, inputs)[0]) < 1e-5
    before = logits[0](state.iterate, inputs)[1]
    after = logits[0](run(state, jnp.int32(1))[0].iterate, inputs)[1]
    grown_after = logits[1](new_run(grown, jnp.int32(1))[0].iterate, inputs)[1]
    step, grown_step = (np.asarray(logits - before).ravel() for logits in (after, grown_after))
    cosine = step @ grown_step / np.linalg.norm(step) / np.linalg.norm(grown_step)
    ratio = np.linalg.norm(grown_step) / np.linalg.norm(step)
    print(arm, name, move, cosine, ratio)
    assert cosine > 0.8
    assert 0.5 < ratio < 2


# Refusals.

SHAPES = {"input_shape": [8, 8, 2], "num_classes": CLASSES}
SPECS = {
    "mlp": {"family": "mlp", "hidden": [6, 5], **SHAPES},
    "resnet": {"family": "resnet", "depth": 14, "width": 3, **SHAPES},
    "mobilenet": {"family": "mobilenet", "width": 25, "blocks": [1, 1], **SHAPES},
    "vit": {"family": "vit", "patch": 4, "width": 6, "depth": 1, "heads": 2, **SHAPES},
    "convnet1d": {"family": "convnet1d", "filters": [4, 6], "input_shape": [8, 2], "num_classes": CLASSES},
}


@pytest.mark.parametrize(
    ("name", "move", "says"),
    [
        (
            "mlp",
            "taller",
            r"the moves of mlp \(hidden=\[6, 5\]\) are wider, deeper; got 'taller': name one of these, or pass the spec",
        ),
        (
            "mlp",
            {"hidden": [6, 4]},
            "growth narrows nothing; got 4 for 5 of hidden2, from mlp .* to mlp .*: use 5 or more",
        ),
        ("mlp", {"hidden": [6, 5, 4]}, "growth narrows nothing; got 4 for 5 of hidden3"),
        ("mlp", {"hidden": [6]}, r"growth removes no layer; got none of hidden2, .*: name at least as many layers"),
        ("mlp", {"num_classes": 4}, "growth keeps num_classes; got 4 for 3"),
        ("mlp", {"family": "resnet", "hidden": None}, "growth keeps family; got resnet for mlp"),
        ("mlp", {"hiden": [7]}, "the options of mlp are hidden; got hiden"),
        ("mlp", {"hidden": []}, "growth removes no layer; got none of hidden1, hidden2"),
        ("resnet", {"depth": 8}, r"growth removes no layer; got none of stage1.1.conv1, .*"),
        ("resnet", {"depth": 15}, "a resnet's depth is one of"),
        ("resnet", {"width": 2}, "growth narrows nothing; got 2 for 3 of stage1"),
        (
            "mobilenet",
            {"width": 50},
            r"what every layer reads and writes; got another wiring of stage1.0.project, .*: choose",
        ),
        ("mobilenet", {"blocks": [1, 1, 1]}, "layers that start as the identity; got stage3.0.depthwise, which cannot"),
        (
            "mobilenet",
            {"filters": [8, 8]},
            "multiples of 8, for the stem, .*; got filters=.* for blocks=.*: try filters=",
        ),
        ("mobilenet", {"filters": [8, 8, 12, 24]}, "multiples of 8, for the stem"),
        ("vit", {"width": 8}, "LayerNorm averages over all of its features, .*; got 8 for 6 of width, .*: use 12"),
        ("vit", {"patch": 2}, "growth keeps patch; got 2 for 4"),
        ("vit", {"heads": 3}, "growth narrows nothing; got 2 for 3 of block1.size"),
        ("convnet1d", "deeper", "are wider; got 'deeper'"),
        ("convnet1d", {"filters": [4, 6, 6]}, "layers that start as the identity; got layer3.conv, which cannot"),
    ],
)
def test_impossible_moves_are_refused(name, move, says):
    spec = SPECS[name]
    if not isinstance(move, str):
        move = {name: value for name, value in (spec | move).items() if value is not None}
    with pytest.raises(InputError, match=says):
        growth_map(jax.random.key(0), spec, move)


def test_a_linear_classifier_cannot_grow():
    with pytest.raises(InputError, match="are none; got 'wider'"):
        growth_map(jax.random.key(0), SPECS["mlp"] | {"hidden": []}, "wider")
    with pytest.raises(InputError, match="got hidden1, which cannot"):
        growth_map(jax.random.key(0), SPECS["mlp"] | {"hidden": []}, SPECS["mlp"])


def test_variables_of_another_network_are_refused():
    one, map_ = member("mlp"), case("mlp", '"wider"').growth
    kernel = one.variables.params["layers"][0] | {"kernel": jnp.zeros((7, 9))}
    wrong = {"layers": one.variables.params["layers"] | {0: kernel}}
    with pytest.raises(InputError, match=r"got layers.0.kernel of shape \[7, 9\] for \[7, 6\], .*: pass the variables"):
        map_.like_params(wrong)
    with pytest.raises(InputError, match=r"got none at head, growing into"):
        case("resnet", '"wider"').growth.like_params({"conv": {"kernel": jnp.zeros((3, 3, 2, 3))}})


def test_a_factory_without_a_valid_grow_is_refused():
    spec = {"factory": f"{__name__}:make", "input_shape": [7], "num_classes": CLASSES}

    def other(input_shape, num_classes, rngs, width=5):
        return Own(width, rngs)

    def grows(**changes):
        other.grow = lambda *args, **options: own_grows(*args, **options)._replace(**changes)
        return growth_map(jax.random.key(0), spec, "wider", factory=other)

    with pytest.raises(InputError, match=r"a function as attribute `grow`; got none for .*:make"):
        moves(spec, factory=other)
    with pytest.raises(InputError, match=r"as attribute `grow`; got no factory for .*:make"):
        moves(spec)
    layers = own_grows([7], CLASSES).layers
    with pytest.raises(InputError, match=r"a layer for every array; got none for \['last', 'bias'\]: fix"):
        grows(layers={name: layer for name, layer in layers.items() if name != "last"})
    with pytest.raises(InputError, match=r"every space and layer that its layers name; got no units from"):
        grows(spaces={})
    with pytest.raises(InputError, match=r"that its layers name; got no nothing from"):
        grows(layers={**layers, "last": layers["last"]._replace(start="zero", like="nothing")})
    with pytest.raises(InputError, match=r"have the sizes of the arrays' axes; got 3 for units, axis 0 of .*'bias'"):
        grows(spaces={"units": Space(3)})
    other.grow = lambda **options: None
    with pytest.raises(InputError, match=r"returns a students.growth.GrowthSpec; got NoneType from .*:make"):
        moves(spec, factory=other)
    other.grow = lambda input_shape: None
    with pytest.raises(InputError, match=r"`grow` takes the factory's options; that of .* fails with TypeError"):
        moves(spec, factory=other)
