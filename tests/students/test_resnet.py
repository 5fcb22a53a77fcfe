"""The resnet family: parameter counts of the paper, features, shortcuts, and training in a loop."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.students.families.resnet import Block, ResNet, resnet


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (56, 0.85)])
def test_parameter_counts_are_those_of_the_paper(depth, millions):
    """Table 6 of He et al., in millions of parameters."""
    model = nnx.eval_shape(lambda: ResNet(3, 10, depth, 16, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert round(sum(leaf.size for leaf in leaves) / 1e6, 2) == millions


@pytest.fixture(scope="module")
def network():
    return resnet([8, 8, 1], 2, depth=8, width=4)  # takes seconds


def test_spec_is_complete_and_json(network):
    assert network.spec == {"family": "resnet", "depth": 8, "width": 4, "input_shape": [8, 8, 1], "num_classes": 2}
    assert json.loads(json.dumps(network.spec)) == network.spec


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (9, 7, 2), (1, 1, 1)])
def test_shapes_of_features(shape):
    def features(x):
        return ResNet(shape[-1], 5, 8, 4, rngs=nnx.Rngs(0)).features(x)

    logits, by_name = jax.eval_shape(features, jnp.zeros((3, *shape)))
    (h, w), half = shape[:2], (lambda n: (n + 1) // 2)
    assert {name: x.shape for name, x in by_name.items()} == {
        "stage1": (3, h, w, 4),
        "stage2": (3, half(h), half(w), 8),
        "stage3": (3, half(half(h)), half(half(w)), 16),
        "pooled": (3, 16),
    }
    assert logits.shape == (3, 5)


def test_logits_follow_from_the_features():
    @jax.jit
    def results(x):
        model = ResNet(1, 5, 8, 4, rngs=nnx.Rngs(0))
        model.eval()
        logits, by_name = model.features(x)
        return logits, by_name, model(x), model.head(by_name["pooled"])

    logits, by_name, called, headed = results(image((2, 8, 8, 1)))
    np.testing.assert_array_equal(logits, called)
    np.testing.assert_allclose(by_name["pooled"], by_name["stage3"].mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(logits, headed, rtol=1e-5, atol=1e-6)


def test_a_block_with_zero_convolutions_is_its_shortcut():
    """Then a stage subsamples its input and pads it with zero channels, half of them in front."""

    @jax.jit
    def through(x):
        block = Block(4, 8, 2, rngs=nnx.Rngs(0))
        block.conv2.kernel[...] = jnp.zeros_like(block.conv2.kernel[...])
        return block(x)

    x = image((2, 5, 4, 4))
    out = through(x)
    assert out.shape == (2, 3, 2, 8)
    np.testing.assert_array_equal(out[..., 2:6], x[:, ::2, ::2])
    assert not out[..., :2].any()
    assert not out[..., 6:].any()


def image(shape):
    return np.random.default_rng(0).random(shape, np.float32)


def test_training_in_a_loop_fits_the_data(network):
    optimizer = optax.sgd(0.05, momentum=0.9, nesterov=True)
    images = image((32, 8, 8, 1))
    labels = (images[:, :, :4].mean((1, 2, 3)) > images[:, :, 4:].mean((1, 2, 3))).astype(np.int32)

    def loss(params, variables):
        logits, after = network.apply(variables._replace(params=params), images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

    def step(_, carry):
        variables, state, _ = carry
        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(variables.params, variables)
        updates, state = optimizer.update(grads, state)
        return after._replace(params=optax.apply_updates(variables.params, updates)), state, value

    @jax.jit
    def train(key):
        variables = network.init(key)
        start = variables, optimizer.init(variables.params), jnp.float32(0)
        variables, _, value = jax.lax.fori_loop(0, 40, step, start)
        return value, *network.apply(variables, images, train=False), variables

    value, logits, after, variables = train(jax.random.key(0))
    assert value < 0.1
    assert jax.tree.all(jax.tree.map(jnp.array_equal, after, variables))
    assert (logits.argmax(1) == labels).mean() > 0.9


@pytest.mark.parametrize("depth", [0, 9, 110])
def test_other_depths_are_refused(depth):
    with pytest.raises(InputError, match=rf"8, 14, 20, 32, 44, 56; got {depth}: use"):
        resnet((8, 8, 1), 2, depth=depth)


@pytest.mark.parametrize("shape", [(64,), (8, 8)])
def test_inputs_that_are_not_images_are_refused(shape):
    with pytest.raises(InputError, match=r"image \[H, W, C\]; got shape \["):
        resnet(shape, 2)


def test_width_zero_is_refused():
    with pytest.raises(InputError, match="got 0"):
        resnet((8, 8, 1), 2, width=0)
