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
from onnx_runner import run_onnx
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
