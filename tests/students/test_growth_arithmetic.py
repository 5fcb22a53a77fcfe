"""Growth on hand-computed examples: copied and drawn features, shares, and the sizes of moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from student_zoo import bits

from ev3_distill import students
from ev3_distill.students.growth import GrowthSpec, Layer, Space, growth_map, moves, next_size, reads, writes
from ev3_distill.students.growth.net2net import copy_spaces
from ev3_distill.types import Variables


class Two(nnx.Module):
    """A user's network of two layers, whose units are copied, not drawn."""

    def __init__(self, width, rngs):
        self.layers = nnx.List([nnx.Linear(1, width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs)])

    def __call__(self, inputs):
        return self.layers[1](nnx.relu(self.layers[0](inputs)))


def make_two(input_shape, num_classes, rngs, width=2):
    return Two(width, rngs)


def two_grows(input_shape, num_classes, width=2):
    layers = {
        "first": Layer(("layers", 0), (None, writes("units"))),
        "last": Layer(("layers", 1), (reads("units"), None)),
    }
    return GrowthSpec({"units": Space(width)}, layers, {})


make_two.grow = two_grows


def test_drawn_units_by_hand():
    """The weights that write the new unit are those of a new network, those that read it are zero, the rest is unchanged."""
    spec = {"family": "mlp", "hidden": [2], "input_shape": [1], "num_classes": 1}
    map_ = growth_map(jax.random.key(0), spec, spec | {"hidden": [3]})
    tree = {
        "layers": {
            0: {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([3.0, 4.0])},
            1: {"kernel": jnp.array([[5.0], [6.0]]), "bias": jnp.array([7.0])},
        }
    }
    fresh = map_.network.init(jax.random.key(0)).params["layers"]
    grown = map_.variables(Variables(tree, {})).params["layers"]
    np.testing.assert_array_equal(grown[0]["kernel"], [[1, 2, fresh[0]["kernel"][0, 2]]])
    np.testing.assert_array_equal(grown[0]["bias"], [3, 4, fresh[0]["bias"][2]])
    np.testing.assert_array_equal(grown[1]["kernel"], [[5], [6], [0]])
    np.testing.assert_array_equal(grown[1]["bias"], [7])


def test_copied_units_by_hand():
    spec = {"factory": f"{__name__}:make_two", "width": 2, "input_shape": [1], "num_classes": 1}
    map_ = growth_map(jax.random.key(0), spec, spec | {"width": 3}, factory=make_two)
    tree = {
        "layers": {
            0: {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([3.0, 4.0])},
            1: {"kernel": jnp.array([[5.0], [6.0]]), "bias": jnp.array([7.0])},
        }
    }
    grown = map_.variables(Variables(tree, {})).params["layers"]
    twice = int(map_.params["layers", 0, "bias"].copies[0][1][2])
    once = 1 - twice
    np.testing.assert_array_equal(grown[0]["kernel"], [[1, 2, 1 + twice]])
    np.testing.assert_array_equal(grown[0]["bias"], [3, 4, 3 + twice])
    read = map_.params["layers", 1, "kernel"]
    shares = read.value[:, 0]
    np.testing.assert_allclose(grown[1]["kernel"][:, 0], np.array([5, 6, 5 + twice]) * shares + read.offset[:, 0])
    assert (shares[once], read.offset[once, 0]) == (1, 0)
    assert 0.3 <= shares[2] <= 0.7
    assert read.offset[2, 0] != 0
    np.testing.assert_allclose(grown[1]["kernel"][twice, 0] + grown[1]["kernel"][2, 0], 5 + twice, rtol=1e-6)
    np.testing.assert_array_equal(grown[1]["bias"], [7])


def test_an_inserted_identity_by_hand():
    spec = {"family": "mlp", "hidden": [2], "input_shape": [1], "num_classes": 1}
    map_ = growth_map(jax.random.key(0), spec, "deeper")
    tree = {
        "layers": {
            0: {"kernel": jnp.array([[1.0, 3.0]]), "bias": jnp.array([3.0, 4.0])},
            1: {"kernel": jnp.array([[5.0], [6.0]]), "bias": jnp.array([7.0])},
        }
    }
    grown = map_.variables(Variables(tree, {})).params["layers"]
    np.testing.assert_array_equal(grown[1]["kernel"], np.eye(2))
    np.testing.assert_array_equal(grown[1]["bias"], [0, 0])
    assert bits((grown[0], grown[2])) == bits((tree["layers"][0], tree["layers"][1]))


@pytest.mark.parametrize(("width", "wider"), [(3, 4), (2, 3), (1, 5), (4, 8)])
def test_a_padded_shortcut_keeps_its_place(width, wider):
    """The channels that stage 1 adds to stage 2 are copied there as in stage 1."""
    old, new = (
        students.growth_spec({"family": "resnet", "depth": 8, "width": w, "input_shape": [8, 8, 1], "num_classes": 2})
        for w in (width, wider)
    )
    copies = copy_spaces(np.random.default_rng(0), old, new, {name: name for name in old.spaces})
    for before, after, size, grown in (("stage1", "stage2", width, wider), ("stage2", "stage3", 2 * width, 2 * wider)):
        padded, old_padded = np.full(2 * grown, -1), np.full(2 * size, -1)
        padded[grown // 2 : grown // 2 + grown] = copies[before].indices
        old_padded[size // 2 : size // 2 + size] = np.arange(size)
        np.testing.assert_array_equal(padded, old_padded[copies[after].indices])
        assert set(copies[after].indices) == set(range(2 * size))


def test_features_are_copied_as_evenly_as_possible():
    spec = {"family": "mlp", "hidden": [3], "input_shape": [2], "num_classes": 2}
    for size, counts in ((3, [1, 1, 1]), (4, [1, 1, 2]), (6, [2, 2, 2]), (8, [2, 3, 3])):
        map_ = growth_map(jax.random.key(1), spec, spec | {"hidden": [size]})
        copies = dict(map_.params["layers", 0, "kernel"].copies)
        assert sorted(np.bincount(copies.get(1, np.arange(3)))) == counts


def test_shares_and_noise_of_two_copies():
    """Shares are uniform on 0.6 to 1.4 before they are scaled to sum to 1; the noise is 0.2 / sqrt(inputs)."""
    spec = {"factory": f"{__name__}:make_two", "width": 2000, "input_shape": [1], "num_classes": 1}
    growth = growth_map(jax.random.key(0), spec, spec | {"width": 4000}, factory=make_two)
    read = growth.params["layers", 1, "kernel"]
    shares = read.value[:, 0]
    assert 0.3 <= shares.min() < 0.31 and 0.69 < shares.max() <= 0.7
    np.testing.assert_allclose(shares[:2000].mean(), 0.5, atol=0.01)
    noise = 0.2 / np.sqrt(2000) * np.sqrt(0.5)  # the mean of two numbers is subtracted
    np.testing.assert_allclose(read.offset.std(), noise, rtol=0.1)


def test_sizes_of_moves():
    assert [next_size(n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 96)] == [2, 3, 4, 6, 8, 8, 12, 16, 16, 24, 128]
    shape = {"input_shape": [8, 8, 1], "num_classes": 2}
    proposed = moves({"family": "mobilenet", "width": 100, "blocks": [1, 2], **shape})
    assert proposed["wider"] == {"family": "mobilenet", "filters": [48, 24, 40, 1920], "blocks": [1, 2], **shape}
    assert proposed["deeper"] == {"family": "mobilenet", "width": 100, "blocks": [2, 3], **shape}
    vit = {"family": "vit", "patch": 4, "width": 12, "depth": 3, "heads": 3, **shape}
    assert moves(vit)["wider"] == vit | {"width": 24}
    assert moves(vit)["heads"] == vit | {"heads": 4, "head_size": 4}
    assert "deeper" not in moves({"family": "resnet", "depth": 56, "width": 4, **shape})
    assert moves({"family": "mlp", "hidden": [], **shape}) == {}
