"""Exported files compute what the student computes, in programs without this package: onnxruntime, or JAX alone."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import once
from flax import nnx
from scipy.special import softmax

from ev3_distill import students
from ev3_distill.errors import InputError
from ev3_distill.export import ExportConfig
from ev3_distill.export.formats import onnx as onnx_format
from ev3_distill.export.formats import safetensors_file, stablehlo
from ev3_distill.export.model_file import exported_forward
from ev3_distill.students import from_nnx
from ev3_distill.students.layers import standard_convolutions
from ev3_distill.teachers.kinds.flax import forward

FAMILIES = {  # name, shape of an example
    "mlp": ("mlp:hidden=8", (6, 6, 1)),
    "convnet1d": ("convnet1d:filters=4-6", (12, 3)),
    "conv4": ("conv4:width=3", (17, 16, 1)),
    "resnet": ("resnet:depth=8,width=2", (9, 10, 3)),
    "mobilenet": ("mobilenet:blocks=1-1-1,filters=8-8-16-24-64", (9, 16, 3)),
    "vit": ("vit:patch=4,width=8,depth=1,heads=2", (8, 12, 3)),
    "transformer": ("transformer:width=8,depth=1,heads=2", (10, 3)),
}
COUNT, BATCHES = 1000, (1, 7, 64)

READER = """
import sys
from pathlib import Path
import numpy as np
{imports}
inside = Path(sys.argv[1])
for path in sorted(inside.glob("*.{suffix}")):
    {opened}
    inputs = np.load(inside / (path.stem + ".npy"))
    outputs = {{}}
    for size in {batches}:
        starts = [min(i, len(inputs) - size) for i in range(0, len(inputs), size)]
        of_size = np.empty((len(inputs), {classes}), np.float32)
        for i in starts:
            of_size[i : i + size] = run(inputs[i : i + size])
        outputs[str(size)] = of_size
    np.savez(inside / (path.name + ".npz"), **outputs)
assert not {{"ev3_distill", "students", "teachers", *{forbidden}}} & set(sys.modules)
"""


def examples(shape):
    """Images, each of one color with noise."""
    rng = np.random.default_rng(3)
    colors = rng.integers(0, 256, (COUNT, *[1] * (len(shape) - 1), shape[-1]))
    return np.clip(colors + rng.integers(-60, 60, (COUNT, *shape)), 0, 255).astype(np.uint8)


def student(text, shape, classes=5):
    """A student with random variables, as after training; drawn without compilation."""
    network, rng = students.from_name(text, shape, classes), np.random.default_rng(2)

    def draw(path, leaf):
        if leaf.ndim > 1:
            return (rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(np.float32)
        around = 1 if re.search("scale|var", jax.tree_util.keystr(path)) else 0
        return (around + rng.uniform(0, 0.3, leaf.shape)).astype(np.float32)

    return network, jax.tree_util.tree_map_with_path(draw, shapes(network))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of every family: FAMILY.onnx, .stablehlo, as flax .safetensors and .apply, inputs .npy, logits FAMILY.expected.npy."""

    def make(place):
        for name, (text, shape) in FAMILIES.items():
            network, variables = student(text, shape)
            inputs = examples(shape)
            logits = jax.jit(lambda variables, x, apply=network.apply: apply(variables, x, train=False)[0])
            middle = np.asarray(logits(variables, inputs)).mean(axis=0)  # so that each class is predicted for some
            variables = jax.tree.map(lambda leaf, by=middle: leaf - by if leaf.shape == (5,) else leaf, variables)
            forward_pass, example = (
                exported_forward(network, ExportConfig("onnx")),
                jax.ShapeDtypeStruct(shape, np.uint8),
            )
            closed = functools.partial(forward_pass, variables)
            model = onnx_format.serialize(closed, example, name=text, output="logits", metadata={"classes": "5"})
            (place / f"{name}.onnx").write_bytes(model)
            (place / f"{name}.stablehlo").write_bytes(stablehlo.serialize(closed, example, name=text))
            (place / f"{name}.safetensors").write_bytes(
                safetensors_file.serialize_variables(variables, {"classes": "5"})
            )
            (place / f"{name}.apply").write_bytes(
                safetensors_file.serialize_apply(forward_pass, variables, example, name=text)
            )
            np.save(place / f"{name}.npy", inputs)
            np.save(place / f"{name}.expected", logits(variables, inputs))

    return once(tmp_path_factory, "exported", make)


def read_by(place, *, suffix, imports, opened, forbidden):
    code = READER.format(
        suffix=suffix, imports=imports, opened=opened, batches=BATCHES, classes=5, forbidden=set(forbidden)
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, place],
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def by_onnxruntime(exported, tmp_path_factory):
    opened = 's = onnxruntime.InferenceSession(path); run = lambda x: s.run(None, {"inputs": x})[0]'
    facts = {"suffix": "onnx", "imports": "import onnxruntime", "opened": opened, "forbidden": ("jax", "onnx")}
    once(tmp_path_factory, "by_onnxruntime", lambda _: read_by(exported, **facts))
    return exported


@pytest.fixture(scope="module")
def by_jax(exported, tmp_path_factory):
    opened = "run = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)"
    facts = {"suffix": "stablehlo", "imports": "import jax; from jax import export", "opened": opened}
    once(tmp_path_factory, "by_jax", lambda _: read_by(exported, **facts, forbidden=("flax", "onnxruntime")))
    return exported


@pytest.fixture(scope="module")
def by_flax(exported, tmp_path_factory):
    opened = (
        'a = export.deserialize(bytearray(path.with_suffix(".apply").read_bytes())).call; v = load_file(path); '
        "run = lambda x: jax.jit(a)(v, x)"
    )
    imports = "import jax; from jax import export; from safetensors.flax import load_file"
    facts = {"suffix": "safetensors", "imports": imports, "opened": opened, "forbidden": ("onnxruntime", "orbax")}
    once(tmp_path_factory, "by_flax", lambda _: read_by(exported, **facts))
    return exported


def assert_same(outputs, expected):
    """Equal to 1e-4, and the same class unless two logits are tied."""
    assert outputs.shape == expected.shape == (COUNT, 5)
    assert np.abs(outputs - expected).max() < 1e-4
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > 2e-5
    assert clear.mean() > 0.98
    assert (outputs.argmax(axis=1) == expected.argmax(axis=1))[clear].all()
    assert len(np.unique(expected.argmax(axis=1))) > 2


def test_every_family_is_exported():
    assert list(FAMILIES) == list(students.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_files_compute_what_the_student_computes(family, by_onnxruntime):
    expected = np.load(by_onnxruntime / f"{family}.expected.npy")
    with np.load(by_onnxruntime / f"{family}.onnx.npz") as outputs:
        for size in BATCHES:
            assert_same(outputs[str(size)], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_stablehlo_files_compute_what_the_student_computes(family, by_jax):
    expected = np.load(by_jax / f"{family}.expected.npy")
    with np.load(by_jax / f"{family}.stablehlo.npz") as outputs:
        for size in BATCHES:
            assert_same(outputs[str(size)], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_flax_files_compute_what_the_student_computes(family, by_flax):
    expected = np.load(by_flax / f"{family}.expected.npy")
    with np.load(by_flax / f"{family}.safetensors.npz") as outputs:
        for size in BATCHES:
            assert_same(outputs[str(size)], expected)


@pytest.mark.parametrize("family", ["resnet", "conv4"])
def test_strides_are_slices_in_exported_programs(family, exported):
    """Indexing with a free batch axis would be a gather, which is slower."""
    from jax import export

    text = export.deserialize(bytearray((exported / f"{family}.stablehlo").read_bytes())).mlir_module()
    assert "dynamic_slice" in text
    assert "gather" not in text


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "conv4", "convnet1d"])
def test_onnx_convolutions_contain_their_batch_norms(family, exported):
    """No BatchNorm, no transposition inside the network, and no machine-specific form of a convolution remains."""
    operators = [node.op_type for node in onnx.load(exported / f"{family}.onnx").graph.node]
    network, _ = student(*FAMILIES[family])
    norms = sum("scale" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes(network).params))
    assert operators.count("Conv") == norms
    assert operators.count("Transpose") == (2 if family == "conv4" else 1)
    assert "Mul" not in operators
    assert operators.count("Relu") > 0


def shapes(network):
    return jax.eval_shape(network.init, jax.random.key(0))


def test_standard_convolutions_apply_only_inside_their_context():
    network, variables = student(*FAMILIES["resnet"])

    def names():
        made = jax.make_jaxpr(lambda x: network.apply(variables, x, train=False)[0])(jnp.zeros((2, 9, 10, 3)))
        return {equation.primitive.name for equation in made.eqns}

    with standard_convolutions():
        assert "students_conv" not in names()
        assert "conv_general_dilated" in names()
    assert "students_conv" in names()


def run_onnx(function, inputs):
    model = onnx_format.serialize(
        function, jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype), name="it", output="result", metadata={}
    )
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["result"], {"inputs": inputs})[0]


def convolved(x, **how):
    kernel = np.random.default_rng(1).normal(size=(3, 2, 4 // how.get("feature_group_count", 1), 8)).astype(np.float32)
    return jax.lax.conv_general_dilated(
        x, kernel, how.pop("strides", (1, 1)), [(1, 2), (0, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"), **how
    )


WEIGHTS = np.random.default_rng(4).normal(size=(4, 6)).astype(np.float32)
CUBE = np.random.default_rng(5).normal(size=(6, 4, 2, 3)).astype(np.float32)
PROGRAMS = {
    "flattened": lambda x: x.reshape(len(x), -1),
    "moved and flattened": lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1),
    "batch merged and split": lambda x: (x.reshape(-1, 4) @ WEIGHTS).reshape(len(x), -1),
    "sliced": lambda x: x[:, 1::2, :3, -2:].sum((1, 2)),
    "one of an axis": lambda x: x[:, 2, :, 1],
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (2, 0)), constant_values=3.0).mean(2),
    "joined": lambda x: jnp.concatenate([x, x * 2, jnp.ones((len(x), 5, 6, 1))], -1),
    "split": lambda x: jnp.split(x, (1, 3), axis=2)[1],
    "convolved": convolved,
    "strided": lambda x: convolved(x, strides=(2, 1)),
    "dilated": lambda x: convolved(x, rhs_dilation=(2, 1)),
    "grouped": lambda x: convolved(x, feature_group_count=2),
    "with a norm": lambda x: (convolved(x) * 2 + jnp.arange(8.0)) * jnp.arange(1.0, 9.0) - 1,
    "one use is no norm": lambda x: (y := convolved(x)) * jnp.arange(8.0) + y,
    "a norm of pixels": lambda x: convolved(x) * jnp.arange(6.0)[:, None, None] + jnp.arange(36.0).reshape(6, 6, 1),
    "largest": lambda x: nnx.max_pool(x, (2, 3), strides=(2, 2), padding="SAME"),
    "averaged": lambda x: nnx.avg_pool(x, (2, 2), strides=(2, 1)),
    "softmax": lambda x: jax.nn.softmax(x, axis=2),
    "log softmax": lambda x: jax.nn.log_softmax(x.mean((1, 2))),
    "standardised": lambda x: jax.nn.standardize(x, axis=-1),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "leaky": lambda x: jax.nn.leaky_relu(x) + jax.nn.elu(x) + jax.nn.softplus(x),
    "where": lambda x: jnp.where((x > 0.5) & ~(x == 1), x, -x),
    "clipped": lambda x: jnp.clip(x, 0.25, 0.5) + jnp.minimum(x, 0.1),
    "powers": lambda x: x**2 + x**3 + x**5 + jnp.sqrt(jnp.abs(x)) + jnp.abs(x) ** 1.5,
    "several axes contracted": lambda x: jnp.einsum("bhwc,wcij->bhij", x, CUBE),
    "batched products": lambda x: jnp.einsum("bhwc,bhvc->bhwv", x, x),
    "batched products of many axes": lambda x: jnp.einsum("bhwc,bijc->bhwij", x, x),
    "a vector": lambda x: x @ WEIGHTS[:, 0],
    "broadcast": lambda x: jnp.broadcast_to(x.mean(3, keepdims=True), x.shape).reshape(len(x), -1),
    "a token for each": lambda x: jnp.concatenate([jnp.broadcast_to(WEIGHTS[:1, :4], (len(x), 1, 4)), x[:, 0]], 1),
    "jitted": jax.jit(lambda x: x + 1),
    "checkpointed": jax.checkpoint(lambda x: jnp.tanh(x) * 2),
    "unused parts": lambda x: (jnp.cumsum(x, axis=1), x + 1)[1],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_onnx_programs_compute_what_jax_computes(name):
    inputs = np.random.default_rng(0).normal(size=(5, 5, 6, 4)).astype(np.float32)
    expected = np.asarray(jax.jit(PROGRAMS[name])(inputs))
    outputs = run_onnx(PROGRAMS[name], inputs)
    assert outputs.dtype == expected.dtype
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_scales_and_shifts_are_folded_into_convolutions():
    model = onnx_format.serialize(
        PROGRAMS["with a norm"], jax.ShapeDtypeStruct((5, 6, 4), np.float32), name="it", output="result", metadata={}
    )
    assert [node.op_type for node in onnx.load_from_string(model).graph.node if node.op_type != "Identity"] == [
        "Transpose",
        "Conv",
        "Transpose",
    ]


REFUSED = {
    "cumsum": lambda x: jnp.cumsum(x, axis=1),
    "a reduction over the batch": lambda x: x - x.mean(0),
    "a slice of the batch": lambda x: x[:1] + x,
    "a dilated input": lambda x: convolved(x, lhs_dilation=(2, 1)),
    "operations that depend on the batch size": lambda x: x if len(x) == 2 else x + 1,
}


@pytest.mark.parametrize("operation", REFUSED)
def test_unsupported_programs_are_refused_with_alternatives(operation):
    with pytest.raises(InputError) as refused:
        run_onnx(REFUSED[operation], np.zeros((5, 5, 6, 4), np.float32))
    message = str(refused.value)
    assert operation in message
    assert "the network it uses" in message
    assert "use --format stablehlo or flax instead" in message


class Own(nnx.Module):
    """A user's network, of Flax layers."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
        return self.head(self.dropout(x).mean((1, 2)))


def test_a_users_network_exports_with_softmax_and_nchw():
    network = from_nnx(Own)
    variables = jax.jit(network.init)(jax.random.key(0))
    inputs = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 2), dtype=np.uint8)
    outputs = run_onnx(
        functools.partial(exported_forward(network, ExportConfig("onnx", softmax=True)), variables), inputs
    )
    expected = softmax(forward(network, variables)(inputs), axis=1)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    turned = run_onnx(
        functools.partial(exported_forward(network, ExportConfig("onnx", layout="nchw", softmax=True)), variables),
        np.ascontiguousarray(np.moveaxis(inputs, -1, 1)),
    )
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_stablehlo_is_for_all_platforms_and_any_batch(exported):
    from jax import export

    program = export.deserialize(bytearray((exported / "mlp.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert str(program.in_avals[0].shape) == "(batch, 6, 6, 1)"
    with pytest.raises(InputError, match=r"the network odd cannot \(TracerArray.*: process each example independently"):
        stablehlo.serialize(np.asarray, jax.ShapeDtypeStruct((3,), np.float32), name="odd")


def test_a_network_that_needs_its_batch_size_is_mapped_over_the_batch():
    from jax import export

    program = stablehlo.serialize(
        lambda x: x.reshape(len(x), -1) * 2, jax.ShapeDtypeStruct((2, 3), np.float32), name="it"
    )
    inputs = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    outputs = export.deserialize(bytearray(program)).call(inputs)
    np.testing.assert_array_equal(outputs, 2 * inputs.reshape(5, 6))


def test_exported_variables_load_into_a_users_module(tmp_path):
    """Names are module paths, and the exported program is differentiable."""
    from flax import traverse_util
    from jax import export
    from safetensors import safe_open
    from safetensors.flax import load_file

    network = from_nnx(Own)
    variables = network.init(jax.random.key(0))
    (tmp_path / safetensors_file.FILE).write_bytes(safetensors_file.serialize_variables(variables, {"classes": "3"}))
    loaded = load_file(tmp_path / safetensors_file.FILE)
    with safe_open(tmp_path / safetensors_file.FILE, framework="numpy") as file:
        assert file.metadata() == {"classes": "3", "statistics": '["norm.mean", "norm.var"]'}
    module = Own(nnx.Rngs(1))
    module.eval()
    nnx.update(module, nnx.restore_int_paths(traverse_util.unflatten_dict(loaded, sep=".")))
    inputs = np.random.default_rng(0).random((4, 8, 8, 2), dtype=np.float32)
    expected = network.apply(variables, inputs, train=False)[0]
    np.testing.assert_allclose(module(inputs), expected, atol=1e-6)
    made = safetensors_file.serialize_apply(
        exported_forward(network, ExportConfig()), variables, jax.ShapeDtypeStruct((8, 8, 2), np.float32), name="Own"
    )
    apply = export.deserialize(bytearray(made)).call
    np.testing.assert_allclose(apply(loaded, inputs), expected, atol=1e-5)
    slopes = jax.grad(lambda arrays: apply(arrays, inputs)[:, 0].sum())(loaded)
    np.testing.assert_allclose(slopes["head.bias"], [4, 0, 0])
    assert np.abs(slopes["conv.kernel"]).max() > 0


def test_onnx_files_contain_their_metadata(exported):
    session = onnxruntime.InferenceSession(exported / "mlp.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"classes": "5"}
    assert session.get_inputs()[0].shape == ["batch", 6, 6, 1]
    assert session.get_outputs()[0].shape == ["batch", 5]
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == 5


def test_a_missing_onnx_package_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"needs the package onnx, .*pip install 'ev3-distill\[onnx\]'"):
        run_onnx(lambda x: x, np.zeros((1, 2), np.float32))
