"""One tiny network of each student family and of a user, and each of them after every growth move."""

import functools
import json
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ev3_distill import students
from ev3_distill.students.growth import GrowthMap, GrowthSpec, Layer, Space, growth_map, next_size, reads, writes
from ev3_distill.types import Network, Variables

CLASSES, STEPS = 3, 10


class Own(nnx.Module):
    """A user's student, with BatchNorm, a bare parameter and its own input shape."""

    def __init__(self, width, rngs):
        self.first = nnx.Linear(7, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.gate = nnx.Param(jnp.ones(width))
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, inputs):
        return self.last(jnp.tanh(self.norm(self.first(inputs))) * self.gate[...])


def make(input_shape, num_classes, rngs, width=5):
    return Own(width, rngs)


def own_grows(input_shape, num_classes, width=5):
    layers = {
        "first": Layer(("first",), (None, writes("units"))),
        "norm": Layer(("norm",), (writes("units"),)),
        "gate": Layer(("gate",), (writes("units"),)),
        "last": Layer(("last",), (reads("units"), None)),
    }
    return GrowthSpec({"units": Space(width)}, layers, {"wider": {"width": next_size(width)}})


make.grow = own_grows
MEMBERS = {  # one tiny network of each family, and the shape of its inputs
    "mlp": ("mlp:hidden=6-5", (7,)),
    "convnet1d": ("convnet1d:filters=4-6", (10, 3)),
    "conv4": ("conv4:width=3", (32, 16, 1)),
    "resnet": ("resnet8:width=3", (12, 12, 2)),
    "mobilenet": ("mobilenet:filters=8-8-16-24,blocks=1-1", (8, 8, 2)),
    "vit": ("vit:width=6,depth=1,heads=2", (8, 8, 2)),
    "transformer": ("transformer:width=8,depth=1,heads=2", (5, 3)),
    "own": (f"{__name__}:make", (7,)),
}
MOVES = {  # by name, or the options that change
    "mlp": ("wider", "deeper", {"hidden": [6, 9, 13]}),
    "convnet1d": ("wider",),
    "conv4": ("wider",),
    "resnet": ("wider", "deeper"),
    "mobilenet": ("wider", "deeper"),
    "vit": ("wider", "deeper", "heads"),
    "transformer": ("wider", "deeper", "heads", {"width": 24, "depth": 2, "heads": 3}),
    "own": ("wider",),
}
DRAWN = ("mlp",)  # families whose new units are drawn
CASES = [(name, json.dumps(move)) for name, of_name in MOVES.items() for move in of_name]
every_case = pytest.mark.parametrize(("name", "move"), CASES, ids=[" ".join(case) for case in CASES])
every_member = pytest.mark.parametrize("name", MEMBERS)


def factory_of(name):
    return make if name == "own" else None


class Member(NamedTuple):
    network: Network
    variables: Variables  # as after training: no entry is 0 or 1
    inputs: jax.Array
    eval_logits: jax.Array
    train_logits: jax.Array


@functools.cache
def member(name):
    text, shape = MEMBERS[name]
    network = students.from_name(text, shape, CLASSES)
    variables = as_after_training(jax.eval_shape(network.init, jax.random.key(0)))
    count = 512 if name in DRAWN else 24  # a drawn unit may be zero for a few examples
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(count, *shape)), jnp.float32)
    return Member(network, variables, inputs, *quick(functools.partial(both, network))(variables, inputs))


def as_after_training(shapes):
    rng = np.random.default_rng(0)

    def param(leaf):
        if leaf.ndim == 1:  # biases and scales
            return jnp.asarray(rng.uniform(0.1, 0.9, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(math.prod(leaf.shape[:-1])), leaf.dtype)

    stats = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), shapes.stats)
    return Variables(jax.tree.map(param, shapes.params), stats)


def quick(function):
    """Compiles without optimization: the networks are tiny, and compilation takes most of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def both(network, variables, inputs):
    """Logits in evaluation and in training."""
    return tuple(network.apply(variables, inputs, train=t, key=jax.random.key(2))[0] for t in (False, True))


def trained(network, variables, inputs):
    """Takes some steps of Adam, which moves whatever has a gradient; returns the first step's logits too."""
    optimizer, labels = optax.flatten(optax.adam(1e-2)), jnp.arange(len(inputs)) % CLASSES

    def step(carry, _):
        variables, memory = carry

        def loss(params):
            logits, after = network.apply(variables._replace(params=params), inputs, train=True, key=jax.random.key(2))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, after.stats)

        gradient, (logits, stats) = jax.grad(loss, has_aux=True)(variables.params)
        updates, memory = optimizer.update(gradient, memory)
        return (Variables(optax.apply_updates(variables.params, updates), stats), memory), logits

    (variables, _), logits = jax.lax.scan(step, (variables, optimizer.init(variables.params)), length=STEPS)
    return variables, logits[0]


class Case(NamedTuple):
    member: Member
    growth: GrowthMap
    variables: Variables  # grown
    eval_logits: jax.Array
    trained: Variables
    train_logits: jax.Array


@functools.cache
def case(name, move):
    one, move = member(name), json.loads(move)
    target = move if isinstance(move, str) else one.network.spec | move
    map_ = growth_map(jax.random.key(3), one.network.spec, target, factory=factory_of(name))
    variables = map_.variables(one.variables)

    def evaluate_and_train(variables, inputs):
        return map_.network.apply(variables, inputs, train=False)[0], *trained(map_.network, variables, inputs)

    return Case(one, map_, variables, *quick(evaluate_and_train)(variables, one.inputs))


def relative_difference(one, other):
    """The largest difference, relative to the largest entry."""
    one, other = np.asarray(one), np.asarray(other)
    return np.abs(one - other).max() / np.abs(other).max()


def bits(tree):
    return [(np.asarray(leaf).dtype.str, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def at(tree, path):
    return functools.reduce(lambda tree, part: tree[part], path, tree)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
