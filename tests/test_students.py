"""The contract that every student keeps, the zoo's and the user's own."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ev3_distill
import students
from ev3_distill.errors import InputError
from ev3_distill.network import count_params
from ev3_distill.types import Network

SHAPE, CLASSES = (8, 8, 1), 10


class Own(nnx.Module):
    """A user's own student, with all that makes training differ from evaluation."""

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
NAMES = [*students.FAMILIES, OWN]


@pytest.fixture(scope="module", params=NAMES)
def network(request) -> Network:
    return students.named(request.param, SHAPE, CLASSES)


@pytest.fixture(scope="module")
def variables(network):
    return jax.jit(network.init)(jax.random.key(0))


def inputs_of(n, seed=0):
    return jax.random.uniform(jax.random.key(seed), (n, *SHAPE))


def test_shapes_and_types(network, variables):
    for n in (1, 5):
        for train in (False, True):
            logits, after = network.apply(variables, inputs_of(n), train=train, key=jax.random.key(1))
            assert (logits.shape, logits.dtype) == ((n, CLASSES), jnp.float32)
            assert jnp.isfinite(logits).all()
            assert jax.tree.structure(after) == jax.tree.structure(variables)
            same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, after, variables)
            assert all(jax.tree.leaves(same))
            assert bits(after.params) == bits(variables.params)
    assert json.loads(json.dumps(network.spec)) == network.spec


def bits(tree):
    return [(np.asarray(leaf).dtype.str, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_an_example_is_judged_alone(network, variables):
    """In evaluation, what else is in the batch does not matter, and nothing is random."""
    inputs = inputs_of(7)
    together, after = network.apply(variables, inputs, train=False)
    alone = jnp.concatenate([network.apply(variables, row[None], train=False)[0] for row in inputs])
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)
    assert bits(after) == bits(variables)
    np.testing.assert_array_equal(network.apply(variables, inputs, train=False, key=jax.random.key(9))[0], together)


def test_key_decides_all(network, variables):
    init = jax.jit(network.init)
    assert bits(init(jax.random.key(0))) == bits(variables)
    assert bits(init(jax.random.key(1)).params) != bits(variables.params)
    trained = [network.apply(variables, inputs_of(4), train=True, key=jax.random.key(k)) for k in (3, 3, 4)]
    assert bits(trained[0]) == bits(trained[1])
    if network.spec.get("factory"):  # dropout
        assert bits(trained[0][0]) != bits(trained[2][0])


def test_gradient_reaches_every_parameter(network, variables):
    labels = jnp.arange(64) % CLASSES

    @jax.grad
    def gradient(params):
        logits, _ = network.apply(variables._replace(params=params), inputs_of(64), train=True, key=jax.random.key(0))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables.params)):
        assert jnp.isfinite(leaf).all(), path
        assert jnp.any(leaf != 0), path


def test_training_moves_statistics_but_evaluation_does_not(network, variables):
    after = network.apply(variables, inputs_of(9), train=True, key=jax.random.key(0))[1]
    if jax.tree.leaves(variables.stats):
        assert bits(after.stats) != bits(variables.stats)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every student, saved; its logits here and as another process reads them, by name."""
    folder, here = tmp_path_factory.mktemp("saved"), {}
    inputs = inputs_of(6)
    np.save(folder / "inputs.npy", inputs)
    for i, name in enumerate(NAMES):
        made = students.named(name, SHAPE, CLASSES)
        variables = made.init(jax.random.key(i))
        students.save(folder / str(i), made, variables)
        here[name] = np.asarray(made.apply(variables, inputs, train=False)[0])
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
        import numpy as np, ev3_distill, test_students
        inputs, logits = np.load("inputs.npy"), []
        for i, name in enumerate(test_students.NAMES):
            factory = test_students.make if name == test_students.OWN else None
            network, variables = ev3_distill.load_student(str(i), factory=factory)
            logits.append(np.asarray(network.apply(variables, inputs, train=False)[0]))
        np.save("logits.npy", np.stack(logits))
    """
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, here, dict(zip(NAMES, np.load(folder / "logits.npy"), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_another_process_reads_what_was_saved(saved, name):
    _, here, there = saved
    np.testing.assert_array_equal(here[name], there[name])


def test_saved_twice_is_saved_once(tmp_path):
    network = students.named("mlp:hidden=3", SHAPE, CLASSES)
    one, other = network.init(jax.random.key(0)), network.init(jax.random.key(1))
    (tmp_path / "student.tmp").mkdir()  # as a killed process leaves it
    students.save(tmp_path / "student", network, one)
    students.save(tmp_path / "student", network, other)
    assert bits(students.load(tmp_path)[1]) == bits(students.load(tmp_path / "student")[1]) == bits(other)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_code_is_not_imported_because_a_file_names_it(saved):
    folder = saved[0] / str(NAMES.index(OWN))
    with pytest.raises(
        InputError, match=r"made by .*:make, and code is never imported .*: pass that callable as factory="
    ):
        students.load(folder)


def test_what_cannot_be_loaded(tmp_path):
    network = students.named("mlp:hidden=3", SHAPE, CLASSES)
    students.save(tmp_path / "student", network, network.init(jax.random.key(0)))
    spec = tmp_path / "student" / "spec.json"
    good = spec.read_text()
    for text, says in (
        (good.replace("mlp", "resnet"), "a network's family is one of .*; got 'resnet': name one of these"),
        (
            good.replace("3", "4", 1),
            r"cannot be read for a network .*: .*is saved as float32 \(3,\), the network has float32 \(4,\)",
        ),
        ("{", "none that can be read"),
    ):
        spec.write_text(text)
        with pytest.raises(InputError, match=says):
            students.load(tmp_path)
    with pytest.raises(InputError, match="name a finished run or its student/ directory"):
        students.load(tmp_path / "nothing")


def test_mlp_by_hand():
    network = students.named("mlp:hidden=3-2", (4,), 5)
    assert network.spec == {"family": "mlp", "hidden": [3, 2], "input_shape": [4], "num_classes": 5}
    assert count_params(network.init(jax.random.key(0))) == 4 * 3 + 3 + 3 * 2 + 2 + 2 * 5 + 5


def test_public_names():
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


def test_own_student_end_to_end(cli, here):
    """The user's own network is student and teacher of one run."""
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
    assert "to evaluate as --student" in refused.err
    answer = cli("evaluate", "run", "--student", "own_student:make")
    assert answer.out.startswith(f"accuracy: {report['student']['accuracy']:.2%} of 359 examples; at least ")
