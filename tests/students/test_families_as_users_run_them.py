"""Every student family trains and predicts with the compiler options and convolutions of a real run.

The suite compiles with quick XLA flags and a compilation cache. The subprocess here has neither.
It trains each family with an arm of a default run, compiled as the trainer compiles, and saves the result. This process then
compares the predictions with those under the quick options.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import once
from student_zoo import CLASSES

from ev3_distill import students

pytestmark = pytest.mark.slow

FAMILIES = {  # name and input shape; wide enough for the library convolutions that the real options turn off
    "mlp": ("mlp:hidden=32-32", (16,)),
    "convnet1d": ("convnet1d:filters=16-32", (20, 3)),
    "conv4": ("conv4:width=32", (16, 16, 3)),
    "resnet": ("resnet8:width=16", (12, 12, 3)),
    "mobilenet": ("mobilenet:filters=16-16-24-64,blocks=1-1", (12, 12, 3)),
    "vit": ("vit:width=16,depth=1,heads=2", (12, 12, 3)),
    "transformer": ("transformer:width=16,depth=1,heads=2", (12, 3)),
}
CONVOLUTIONAL = (
    "convnet1d",
    "conv4",
    "resnet",
    "mobilenet",
)  # families with convolutions that compiled kernels compute
STEPS, EXAMPLES = 20, 32

REAL_RUN = """
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.arms import arms_named
from ev3_distill.runtime.compile import compiler_options, jit
from ev3_distill.students.layers import compiled
from ev3_distill.types import Batch, Stretch

families, classes, steps = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
facts = {"options": compiler_options(), "kernels": compiled.available(), "families": {}}
for family, (name, shape) in families.items():
    inputs = jnp.asarray(np.load(f"{family}.npy"))
    network = students.from_name(name, shape, classes)
    labels = jnp.arange(len(inputs), dtype=jnp.int32) % classes
    teacher = 4 * jax.nn.one_hot(labels, classes)
    batch = Batch(inputs, labels, {"logits": teacher}, jnp.arange(len(inputs)), jnp.ones(len(inputs)))
    (arm,) = arms_named(network.apply, ("kd4",), network=network)

    def train(state):
        stretch = Stretch(jnp.int32(0), jnp.int32(steps), jnp.float32(0.3), jnp.float32(0))
        return arm.propose(state, lambda step: (batch, jax.random.key(step)), stretch)[1]

    def loss_and_logits(variables):
        logits = network.apply(variables, inputs, train=True, key=jax.random.key(0))[0]
        loss = -(jax.nn.softmax(teacher) * jax.nn.log_softmax(logits)).sum(1).mean()
        return loss, network.apply(variables, inputs, train=False)[0]

    before = network.init(jax.random.key(1))
    state = arm.init(before)
    train, measure = jit(train), jit(loss_and_logits)
    after = train(state)
    students.save(Path(family), network, after)
    loss_after, logits = measure(after)
    np.save(f"{family}.logits.npy", logits)
    calls = train.lower(state).as_text().count("@ev3_convolution")
    facts["families"][family] = {"before": float(measure(before)[0]), "after": float(loss_after), "calls": calls}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """A folder with every family's trained student, inputs and logits, and facts.json about the process that trained them."""

    def make(folder):
        for family, (_, shape) in FAMILIES.items():
            inputs = np.random.default_rng(0).normal(size=(EXAMPLES, *shape)).astype(np.float32)
            np.save(folder / f"{family}.npy", inputs)
        quick = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "EV3_DISTILL_KERNELS")
        environment = {name: value for name, value in os.environ.items() if name not in quick}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", REAL_RUN, json.dumps(FAMILIES), str(CLASSES), str(STEPS)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (folder / "facts.json").write_text(done.stdout.splitlines()[-1])

    return once(tmp_path_factory, "real_run", make)


@pytest.fixture(scope="module")
def facts(real_run):
    return json.loads((real_run / "facts.json").read_text())


def test_every_family_is_run():
    assert set(FAMILIES) == set(students.FAMILIES)


def test_options_are_those_of_a_real_run(facts):
    if not jax.__version__.startswith("0.10.") or jax.default_backend() != "cpu":
        pytest.skip("the options are for XLA:CPU of jaxlib 0.10")
    assert facts["options"]
    for family, of_family in facts["families"].items():
        assert (of_family["calls"] > 0) == (facts["kernels"] and family in CONVOLUTIONAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_of_a_real_arm_lower_the_loss(family, facts):
    losses = facts["families"][family]
    assert losses["after"] < 0.9 * losses["before"]


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_equal_those_under_the_quick_options(family, real_run):
    network, variables = students.load(real_run / family)
    inputs, expected = np.load(real_run / f"{family}.npy"), np.load(real_run / f"{family}.logits.npy")
    logits = jax.jit(lambda variables, inputs: network.apply(variables, inputs, train=False)[0])(variables, inputs)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
