"""The contract of every student, of each family and of a user: shapes, determinism, training, saving, names."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ev3_distill
from ev3_distill import students
from ev3_distill.errors import InputError
from ev3_distill.students import count_params
from ev3_distill.students.families.conv4 import Conv4, max_pool
from ev3_distill.students.families.mobilenet import BLOCKS, MobileNet
from ev3_distill.students.families.resnet import ResNet
from ev3_distill.types import Network, Variables

SHAPE, CLASSES = (8, 8, 1), 10


class Own(nnx.Module):
    """A user's student, with BatchNorm and dropout."""

    def __init__(self, width, classes, rngs):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, inputs):
        x = nnx.relu(self.norm(self.first(inputs.reshape(len(inputs), -1))))
        return self.last(self.dropout(x))


def make(input_shape, num_classes, rngs):
    assert list(input_shape) == list(SHAPE)
    return Own(12, num_classes, rngs)


OWN = f"{__name__}:make"
MEMBERS = {  # one small network of each family, and the shape of its inputs
    "mlp": ("mlp", SHAPE),
    "convnet1d": ("convnet1d:filters=8-8", (12, 3)),
    "conv4": ("conv4:width=8", (16, 17, 1)),
    "resnet": ("resnet8:width=4", (9, 8, 3)),
    "mobilenet": ("mobilenet:width=25,blocks=1-2", (9, 8, 3)),
    "vit": ("vit:width=12,depth=2", (8, 12, 2)),
    "transformer": ("transformer:width=12,depth=1", (6, 3)),
    "own": (OWN, SHAPE),
}


class Member(NamedTuple):
    """A network, and its forward pass, compiled once for all tests."""

    network: Network
    shape: tuple[int, ...]
    variables: Variables
    apply: Callable  # jitted

    def inputs(self, n, seed=0):
        return jax.random.uniform(jax.random.key(seed), (n, *self.shape))


@functools.cache
def member(name):
    text, shape = MEMBERS[name]
    network = students.from_name(text, shape, CLASSES)
    variables = jax.jit(network.init)(jax.random.key(0))
    return Member(network, shape, variables, jax.jit(network.apply, static_argnames="train"))


every_member = pytest.mark.parametrize("name", MEMBERS)


def test_every_family_is_a_member():
    assert set(MEMBERS) == {*students.FAMILIES, "own"}


@every_member
def test_logits_have_the_declared_shape_and_type(name):
    network, _, variables, apply = one = member(name)
    for n, train in ((1, False), (7, False), (7, True)):
        logits, after = apply(variables, one.inputs(n), train=train, key=jax.random.key(1))
        assert (logits.shape, logits.dtype) == ((n, CLASSES), jnp.float32)
        assert jnp.isfinite(logits).all()
        assert jax.tree.structure(after) == jax.tree.structure(variables)
        same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, after, variables)
        assert all(jax.tree.leaves(same))
        assert bits(after.params) == bits(variables.params)
    assert json.loads(json.dumps(network.spec)) == network.spec


def bits(tree):
    return [(np.asarray(leaf).dtype.str, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@every_member
def test_evaluation_treats_examples_independently(name):
    """In evaluation, logits do not depend on the rest of the batch or on the key."""
    _, _, variables, apply = one = member(name)
    inputs, key = one.inputs(7), jax.random.key(1)
    together, after = apply(variables, inputs, train=False, key=key)
    alone = jnp.concatenate([apply(variables, row[None], train=False, key=key)[0] for row in inputs])
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)
    assert bits(after) == bits(variables)
    np.testing.assert_array_equal(apply(variables, inputs, train=False, key=jax.random.key(9))[0], together)
    assert jnp.abs(together - together[0]).max() > 1e-4  # but they depend on the example


@every_member
def test_init_and_training_are_determined_by_their_keys(name):
    network, _, variables, apply = one = member(name)
    init = jax.jit(network.init)
    assert bits(init(jax.random.key(0))) == bits(variables)
    assert bits(init(jax.random.key(1)).params) != bits(variables.params)
    trained = [apply(variables, one.inputs(7), train=True, key=jax.random.key(k)) for k in (3, 3, 4)]
    assert bits(trained[0]) == bits(trained[1])
    if name == "own":  # dropout
        assert bits(trained[0][0]) != bits(trained[2][0])
    if jax.tree.leaves(variables.stats):
        assert bits(trained[0][1].stats) != bits(variables.stats)


@every_member
def test_uint8_inputs_are_divided_by_255(name):
    _, shape, variables, apply = member(name)
    pixels = np.random.default_rng(0).integers(0, 256, (7, *shape), np.uint8)
    key = jax.random.key(1)
    of_bytes = apply(variables, pixels, train=False, key=key)[0]
    of_floats = apply(variables, pixels / np.float32(255), train=False, key=key)[0]
    np.testing.assert_allclose(of_bytes, of_floats, rtol=1e-5, atol=1e-5)


@every_member
def test_training_reaches_every_parameter(name):
    """Every parameter gets a gradient, a few steps lower the loss, and a loop computes what single steps do."""
    network, _, variables, _ = one = member(name)
    inputs, labels, optimizer = one.inputs(7), jnp.arange(7) % CLASSES, optax.adam(1e-2)

    def step(carry, key):
        variables, memory = carry

        def loss(params):
            logits, after = network.apply(variables._replace(params=params), inputs, train=True, key=key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after.stats

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(variables.params)
        updates, memory = optimizer.update(gradient, memory)
        return (Variables(optax.apply_updates(variables.params, updates), stats), memory), (value, gradient)

    keys, start = jax.random.split(jax.random.key(0), 6), (variables, optimizer.init(variables.params))
    (scanned, _), (losses, gradients) = jax.jit(lambda start: jax.lax.scan(step, start, keys))(start)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(leaf).all(), path
        assert jnp.any(jnp.abs(leaf) > 1e-9), path
    assert losses[-1] < losses[0]

    logits = one.apply(variables, inputs, train=True, key=keys[0])[0]
    outside = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(losses[0], outside, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), scanned.params, variables.params)
    assert min(jax.tree.leaves(moved)) > 0


FEATURES = {  # names and shapes of the features of one example
    "convnet1d": {"layer1": (12, 8), "layer2": (12, 8), "pooled": (8,)},
    "conv4": {
        "block1": (8, 8, 8),
        "block2": (4, 4, 8),
        "block3": (2, 2, 8),
        "block4": (1, 1, 8),
        "embedding": (8,),
    },
    "resnet": {"stage1": (9, 8, 4), "stage2": (5, 4, 8), "stage3": (3, 2, 16), "pooled": (16,)},
    "mobilenet": {"stage1": (9, 8, 8), "stage2": (9, 8, 8), "pooled": (320,)},
    "vit": {"block1": (6, 12), "block2": (6, 12), "pooled": (12,)},
    "transformer": {"block1": (6, 12), "pooled": (12,)},
}


@pytest.mark.parametrize("name", FEATURES)
def test_names_and_shapes_of_features(name):
    network, _, variables, _ = one = member(name)
    assert network.features is not None
    show = functools.partial(network.features, train=False, key=jax.random.key(1))
    (logits, by_name), _ = jax.eval_shape(show, variables, one.inputs(7))
    assert logits.shape == (7, CLASSES)
    assert {name: array.shape for name, array in by_name.items()} == {n: (7, *s) for n, s in FEATURES[name].items()}
    assert all(array.dtype == jnp.float32 for array in by_name.values())


@pytest.mark.parametrize(("side", "left"), [(8, 4), (16, 4), (28, 7), (32, 4), (64, 4), (96, 6), (224, 7)])
def test_a_mobilenet_halves_images_down_to_about_4x4(side, left):
    def stages():
        return MobileNet((side, side, 3), 10, 10, (1,) * 7, rngs=nnx.Rngs(0)).features(jnp.zeros((2, side, side, 3)))[1]

    assert jax.eval_shape(stages)["stage7"].shape == (2, left, left, 32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every student, saved; its logits in this process and in one that loaded it, by name."""
    folder, here = tmp_path_factory.mktemp("saved"), {}
    for name in MEMBERS:
        network, _, variables, apply = one = member(name)
        np.save(folder / f"{name}.npy", one.inputs(7))
        students.save(folder / name, network, variables)
        here[name] = np.asarray(apply(variables, one.inputs(7), train=False, key=jax.random.key(1))[0])
    code = f"""if True:
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        import jax, numpy as np, ev3_distill, test_student_contract
        logits = []
        for name in test_student_contract.MEMBERS:
            factory = test_student_contract.make if name == "own" else None
            network, variables = ev3_distill.load_student(name, factory=factory)
            apply = jax.jit(network.apply, static_argnames="train")
            logits.append(np.asarray(apply(variables, np.load(name + ".npy"), train=False, key=jax.random.key(1))[0]))
        np.save("logits.npy", np.stack(logits))
    """
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, here, dict(zip(MEMBERS, np.load(folder / "logits.npy"), strict=True))


@every_member
def test_another_process_loads_the_same_student(saved, name):
    _, here, there = saved
    np.testing.assert_array_equal(here[name], there[name])


def test_saving_again_replaces_the_student(tmp_path):
    network = students.from_name("mlp:hidden=3", SHAPE, CLASSES)
    one, other = network.init(jax.random.key(0)), network.init(jax.random.key(1))
    (tmp_path / ".student.1.tmp").mkdir()  # as a killed process leaves it
    students.save(tmp_path / "student", network, one)
    students.save(tmp_path / "student", network, other)
    assert bits(students.load(tmp_path)[1]) == bits(students.load(tmp_path / "student")[1]) == bits(other)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_loading_never_imports_code_that_a_file_names(saved):
    folder = saved[0] / "own"
    with pytest.raises(
        InputError, match=r"created by .*:make, and code is never imported .*: pass the callable as factory="
    ):
        students.load(folder)


def test_damaged_or_missing_students_are_refused(tmp_path):
    network = students.from_name("mlp:hidden=3", SHAPE, CLASSES)
    students.save(tmp_path / "student", network, network.init(jax.random.key(0)))
    spec = tmp_path / "student" / "spec.json"
    good = spec.read_text()
    (tmp_path / "student" / "digest.json").unlink()  # as an older version saved it
    for text, says in (
        (good.replace("mlp", "cnn"), "a network's family is one of .*; got 'cnn': use one of these"),
        (
            good.replace("3", "4", 1),
            r"cannot be read for a network .*: .*is saved as float32 \(3,\), the network has float32 \(4,\)",
        ),
        ("{", "no readable spec.json"),
    ):
        spec.write_text(text)
        with pytest.raises(InputError, match=says):
            students.load(tmp_path)
    with pytest.raises(InputError, match="name a finished run or its student/ directory"):
        students.load(tmp_path / "nothing")


def test_parameters_of_an_mlp_by_hand():
    network = students.from_name("mlp:hidden=3-2", (4,), 5)
    assert network.spec == {"family": "mlp", "hidden": [3, 2], "input_shape": [4], "num_classes": 5}
    assert count_params(network.init(jax.random.key(0))) == 4 * 3 + 3 + 3 * 2 + 2 + 2 * 5 + 5


@pytest.mark.parametrize(
    ("make", "params"),
    [
        (lambda rngs: Conv4((28, 28, 1), 10, 64, rngs=rngs), 111_936 - 256 + 650),  # no biases, but a head
        (lambda rngs: MobileNet((32, 32, 3), 10, 100, BLOCKS, rngs=rngs), 2_236_682),  # as torchvision's
        (lambda rngs: ResNet(3, 10, 20, 16, rngs=rngs), 269_722),
    ],
    ids=["conv4", "mobilenet", "resnet20"],
)
def test_parameter_counts_are_those_of_the_papers(make, params):
    state = jax.eval_shape(lambda: nnx.state(make(nnx.Rngs(0)), nnx.Param))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == params


def test_max_pool_by_hand():
    x = jnp.array([[1, 5, 2, 0, 9], [4, 3, 2, 7, 9], [9, 9, 9, 9, 9]], jnp.float32)[None, ..., None]
    np.testing.assert_array_equal(max_pool(x)[0, ..., 0], [[5, 7]])
    gradient = jax.grad(lambda x: (max_pool(x) * jnp.array([2.0, 3.0])[None, None, :, None]).sum())(x)
    np.testing.assert_array_equal(gradient[0, ..., 0], [[0, 2, 0, 0, 0], [0, 0, 0, 3, 0], [0, 0, 0, 0, 0]])


def test_a_vit_ignores_the_order_of_patches_without_positions():
    """Without position embeddings, the order of patches has no effect; that of pixels within a patch does."""
    _, _, variables, apply = one = member("vit")
    x, key = one.inputs(7), jax.random.key(1)
    turned, within = jnp.roll(x, (4, 8), (1, 2)), jnp.roll(x, 1, 2)
    encoder = variables.params["encoder"] | {"positions": 0 * variables.params["encoder"]["positions"]}
    nowhere = variables._replace(params=variables.params | {"encoder": encoder})
    changes = [[jnp.abs(apply(v, y, train=False, key=key)[0] - apply(v, x, train=False, key=key)[0]).max()
             for y in (turned, within)] for v in (variables, nowhere)]  # fmt: skip
    assert changes[1][0] < 1e-5
    assert min(changes[0][0], changes[0][1], changes[1][1]) > 1e-4


def test_public_names_of_the_package_resolve():
    assert ev3_distill.load_student is students.load
    for name in ev3_distill.__all__:
        assert getattr(ev3_distill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ev3_distill.nothing


# Through the command line.

CODE = """
from flax import nnx

def make(input_shape, num_classes, rngs):
    size = input_shape[0] * input_shape[1]
    return nnx.Sequential(
        lambda x: x.reshape(len(x), -1), nnx.Linear(size, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu,
        nnx.Dropout(0.1, rngs=rngs), nnx.Linear(8, num_classes, rngs=rngs),
    )
"""


def test_a_users_student_trains_saves_and_evaluates(cli, here):
    """A user's network is both student and teacher of one run."""
    (here / "own_student.py").write_text(CODE)
    answer = cli(
        *("compress", "--student", "own_student:make", "--teacher-network", "own_student:make", "--out", "run"),
        *("--arms", "ce", "--budget", "300", "--teacher-budget", "200"),
    )
    assert answer.code == 0, answer.err
    report = json.loads((here / "run/report.json").read_text())
    assert report["student"]["params"] == report["teacher"]["params"] == 64 * 8 + 8 + 2 * 8 + 8 * 10 + 10
    assert report["student"]["accuracy"] > 0.8

    import own_student

    network, variables = ev3_distill.load_student(here / "run", factory=own_student.make)
    assert network.apply(variables, jnp.zeros((3, 8, 8, 1)), train=False)[0].shape == (3, 10)
    refused = cli("evaluate", "run")
    assert refused.code == 2
    assert "as --student of evaluate" in refused.err
    answer = cli("evaluate", "run", "--student", "own_student:make")
    assert answer.out.startswith(f"accuracy: {report['student']['accuracy']:.2%} of 359 examples; at least ")
