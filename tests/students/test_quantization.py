"""int8: rounding of weights and activations, straight-through gradients, and files that compute what was scored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill import students
from ev3_distill.arms import arms_named
from ev3_distill.benchmarks import int8_accuracy
from ev3_distill.cli.main import main
from ev3_distill.core.explore import fitting
from ev3_distill.errors import InputError
from ev3_distill.export.formats import onnx as onnx_format
from ev3_distill.students.layers import standard_convolutions
from ev3_distill.students.quantization import NETWORK_STATS, RANGES, has_batch_stats, round_weights
from ev3_distill.types import Batch, Stretch, Variables

FAMILIES = {
    "mlp:hidden=8-8": (6,),
    "resnet:depth=8,width=2": (8, 8, 1),
    "convnet1d:filters=4-4": (16, 2),
    "vit:width=8,depth=1,heads=2": (8, 8, 1),
}


def test_weights_are_rounded_with_one_scale_per_channel():
    """Two output channels with maxima 6.4 and 0.64 have steps of 0.1 and 0.01."""
    weights = jnp.array([[6.4, 0.123], [-3.14, -0.64], [0.0, 0.006]])
    wanted = [[6.4, 0.12], [-3.1, -0.64], [0.0, 0.01]]
    np.testing.assert_allclose(round_weights(weights, (1,)), wanted, atol=1e-6)
    np.testing.assert_array_equal(round_weights(jnp.zeros((3, 2)), (1,)), np.zeros((3, 2)))
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 5))
    steps = round_weights(kernel, (3,)) / (jnp.abs(kernel).max((0, 1, 2)) / 64)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    np.testing.assert_allclose(jnp.abs(steps).max((0, 1, 2)), 64, atol=1e-4)


def test_a_linear_classifier_by_hand():
    """Inputs are rounded to range / 255 with zero as a level, weights to 1 / 64 of the maximum, logits not at all."""
    network = students.with_precision(students.from_name("mlp:hidden=2", (2,), 2), "int8")
    linear = students.build({"family": "mlp", "hidden": [], "input_shape": [2], "num_classes": 2, "deploy": "int8"})
    assert network.spec["deploy"] == linear.spec["deploy"] == "int8"
    variables = linear.init(jax.random.key(0))
    kernel, bias = np.array([[1.0, 0.5], [0.26, -0.5]]), np.array([0.1, 0.2])
    params = {"layers": {0: {"kernel": jnp.array(kernel, jnp.float32), "bias": jnp.array(bias, jnp.float32)}}}
    assert jax.tree.structure(params) == jax.tree.structure(variables.params)
    ranges = {"low": jnp.array([-1.0]), "high": jnp.array([4.1])}  # steps of 0.02, zero is level 50
    inputs = jnp.array([[0.313, 1.0], [9.0, -7.0]])
    logits, _ = linear.apply(
        Variables(params, {NETWORK_STATS: variables.stats[NETWORK_STATS], RANGES: ranges}), inputs, train=False
    )
    steps = np.array([[1, 0.5], [17 / 64, -0.5]])  # 0.26 is 16.64 steps
    np.testing.assert_allclose(logits, np.array([[0.32, 1.0], [4.1, -1.0]]) @ steps + bias, atol=1e-6)


def trained(network, inputs, steps=6):
    """Variables after some training passes without an optimizer, and `fit`: statistics and ranges have moved."""
    variables = network.init(jax.random.key(1))
    update = jax.jit(lambda variables, inputs, key: network.apply(variables, inputs, train=True, key=key)[1])
    for i in range(steps):
        variables = update(variables, inputs[32 * i : 32 * (i + 1)], jax.random.key(i))
    return jax.jit(network.fit)(variables, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_onnx_file_computes_what_was_scored(name):
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    network = students.with_precision(students.from_name(name, FAMILIES[name], 5), "int8")
    inputs = np.random.default_rng(0).normal(size=(200, *FAMILIES[name])).astype(np.float32)
    variables = trained(network, inputs)
    logits = np.asarray(jax.jit(lambda v, x: network.apply(v, x, train=False)[0])(variables, inputs))

    def says(inputs):
        with standard_convolutions():
            return network.apply(variables, inputs, train=False)[0]

    example = jax.ShapeDtypeStruct(FAMILIES[name], np.float32)
    made = onnx_format.serialize(says, example, name=name, output="logits", metadata={})
    (outputs,) = ort.InferenceSession(made).run(None, {"inputs": inputs})
    ordered = np.sort(logits, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 0.02 * np.abs(logits).max()
    assert clear.mean() > 0.5
    assert (outputs.argmax(axis=1) == logits.argmax(axis=1))[clear].all()
    assert np.median(np.abs(outputs - logits)) < 0.01 * np.abs(logits).max()  # where no sum rounded to another integer
    stored = {onnx.TensorProto.DataType.Name(one.data_type) for one in onnx.load_from_string(made).graph.initializer}
    large = [one for one in onnx.load_from_string(made).graph.initializer if len(one.dims) > 1]
    products = [n for n in onnx.load_from_string(made).graph.node if n.op_type in ("Conv", "MatMul")]
    assert "INT8" in stored and products
    left = {one.name for one in large if one.data_type == onnx.TensorProto.FLOAT}
    assert not [
        n.name for n in products if left.intersection(n.input)
    ]  # onnxruntime would quantize these again, with one coarse scale
    assert sum(one.data_type == onnx.TensorProto.INT8 for one in large) == sum(
        any(source.op_type == "DequantizeLinear" and source.output[0] == n.input[1] for source in
            onnx.load_from_string(made).graph.node) for n in products
    )  # fmt: skip


def test_gradients_pass_straight_through_the_rounding():
    """`straight` has the gradients at the rounded weights, `apply` those at the float32 weights."""
    base = students.from_name("mlp:hidden=4", (6,), 3)
    network = students.with_precision(base, "int8")
    variables = network.init(jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (16, 6))

    def gradient(apply, params, stats):
        return jax.grad(lambda params: jnp.square(apply(Variables(params, stats), inputs, train=True)[0]).sum())(params)

    kernels = jax.tree.map(lambda leaf: round_weights(leaf, (1,)) if leaf.ndim > 1 else leaf, variables.params)
    for apply, params in ((network.straight, kernels), (network.apply, variables.params)):
        got = gradient(apply, variables.params, variables.stats)
        wanted = gradient(base.apply, params, variables.stats[NETWORK_STATS])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)
        after = apply(variables, inputs, train=True)[1]
        jax.tree.map(np.testing.assert_array_equal, after.params, variables.params)  # the float32 weights are kept


def test_fit_sets_the_ranges_of_inputs_and_activations():
    network = students.with_precision(students.from_name("mlp:hidden=4", (6,), 3), "int8")
    variables = network.init(jax.random.key(0))
    np.testing.assert_array_equal(
        variables.stats[RANGES]["high"], [0, 0]
    )  # ranges of the inputs and of the ReLU's output
    inputs = jax.random.normal(jax.random.key(1), (16, 6))
    ranges = network.fit(variables, inputs).stats[RANGES]
    layer = variables.params["layers"][0]
    made = jax.nn.relu(inputs @ round_weights(layer["kernel"], (1,)) + layer["bias"])
    np.testing.assert_allclose(ranges["low"], [inputs.min(), made.min()], rtol=1e-6)
    np.testing.assert_allclose(ranges["high"], [inputs.max(), made.max()], rtol=1e-6)
    trained_on = network.apply(variables, inputs, train=True)[1]
    np.testing.assert_array_equal(trained_on.stats[RANGES]["high"], [0, 0])  # training leaves ranges unchanged
    assert not has_batch_stats(variables)


def test_proposals_are_fitted_to_batches_of_their_trajectory():
    """For steps 10 to 19 these are batches 10, 12, 15 and 17; an arm without steps leaves the ranges unchanged."""
    network = students.with_precision(students.from_name("mlp:hidden=4", (6,), 3), "int8")
    variables = network.init(jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (20, 16, 6))

    def draw(step):
        return Batch(
            inputs[step], jnp.zeros(16, jnp.int32), {"logits": jnp.zeros((16, 3))}, jnp.arange(16), jnp.ones(16)
        ), None

    (arm,) = arms_named(network.apply, ("kd4",), network=network)
    for steps, batches in ((10, [10, 12, 15, 17]), (1, [10]), (0, [])):
        stretch = Stretch(jnp.int32(10), jnp.int32(steps), jnp.float32(0), jnp.float32(0.01))
        plain = arm.propose(arm.init(variables), draw, stretch)[1]
        student = jax.jit(fitting(arm, network.fit).propose, static_argnums=1)(arm.init(variables), draw, stretch)[1]
        wanted = network.fit(plain, jnp.concatenate(inputs[jnp.array(batches)])) if batches else variables
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), student, wanted)


def test_arms_round_weights_at_the_end_of_the_budget():
    """In the last quarter of the budget, or always with the suffix -straight, which a float32 student does not have."""
    base = students.from_name("mlp:hidden=4", (6,), 3)
    network = students.with_precision(base, "int8")
    variables = network.init(jax.random.key(0))
    inputs, logits = jax.random.normal(jax.random.key(1), (16, 6)), jax.random.normal(jax.random.key(2), (16, 3))
    batch = Batch(inputs, jnp.zeros(16, jnp.int32), {"logits": logits}, jnp.arange(16), jnp.ones(16))

    def proposed(apply, name, spent, network=network):
        (arm,) = arms_named(apply, (name,), network=network)
        stretch = Stretch(jnp.int32(0), jnp.int32(4), jnp.float32(spent), jnp.float32(0.05))
        return arm.propose(arm.init(variables), lambda step: (batch, jax.random.key(0)), stretch)[1].params

    def same(one, other):
        return all(np.allclose(a, b, atol=1e-6) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))

    plain, straight = (proposed(apply, "kd4", 0, network=None) for apply in (network.apply, network.straight))
    assert same(proposed(network.apply, "kd4", 0.5), plain) and not same(plain, straight)
    assert same(proposed(network.apply, "kd4", 0.75), straight)
    assert same(proposed(network.apply, "kd4-straight", 0), straight)
    between = proposed(network.apply, "kd4", 0.65)  # the last two steps of four
    assert not same(between, plain) and not same(between, straight)
    mixed = proposed(network.apply, "0.5*kd+0.5*ce@0.003-straight", 0)
    assert same(mixed, proposed(network.apply, "0.5*kd+0.5*ce@0.003", 0.9))
    with pytest.raises(InputError, match="add --deploy int8"):
        arms_named(base.apply, ("kd4-straight",), network=base)


def test_an_int8_run_is_certified_exported_and_evaluated(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2000, 6)).astype(np.float32)
    labels = (inputs @ rng.normal(size=(6, 3))).argmax(axis=1)
    np.savez("data.npz", inputs=inputs, labels=labels)
    np.savez("logits.npz", logits=(4 * np.eye(3)[labels]).astype(np.float32))
    common = ("--data", "npz:data.npz", "--teacher", "logits:logits.npz", "--student", "mlp:hidden=8")
    common += ("--arms", "ce", "ce-straight")
    main(["compress", *common, "--budget", "400", "--deploy", "int8", "--guard", "accuracy >= 0.8", "--out", "run"])
    assert "This student, in int8, has at least" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["student"]["deploy"] == "int8"
    network, variables = students.load(tmp_path / "run")
    assert network.spec["deploy"] == "int8" and set(variables.stats) == {NETWORK_STATS, RANGES}
    rounds, not_rounded = (
        network.apply(variables, inputs, train=False)[0],
        int8_accuracy.unrounded(tmp_path / "run", inputs),
    )
    assert 0.95 < (rounds.argmax(axis=1) == not_rounded).mean() < 1
    main(["export", "run", "--format", "onnx", "--out", "file"])
    content = json.loads((tmp_path / "file/model.json").read_text())
    assert content["precision"] == "int8" and content["certificate"] == {}
    assert content["promise"].startswith("No certificate covers this file, which may round some sums")
    main(
        ["evaluate", "file", "--of", "run", "--guard", "accuracy >= 0.8"]
    )  # allowed on the sealed split, because the student was trained for int8
    shown = capsys.readouterr().out
    assert "int8" in shown and "certified" in shown
    with pytest.raises(SystemExit) as ended:  # a further claim is one about this file, not about the student
        main(["evaluate", "file", "--of", "run", "--guard", "ece <= 0.9", "--reopen"])
    assert ended.value.code == 2
    assert "the sealed split certifies it for accuracy, agreement only" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["export", "run", "--format", "onnx", "--int8", "--out", "other"])
    assert ended.value.code == 2 and not (tmp_path / "other").exists()
    assert "trained for int8 already" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--start", "tiny"), ("--control",), ("--deploy", "int4")])
def test_int8_is_refused_with_other_options(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["compress", "--deploy", "int8", *options, "--out", "run"])
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert "deploy" in capsys.readouterr().err
