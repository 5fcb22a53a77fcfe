"""Populations on several devices and processes: equal trajectories, little communication, failure if a process dies."""

import json
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
from conftest import once
from processes import QUICK_COMPILE, ROOT, free_port

from ev3_distill.errors import InputError
from ev3_distill.runtime import distributed

SILENCE_S = 4  # timeout for a dead process in these tests

# Program of a process. Its argument is a JSON object of options; it prints a JSON object of results.
WORK = """
import hashlib, json, os, sys
import jax, jax.numpy as jnp, numpy as np, optax
from ev3_distill.runtime import distributed as sharding
from ev3_distill.evolution import EvolutionConfig, evolution
from ev3_distill import students

options = json.loads(sys.argv[1])
sharding.PEER_TIMEOUT_S = options.get("silence", 20)
sharding.join_processes(*options.get("start", [1]))
network = students.from_name("mlp:hidden=16-8", (12,), 3)
rng = np.random.default_rng(0)
shapes = jax.eval_shape(network.init, jax.random.key(0))
params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, shapes.params)
inputs, labels = rng.normal(size=(4, 12)).astype(np.float32), np.array([0, 1, 2, 0])


def fitness(params, key):
    logits = network.apply(shapes._replace(params=params), inputs, train=False)[0]
    score = jax.nn.log_softmax(logits)[jnp.arange(4), labels].mean()
    return jnp.where(jax.random.uniform(key) < 0.1, jnp.nan, score)


def run(devices, fixed, rank, generations, pairs=13):
    mesh = sharding.make_mesh(devices)
    spread = sharding.spread_over(mesh, fixed_order=fixed)
    config = EvolutionConfig(pairs=pairs, sigma=0.1, rank=rank, chunk=2 if rank else 1)
    strategy = evolution(optax.adam(0.05), config, spread=spread)

    def trajectory(key, params):
        def generation(state, _):
            return strategy.step(jax.random.wrap_key_data(key), state, fitness)
        state, info = jax.lax.scan(generation, strategy.init(params), None, length=generations)
        return jax.flatten_util.ravel_pytree(state.mean)[0], info

    key = np.asarray(jax.random.key_data(jax.random.key(7)))
    arguments = sharding.replicate((key, params), mesh)
    return jax.jit(sharding.on_all_devices(trajectory, mesh)), arguments


results = {}
for devices, fixed, rank in options["runs"]:
    program, arguments = run(devices, fixed, rank, options["generations"])
    program = program.lower(*arguments).compile()
    for turn in range(options.get("turns", 1)):
        with sharding.watch_peers():
            mean, info = program(*arguments)
            mean = np.asarray(mean.addressable_data(0))
        if turn == 0 and options.get("dies") == jax.process_index():
            os._exit(1)
    broken = int(np.asarray(info.failed.addressable_data(0)).sum())
    digest = hashlib.sha256(mean.tobytes()).hexdigest()
    results[f"{devices} {fixed} {rank}"] = [digest, mean.tolist(), broken, program.as_text()]
print(json.dumps(results))
"""


def launch(options, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    files = {name: tempfile.TemporaryFile("w+") for name in ("stdout", "stderr")}  # noqa: SIM115  pipes would fill up
    return subprocess.Popen([sys.executable, "-c", WORK, json.dumps(options)], env=environment, **files), files


def outcomes(*processes, timeout=300):
    """(exit code, standard output, standard error) of each process; all processes have ended afterwards."""
    try:
        codes = [process.wait(timeout=timeout) for process, _ in processes]
    finally:
        texts = []
        for process, files in processes:
            process.kill()
            process.wait()
            for file in files.values():
                with file:
                    file.seek(0)
                    texts.append(file.read())
    return list(zip(codes, texts[::2], texts[1::2], strict=True))


def results_of(*processes):
    """The JSON results of processes, all of which must succeed."""
    ends = outcomes(*processes)
    assert [code for code, _, _ in ends] == [0] * len(ends), ends[0][2][-2000:] + ends[-1][2][-2000:]
    return [json.loads(out.strip().splitlines()[-1]) for _, out, _ in ends]


RUNS = [[1, True, None], [8, True, None], *[[d, True, 1] for d in (1, 2, 4, 8)], [8, False, 1]]


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """20 generations of 13 pairs, some with NaN fitness, on 1, 2, 4 and 8 devices of one process."""

    def make(place):
        (place / "results.json").write_text(
            json.dumps(results_of(launch({"runs": RUNS, "generations": 20}, devices=8))[0])
        )

    return json.loads((once(tmp_path_factory, "trajectories", make) / "results.json").read_text())


@pytest.mark.parametrize(("devices", "rank"), [(2, 1), (4, 1), (8, 1), (8, None)])
def test_trajectories_in_fixed_order_are_bitwise_equal(trajectories, devices, rank):
    """13 pairs are not a multiple of any of these numbers of devices."""
    one, several = (trajectories[f"{count} True {rank}"] for count in (1, devices))
    assert one[0] == several[0] and one[2] == several[2] > 0


def test_trajectories_in_free_order_agree_within_rounding(trajectories):
    one, several = (trajectories[f"{devices} {fixed} 1"] for devices, fixed in ((1, True), (8, False)))
    assert several[1] == pytest.approx(one[1], rel=1e-5, abs=1e-5)


def test_two_processes_follow_the_trajectory_of_one(trajectories):
    """Two processes of one device each, connected over the loopback interface."""
    coordinator = f"127.0.0.1:{free_port()}"
    options = {"runs": [[2, True, 1]], "generations": 20}
    results = results_of(*[launch({**options, "start": [2, coordinator, i]}) for i in (0, 1)])
    alone = trajectories["1 True 1"]
    assert [of_process["2 True 1"][0] for of_process in results] == [alone[0]] * 2


@pytest.mark.parametrize("dies", [0, 1])
def test_death_of_a_process_ends_the_others(dies):
    coordinator = f"127.0.0.1:{free_port()}"
    options = {"runs": [[2, True, 1]], "generations": 3, "turns": 10**9, "dies": dies, "silence": SILENCE_S}
    ends = outcomes(*[launch({**options, "start": [2, coordinator, i]}) for i in (0, 1)], timeout=60)
    assert ends[dies][0] == 1
    code, _, err = ends[1 - dies]
    assert code != 0
    assert "start all anew" in err or "another task died" in err, err[:3000]


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@pytest.mark.parametrize("fixed", [False, True])
def test_communication_is_bounded(trajectories, fixed):
    """A device receives one scalar per member and one vector of parameters per generation.

    In fixed order it receives the vector in parts and twice, as in a ring all-reduce.
    """
    program, size = trajectories[f"8 {fixed} 1"][3], len(trajectories["1 True 1"][1])
    received = []
    for shapes, kind in COLLECTIVE.findall(program):
        numbers = 0
        for dims in re.findall(r"f32\[([\d,]*)\]", shapes):
            count = 1
            for n in filter(None, dims.split(",")):
                count *= int(n)
            numbers += count
        received.append((kind, numbers))
    members = 2 * 16  # 13 pairs, padded to 2 on each of 8 devices
    assert ("all-gather", members) in received
    total = 4 * sum(numbers for _, numbers in received)
    assert total <= 4 * members + 4 * (size if not fixed else 2 * (size + 8))


# Starting.


def test_single_process_needs_no_coordinator():
    assert distributed.join_processes() == distributed.join_processes(1) == (0, 1)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ((0, "a:1", 0), "--processes must be a positive number"),
        (("many", "a:1", 0), "--processes must be a positive number"),
        ((2, None, 0), "need a coordinator HOST:PORT"),
        ((2, "localhost", 0), "need a coordinator HOST:PORT"),
        ((2, "localhost:99999", 0), "need a coordinator HOST:PORT"),
        ((2, "localhost:1234", None), "needs its own number from 0 to 1; got None"),
        ((2, "localhost:1234", 2), "needs its own number from 0 to 1; got 2"),
    ],
)
def test_invalid_process_groups_are_rejected(group, message, monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(InputError, match=re.escape(message)):
        distributed.join_processes(*group)


def test_timeouts_are_60_s_to_connect_and_20_s_without_heartbeat(monkeypatch):
    options = {}
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **named: options.update(named))
    monkeypatch.setattr(distributed, "cores", lambda: 3)
    monkeypatch.delenv("NPROC", raising=False)
    distributed.join_processes(2, "localhost:1234", 0)
    assert (options["initialization_timeout"], options["heartbeat_timeout_seconds"]) == (60, 20)
    assert os.environ.pop("NPROC") == "4"  # number of XLA threads, at least 4


def test_fixed_order_is_limited_to_eight_devices():
    for devices in (1, 2, 4, 8):
        spread = distributed.spread_over(SimpleNamespace(size=devices, axis_names=("pairs",)), fixed_order=True)
        assert spread.parts * devices == 8
    with pytest.raises(InputError, match="divides 8; got 16"):
        distributed.spread_over(SimpleNamespace(size=16, axis_names=("pairs",)), fixed_order=True)


def test_mesh_rejects_missing_devices():
    assert distributed.make_mesh(1).size == 1
    with pytest.raises(InputError, match="got 99"):
        distributed.make_mesh(99)
