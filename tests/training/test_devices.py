"""Runs on several devices yield the same student as on one."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import once
from processes import QUICK_COMPILE, ROOT

from ev3_distill.errors import InputError
from ev3_distill.training.devices import ONE, devices_of

DEVICES = 4
# Program of a process with four devices: a short run with a race of three arms on each mesh, partly with BatchNorm.
WORK = f"""
import json, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "training")!r}]
import jax, numpy as np, optax
import ev3_distill as ev3
from ev3_distill.tasks.classification import example_scores as objectives
from ev3_distill.arms.evolution_arm import evolution_arm
from ev3_distill.evolution import EvolutionConfig
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.core import Ending
from ev3_distill.training.devices import ONE, devices_of
from ev3_distill.training.trainer import Distillation
from ev3_distill import students
from test_devices import pools_of
from test_trainer import squared, cross_entropy

config = ev3.EV3(batch_size=8, eval_batch_size=16, length=2, max_length=4, race=0.12)
pools = pools_of()


def streams(first, last, final):
    explore = pools.explore._replace(final=np.bool_(final))
    return iter([(explore, first, last)])


def run(devices, name="conv4:width=2", streamed=False, population=False):
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
    trainer = Distillation(network, arms, config=config, devices=devices, ending=Ending(has_final=True))
    pipeline = streams if streamed else None
    state = trainer.begin(pools, 0)
    rows = []
    for last, decisions in trainer.loop(pools, state, budget=36, pipeline=pipeline, at_once=2):
        rows += [[int(d.cost), int(d.selected), d.steps.tolist()] for d in decisions]
    state = last
    which, delivered = trainer.evaluator.select(pools, state)
    accuracy = float(trainer.evaluator.evaluate(delivered, pools.assess).promise.mean())
    flat = jax.flatten_util.ravel_pytree((state.current.variables, state.champion.variables, state.arms.states))[0]
    assert bool(state.final) and which in ("final", "current", "champion")
    text = "" if streamed else trainer.programs.text("several")
    return dict(state=np.asarray(flat, np.float64).tolist(), decisions=rows, accuracy=accuracy, text=text)


results = {{name: run(devices) for name, devices in dict(one=ONE, parts=devices_of(4)).items()}}
results["parts, streamed"] = run(devices_of(4), streamed=True)
meshes = dict(alone=ONE, arms=devices_of(3, spread="arms"), fewer=devices_of(2, spread="arms"))
results |= {{name: run(devices, "mlp:hidden=4") for name, devices in meshes.items()}}
meshes = dict(one=ONE, parts=devices_of(4))
results |= {{f"population, {{name}}": run(on, "mlp:hidden=4", population=True) for name, on in meshes.items()}}
print(json.dumps(results))
"""


def pools_of():
    """Images whose class is the position of a bright row, with noisy logits of the correct class."""
    import jax.numpy as jnp

    from ev3_distill.data.batches import resident
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

    explore, assess, decide = split(0, 48), split(1, 37), split(2, 37)
    inputs, targets, logits = (
        np.concatenate(leaves)
        for leaves in zip(*((x.inputs, x.targets, x.teacher["logits"]) for x in (explore, assess, decide)), strict=True)
    )
    examples = resident(inputs, targets, np.arange(len(inputs)), {"logits": logits[None]}, seed=0, explored=48)
    return Pools(examples, assess, decide)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of the same run on each mesh, with four devices available."""
    place = once(tmp_path_factory, "devices", lambda place: (place / "runs.json").write_text(run_on_meshes()))
    return json.loads((place / "runs.json").read_text())


def run_on_meshes():
    flags = f"--xla_force_host_platform_device_count={DEVICES} {QUICK_COMPILE}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WORK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["arms", "fewer"])
def test_arms_on_several_devices_agree_with_one_device(runs, mesh):
    """A race of three arms on three devices and on two; XLA may fuse, and so round, differently."""
    assert runs[mesh]["decisions"] == runs["alone"]["decisions"]
    np.testing.assert_allclose(runs[mesh]["state"], runs["alone"]["state"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["parts", "parts, streamed"])
def test_split_batches_agree_with_one_device(runs, mesh):
    """Gradients and BatchNorm statistics are those of whole batches; only the order of summation differs."""
    assert runs[mesh]["decisions"] == runs["one"]["decisions"]
    np.testing.assert_allclose(runs[mesh]["state"], runs["one"]["state"], rtol=1e-3, atol=1e-4)
    assert runs[mesh]["accuracy"] == pytest.approx(runs["one"]["accuracy"], abs=0.03)


@pytest.mark.slow
def test_compared_runs_race_several_arms(runs):
    """The runs compared here contain iterations with all three arms and iterations with at most one."""
    for mesh in ("one", "alone"):
        trained = [sum(steps > 0 for steps in row[2]) for row in runs[mesh]["decisions"]]
        assert max(trained) == 3 and min(trained) <= 1


@pytest.mark.slow
def test_each_device_computes_a_part_of_the_batch(runs):
    """With several devices, a convolution computes a part of the batch, and all-reduce combines the results."""
    whole, parts = (set(re.findall(r"f32\[(\d+),16,16,\d+\]", runs[mesh]["text"])) for mesh in ("one", "parts"))
    assert "8" in whole and "2" in parts and "16" in whole and "4" in parts
    assert "all-reduce" in runs["parts"]["text"] and "all-reduce" not in runs["one"]["text"]


@pytest.mark.slow
def test_sharded_batches_leave_parameters_whole(runs):
    """Within a training step devices add up gradients, losses and statistics; no parameter is collected or sent around."""
    sends = re.findall(r"(all-gather|collective-permute|all-to-all)\(.*op_name=\"([^\"]*)", runs["parts"]["text"])
    in_loops = [name for _, name in sends if name.count("while/body") > 1]
    assert all("closed_call/cond" in name for name in in_loops), in_loops  # these assess students, batch by batch
    assert len(sends) < 30


@pytest.mark.slow
def test_arms_send_only_their_results(runs):
    """No gradient is sent: the loop of a trajectory has no collective."""
    sends = [line for line in runs["arms"]["text"].splitlines() if re.search(r"= .*(all-reduce|all-gather)\(", line)]
    assert sends and all("shard_map/psum" in line for line in sends), sends[:3]


@pytest.mark.slow
def test_split_population_agrees_with_one_device(runs):
    """Each of four devices scores two of eight pairs on whole batches, while another arm splits its batches."""
    one, parts = runs["population, one"], runs["population, parts"]
    assert parts["decisions"] == one["decisions"] and any(row[2][1] for row in one["decisions"])
    np.testing.assert_allclose(parts["state"], one["state"], rtol=1e-3, atol=1e-4)
    gathered = re.findall(r"= f32\[(?:8,2|4,2,2)\]\S* all-gather\(", parts["text"])
    assert gathered and "all-gather" not in one["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 9}, "between 1 and 1 devices, the number available; got 9"),
        ({"count": 0}, "between 1 and 1 devices, the number available; got 0"),
        ({"spread": "both"}, "must be batch or arms; got 'both'"),
    ],
)
def test_invalid_devices_are_rejected(options, message):
    with pytest.raises(InputError, match=message):
        devices_of(**options)


def test_one_device_leaves_networks_and_arrays_unchanged():
    network = object()
    assert ONE.network(network) is network and ONE.place(network) is network and ONE.gather(network) is network
