"""Growth keeps the function of every family and of a user's student, and everything new learns."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_zoo import (
    CLASSES,
    MEMBERS,
    MOVES,
    Own,
    at,
    bits,
    case,
    every_case,
    every_member,
    factory_of,
    member,
    own_grows,
    quick,
    relative_difference,
    shapes,
)

from ev3_distill import students
from ev3_distill.errors import InputError
from ev3_distill.students.growth import Space, grow, growth_map, moves
from ev3_distill.types import Variables


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
        map_.variables(Variables(wrong, {}))
    with pytest.raises(InputError, match=r"got none at head, growing into"):
        case("resnet", '"wider"').growth.variables(Variables({"conv": {"kernel": jnp.zeros((3, 3, 2, 3))}}, {}))


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
    with pytest.raises(InputError, match=r"every space that its layers name; got no units from"):
        grows(spaces={})
    with pytest.raises(InputError, match=r"have the sizes of the arrays' axes; got 3 for units, axis 0 of .*'bias'"):
        grows(spaces={"units": Space(3)})
    other.grow = lambda **options: None
    with pytest.raises(InputError, match=r"returns a students.growth.GrowthSpec; got NoneType from .*:make"):
        moves(spec, factory=other)
    other.grow = lambda input_shape: None
    with pytest.raises(InputError, match=r"`grow` takes the factory's options; that of .* fails with TypeError"):
        moves(spec, factory=other)
