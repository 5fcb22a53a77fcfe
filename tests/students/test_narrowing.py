"""Narrowing of every family: the result computes what the larger network would if nothing read the dropped features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_zoo import CLASSES, at, bits, case, every_case, factory_of, member, quick, relative_difference, shapes

from ev3_distill import students
from ev3_distill.errors import InputError
from ev3_distill.students.growth import moves, narrow
from ev3_distill.students.growth.narrow import retained_features
from ev3_distill.students.growth.net2net import growing_axes, key_path, match_spaces
from ev3_distill.types import Variables

NORMALIZED = ("vit", "transformer")  # LayerNorm averages over features, which changes when features are dropped


def narrowed(name, move, seed=1):
    """Narrows the grown network of a case back to its original spec."""
    one, factory = case(name, move), factory_of(name)
    spec = one.growth.network.spec
    return narrow(jax.random.key(seed), spec, one.trained, one.member.network.spec, factory=factory)


@every_case
def test_the_result_has_the_smaller_spec_and_is_determined_by_its_key(name, move):
    one = case(name, move)
    network, variables = narrowed(name, move)
    assert network.spec == one.member.network.spec
    assert shapes(variables) == shapes(one.member.variables)
    logits, _ = quick(lambda v, x: network.apply(v, x, train=False))(variables, one.member.inputs)
    assert logits.shape == (len(one.member.inputs), CLASSES) and bool(jnp.isfinite(logits).all())
    assert bits(variables) == bits(narrowed(name, move)[1])


@every_case
def test_the_result_computes_the_retained_part_of_the_larger_network(name, move):
    """The reference is the larger network with zeros in all weights that read dropped features."""
    one, factory = case(name, move), factory_of(name)
    spec = one.growth.network.spec
    large, small = (students.growth_spec(s, factory=factory) for s in (spec, one.member.network.spec))
    if name in NORMALIZED or set(large.layers) != set(small.layers):
        pytest.skip("LayerNorm has other means then, and without a layer it is another function")
    retained = retained_features(
        np.random.default_rng(np.asarray(jax.random.key_data(jax.random.key(1)))),
        large,
        small,
        match_spaces(small, large),
    )
    assert any(len(retained[space]) < large.spaces[space].size for space in retained)
    layers = {layer.path: layer for layer in large.layers.values()}

    def without_reads(keys, leaf):
        path, array = key_path(keys), np.array(leaf)
        layer = next(layers[path[:i]] for i in range(len(path) + 1) if path[:i] in layers)
        for dimension, axis in growing_axes(layer, path, array.shape, large).items():
            if axis.reads:
                dropped = np.setdiff1d(np.arange(large.spaces[axis.space].size), retained[axis.space])
                rows = (large.spaces[axis.space].size * np.arange(axis.times)[:, None] + dropped).ravel()
                np.moveaxis(array, dimension, 0)[rows] = 0
        return array

    whole = one.trained._replace(params=jax.tree_util.tree_map_with_path(without_reads, one.trained.params))
    network, variables = narrowed(name, move)
    logits, _ = quick(lambda v, x: network.apply(v, x, train=False))(variables, one.member.inputs)
    expected, _ = quick(lambda v, x: one.growth.network.apply(v, x, train=False))(whole, one.member.inputs)
    assert relative_difference(logits, expected) < 1e-5
    assert (
        relative_difference(
            logits, quick(lambda v, x: one.growth.network.apply(v, x, train=False))(one.trained, one.member.inputs)[0]
        )
        > 1e-3
    )


def test_an_mlp_by_hand():
    """Three of five units are retained, in order, each with its weights to all outputs."""
    spec = {"family": "mlp", "hidden": [5], "input_shape": [2], "num_classes": 3}
    first = {"kernel": np.arange(10.0, dtype=np.float32).reshape(2, 5), "bias": np.arange(5.0, dtype=np.float32)}
    last = {"kernel": np.arange(15.0, dtype=np.float32).reshape(5, 3), "bias": np.arange(3.0, dtype=np.float32)}
    variables = Variables({"layers": {0: first, 1: last}}, {})
    parts = set()
    for seed in range(20):
        _, part = narrow(jax.random.key(seed), spec, variables, {**spec, "hidden": [3]})
        kept = np.asarray(at(part.params, ("layers", 0, "bias"))).astype(int)  # a unit's bias is its number
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == 3
        np.testing.assert_array_equal(at(part.params, ("layers", 0, "kernel")), first["kernel"][:, kept])
        np.testing.assert_array_equal(at(part.params, ("layers", 1, "kernel")), last["kernel"][kept])
        np.testing.assert_array_equal(at(part.params, ("layers", 1, "bias")), last["bias"])
        parts.add(tuple(kept.tolist()))
    assert len(parts) > 5  # of ten


def test_other_specs_and_variables_are_refused():
    one = member("mlp")
    spec = one.network.spec
    with pytest.raises(InputError, match=r"narrows only to one that grows into it; .* narrows nothing"):
        narrow(jax.random.key(0), spec, one.variables, moves(spec)["wider"])
    with pytest.raises(InputError, match="narrows only to one that grows into it; growth keeps num_classes"):
        narrow(jax.random.key(0), spec, one.variables, {**spec, "num_classes": 2})
    smaller = {**spec, "hidden": [3, 5]}
    for other in (moves(spec)["wider"], {**spec, "hidden": [6]}):
        with pytest.raises(
            InputError, match=r"the arrays of its spec; got others, narrowing into mlp \(hidden=\[3, 5\]\)"
        ):
            narrow(jax.random.key(0), other, one.variables, smaller)
