"""Runs on many devices: the same student, whoever computes which part of it."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import once
from processes import ROOT

from ev3_distill.errors import InputError
from ev3_distill.training.devices import ONE, devices_of

DEVICES = 4
# What a process with four devices runs: a short run whose three arms race, on each mesh; batches of a network with statistics.
WORK = f"""
import json, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "training")!r}]
import jax, numpy as np, optax
import ev3_distill as ev3
from ev3_distill.tasks.classification import example_scores as objectives
from ev3_distill.arms.evolution_arm import evolution_arm
from ev3_distill.evolution import EvolutionConfig
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.core import initial_state
from ev3_distill.training.devices import ONE, devices_of
from ev3_distill.training.trainer import Distillation
from ev3_distill import students
from test_devices import pools_of
from test_trainer import squared, cross_entropy

config = ev3.EV3(batch_size=8, eval_batch_size=16, length=2, max_length=4)
pools = pools_of()


def run(devices, name="conv4:width=2", supplied=False, population=False):
    network = devices.network(students.from_name(name, (16, 16, 1), 3))
    arms = (
        gradient_arm("mse", network.apply, squared, optax.sgd(0.05)),
        gradient_arm("ce", network.apply, cross_entropy, optax.adam(0.01)),
        gradient_arm("fast", network.apply, squared, optax.sgd(0.2)),
    )
    if population:
        adam, evolving = optax.adam(0.05), EvolutionConfig(pairs=8, sigma=0.1)
        es = evolution_arm("es", network.apply, objectives.accuracy, adam, evolving, mesh=devices.step_mesh)
        arms = (arms[1], es)
    made = Distillation(network, arms, config=config, devices=devices)
    supply = (lambda first, last: iter([(pools.explore, first, last)])) if supplied else None
    state = made.begin(pools, 0)
    told = []
    for packed, decisions in made.loop(pools, state, budget=36, pipeline=supply, at_once=2):
        told += [[int(d.cost), int(d.selected), d.steps.tolist()] for d in decisions]
    state = made.loop.unflatten(packed)
    which, delivered = made.evaluator.select(pools, state)
    accuracy = float(made.evaluator.evaluate(delivered, pools.assess).promise.mean())
    flat = jax.flatten_util.ravel_pytree((state.current.variables, state.champion.variables, state.arms.states))[0]
    text = "" if supplied else made.programs.text("several")
    return dict(state=np.asarray(flat, np.float64).tolist(), told=told, accuracy=accuracy, text=text)


found = {{name: run(devices) for name, devices in dict(one=ONE, parts=devices_of(4)).items()}}
found["parts, supplied"] = run(devices_of(4), supplied=True)
meshes = dict(alone=ONE, arms=devices_of(3, spread="arms"), fewer=devices_of(2, spread="arms"))
found |= {{name: run(devices, "mlp:hidden=4") for name, devices in meshes.items()}}
meshes = dict(one=ONE, parts=devices_of(4))
found |= {{f"population, {{name}}": run(on, "mlp:hidden=4", population=True) for name, on in meshes.items()}}
print(json.dumps(found))
"""


def pools_of():
    """Images whose class is where they are bright, with the logits of a teacher who knows."""
    import jax.numpy as jnp

    from ev3_distill.data.batches import Resident
    from ev3_distill.data.shuffle import make_order
    from ev3_distill.types import Batch, Pools

    def split(seed, n):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 3, n)
        inputs = rng.normal(size=(n, 16, 16, 1))
        inputs[np.arange(n), labels * 5] += 2
        logits = 4 * np.eye(3)[labels] + rng.normal(size=(n, 3))
        return Batch(
            jnp.asarray(inputs, jnp.float32),
            jnp.asarray(labels, jnp.int32),
            {"logits": jnp.asarray(logits, jnp.float32)},
            jnp.arange(n, dtype=jnp.int32),
            jnp.ones(n),
        )

    explore = split(0, 48)
    views = explore._replace(teacher={"logits": explore.teacher["logits"][None]})
    return Pools(Resident(views, make_order(48, 0)), split(1, 37), split(2, 37))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each mesh made of the same run, four devices being there."""
    place = once(tmp_path_factory, "devices", lambda place: (place / "runs.json").write_text(made_of_it()))
    return json.loads((place / "runs.json").read_text())


def made_of_it():
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WORK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("mesh", ["arms", "fewer"])
def test_arms_side_by_side_are_what_they_are_one_by_one(runs, mesh):
    """The race's three arms on three devices and on two; XLA may fuse, and so round, in other places."""
    assert runs[mesh]["told"] == runs["alone"]["told"]
    np.testing.assert_allclose(runs[mesh]["state"], runs["alone"]["state"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mesh", ["parts", "parts, supplied"])
def test_batches_in_parts_add_up_to_the_same(runs, mesh):
    """Gradients and BatchNorm's statistics are of whole batches: only the order of sums is another one."""
    assert runs[mesh]["told"] == runs["one"]["told"]
    np.testing.assert_allclose(runs[mesh]["state"], runs["one"]["state"], rtol=1e-3, atol=1e-4)
    assert runs[mesh]["accuracy"] == pytest.approx(runs["one"]["accuracy"], abs=0.03)


def test_the_race_was_one(runs):
    """What is compared above had several arms in an iteration, and one alone."""
    for mesh in ("one", "alone"):
        trained = [sum(steps > 0 for steps in row[2]) for row in runs[mesh]["told"]]
        assert max(trained) == 3 and min(trained) <= 1


def test_parts_are_parts(runs):
    """A convolution of a training step sees a part of the batch, and what is sent within an iteration is parameters."""
    whole, parts = (set(re.findall(r"f32\[(\d+),16,16,\d+\]", runs[mesh]["text"])) for mesh in ("one", "parts"))
    assert "8" in whole and "2" in parts and "16" in whole and "4" in parts
    assert "all-reduce" in runs["parts"]["text"] and "all-reduce" not in runs["one"]["text"]


def test_arms_send_only_what_came_of_them(runs):
    """No gradient travels: no collective within a trajectory's loop."""
    sends = [line for line in runs["arms"]["text"].splitlines() if re.search(r"= .*(all-reduce|all-gather)\(", line)]
    assert sends and all("shard_map/psum" in line for line in sends), sends[:3]


def test_a_population_in_parts_is_the_same(runs):
    """Beside an arm whose batches are in parts, each of four devices scores two of eight pairs, on whole batches."""
    one, parts = runs["population, one"], runs["population, parts"]
    assert parts["told"] == one["told"] and any(row[2][1] for row in one["told"])
    np.testing.assert_allclose(parts["state"], one["state"], rtol=1e-3, atol=1e-4)
    gathered = re.findall(r"= f32\[(?:8,2|4,2,2)\]\S* all-gather\(", parts["text"])
    assert gathered and "all-gather" not in one["text"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"count": 9}, "between 1 and 1 devices, the number available; got 9"),
        ({"count": 0}, "between 1 and 1 devices, the number available; got 0"),
        ({"spread": "both"}, "must be batch or arms; got 'both'"),
    ],
)
def test_devices_that_are_not_there_are_told(asked, told):
    with pytest.raises(InputError, match=told):
        devices_of(**asked)


def test_one_device_is_nothing_special():
    network = object()
    assert ONE.network(network) is network and ONE.place(network) is network and ONE.gather(network) is network
