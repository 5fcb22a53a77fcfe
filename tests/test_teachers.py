"""Every kind of teacher: the same network by all paths, and what each refuses."""

import dataclasses
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from flax import nnx

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.network import from_nnx
from ev3_distill.types import Variables
from teachers import KINDS, load_teacher
from teachers.flax import flax_teacher, forward
from teachers.teacher import BatchError, in_chunks, picked

SHAPE, CLASSES = (8, 8, 3), ("ant", "bee", "cat", "dog", "elk")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STEPS = Preprocessing(mean=MEAN, std=STD)
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 3, 3, 6)).astype(np.float32) / 3  # height, width, in, out
BIAS = RNG.normal(size=6).astype(np.float32)
HEAD = RNG.normal(size=(6, 5)).astype(np.float32)
IMAGES = RNG.integers(0, 256, size=(11, *SHAPE), dtype=np.uint8)


def hidden_of(inputs):
    """The feature of the small network [B, H, W, 6], in plain NumPy."""
    padded = np.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # [B, H, W, C, 3, 3]
    return np.maximum(np.einsum("bhwcij,ijco->bhwo", windows, KERNEL) + BIAS, 0)


def logits_of(inputs):
    return hidden_of(inputs).mean(axis=(1, 2)) @ HEAD


def expected(images=IMAGES):
    return logits_of((images / np.float32(255) - np.array(MEAN)) / np.array(STD))


def load(text, *, steps=STEPS, shape=SHAPE, classes=CLASSES, **more):
    return load_teacher(
        text, preprocessing=steps, input_shape=shape, num_classes=len(classes), class_names=classes, **more
    )


def module():
    """A module of a user's own, as a file in the working directory."""
    names = ("KERNEL", "BIAS", "HEAD")
    np.savez("weights.npz", **{name: globals()[name] for name in names})
    Path("own.py").write_text("""
import numpy as np
with np.load("weights.npz") as file:
    W = dict(file)
def hidden(x):
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2))
    return np.maximum(np.einsum("bhwcij,ijco->bhwo", windows, W["KERNEL"]) + W["BIAS"], 0)
def logits(x):
    return hidden(x).mean(axis=(1, 2)) @ W["HEAD"]
def both(x):
    return {"logits": logits(x), "hidden": hidden(x)}
def broken(x):
    raise OverflowError("out of cheese")
def infinite(x):
    result = logits(x)
    result[3, 1] = np.inf
    return result
def vector(x):
    return logits(x)[:, 0]
def nothing(x):
    return {"hidden": hidden(x)}
NUMBER = 3
""")


@pytest.fixture
def own(here, monkeypatch):
    """The module `own`, importable from a fresh working directory."""
    module()
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return here


def onnx_file(path, *, batch="n", extra=(), dtype="FLOAT", input_shape=(3, 8, 8), layout="NCHW", inputs=1):
    """The small network as ONNX."""
    onnx = pytest.importorskip("onnx", reason="makes the ONNX file of this test")
    helper, kind = onnx.helper, getattr(onnx.TensorProto, dtype)
    real = kind if dtype == "FLOAT16" else onnx.TensorProto.FLOAT
    own_type = helper.tensor_dtype_to_np_dtype(real)
    weights = {"w": KERNEL.transpose(3, 2, 0, 1), "b": BIAS, "h": HEAD}
    nodes, entry = [], "x"
    if real != kind:
        nodes.append(helper.make_node("Cast", [entry], ["cast"], to=onnx.TensorProto.FLOAT))
        entry = "cast"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [entry], ["first"], perm=[0, 3, 1, 2]))
        entry = "first"
    nodes += [
        helper.make_node("Conv", [entry, "w", "b"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["hidden"]),
        helper.make_node("GlobalAveragePool", ["hidden"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "h"], ["logits"]),
    ]
    shapes = {"logits": [batch, 5], "hidden": [batch, 6, 8, 8], "flat": [batch, 6], "pooled": [batch, 6, 1, 1]}
    nodes += [helper.make_node("Identity", ["logits"], ["again"])] if "again" in extra else []
    shapes["again"] = [batch, 5]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(f"{'xyz'[i]}", kind, [batch, *input_shape]) for i in range(inputs)],
        [helper.make_tensor_value_info(name, real, shapes[name]) for name in ("logits", *extra)],
        [onnx.numpy_helper.from_array(array.astype(own_type), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


def torch_network(output="logits"):
    torch = pytest.importorskip("torch", reason="torch teachers need the extra [torch]")

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 6, 3, padding=1)
            self.drop = torch.nn.Dropout(0.5)
            self.head = torch.nn.Linear(6, 5, bias=False)

        def forward(self, x):
            hidden = torch.relu(self.conv(x))
            logits = self.head(self.drop(hidden.mean((2, 3))))
            return {"logits": logits, "dict": {"hidden": hidden, "logits": logits}, "tuple": (hidden, logits)}[output]

    network = Small()
    with torch.no_grad():
        network.conv.weight.copy_(torch.tensor(KERNEL.transpose(3, 2, 0, 1)))
        network.conv.bias.copy_(torch.tensor(BIAS))
        network.head.weight.copy_(torch.tensor(HEAD.T))
    return network


def pt2_file(path, *, fixed=0, train=False, output="logits", at_most=None):
    network = torch_network(output).train(train)
    import torch

    dim = None if fixed else {0: torch.export.Dim("n", min=1, max=at_most)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (torch.zeros(fixed or 4, 3, 8, 8),), dynamic_shapes=(dim,))
        torch.export.save(program, path)
    return path


def flax_network():
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
            self.head = nnx.Linear(6, 5, use_bias=False, rngs=rngs)

        def __call__(self, inputs):
            return self.head(nnx.relu(self.conv(inputs)).mean((1, 2)))

    network = from_nnx(Small, {"input_shape": list(SHAPE), "num_classes": 5})
    params = {"conv": {"kernel": KERNEL, "bias": BIAS}, "head": {"kernel": HEAD}}
    return network, Variables(params, {})


def make(kind):
    """A teacher of that kind with the weights above."""
    if kind == "onnx":
        return load(f"onnx:{onnx_file('small.onnx')}")
    if kind == "torch":
        return load(f"torch:{pt2_file('small.pt2')}")
    if kind == "flax":
        return load("flax:somewhere", networks=lambda place: flax_network())
    return load("python:own:logits")


@pytest.mark.parametrize("kind", ["onnx", "torch", "flax", "python"])
def test_all_paths_give_the_same_logits(own, kind):
    teacher = make(kind)
    outputs = teacher.outputs(IMAGES)
    assert outputs.keys() == {"logits"}
    assert outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], expected(), atol=1e-4)
    np.testing.assert_allclose(teacher.outputs(IMAGES / np.float32(255))["logits"], expected(), atol=1e-4)
    np.testing.assert_allclose(teacher.outputs(IMAGES[:1])["logits"], expected(IMAGES[:1]), atol=1e-4)
    assert (teacher.num_classes, teacher.class_names) == (5, CLASSES)
    assert teacher.params == (None if kind == "python" else KERNEL.size + BIAS.size + HEAD.size)


@pytest.mark.parametrize("kind", ["onnx", "torch", "flax", "python"])
def test_the_digest_sums_up_what_outputs_depend_on(own, kind, monkeypatch):
    teacher = make(kind)
    assert len(teacher.digest) == 64
    monkeypatch.delitem(sys.modules, "own", raising=False)
    assert make(kind).digest == teacher.digest
    assert teacher.again(STEPS).digest == teacher.digest
    for other in (Preprocessing(mean=MEAN), Preprocessing(mean=MEAN, std=STD, order="BGR")):
        assert teacher.again(other).digest != teacher.digest
    for alike in (dataclasses.replace(STEPS, order="RGB", scale=1.0), dataclasses.replace(STEPS, classes=CLASSES)):
        assert teacher.again(alike).digest == teacher.digest
    assert teacher.again(dataclasses.replace(STEPS, classes=CLASSES[::-1])).digest != teacher.digest


def test_other_weights_make_another_digest(own):
    digests = [make(kind).digest for kind in ("onnx", "torch", "python")]
    assert len(set(digests)) == 3
    network, variables = flax_network()
    other = Variables({**variables.params, "head": {"kernel": HEAD + 1e-6}}, {})
    assert flax_teacher(network, variables, "a").digest != flax_teacher(network, other, "a").digest
    data = bytearray(Path("small.onnx").read_bytes())
    place = data.find(HEAD.tobytes())
    data[place] ^= 1
    Path("small.onnx").write_bytes(data)
    assert load("onnx:small.onnx").digest != digests[0]


def test_external_weights_are_part_of_the_digest(here):
    onnx = pytest.importorskip("onnx")
    path = onnx_file("small.onnx")
    onnx.save(onnx.load(path), "big.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    first = load("onnx:big.onnx")
    np.testing.assert_allclose(first.outputs(IMAGES)["logits"], expected(), atol=1e-4)
    data = bytearray(Path("weights.bin").read_bytes())
    data[-1] ^= 1
    Path("weights.bin").write_bytes(data)
    assert load("onnx:big.onnx").digest != first.digest


@pytest.mark.parametrize("batch", [1, 4, 11, 16])
def test_a_fixed_batch_is_split_and_padded(here, batch):
    for text in (f"onnx:{onnx_file('small.onnx', batch=batch)}", f"torch:{pt2_file('small.pt2', fixed=batch)}"):
        teacher = load(text)
        np.testing.assert_allclose(teacher.outputs(IMAGES)["logits"], expected(), atol=1e-4)
        np.testing.assert_allclose(teacher.outputs(IMAGES[:3])["logits"], expected(IMAGES[:3]), atol=1e-4)


def test_a_bounded_batch_is_split(here):
    teacher = load(f"torch:{pt2_file('small.pt2', at_most=6)}")
    np.testing.assert_allclose(teacher.outputs(IMAGES)["logits"], expected(), atol=1e-4)


def test_chunks():
    seen = []

    def run(batch):
        seen.append(len(batch))
        return {"logits": batch * 2}

    inputs = np.arange(10.0)[:, None]
    np.testing.assert_array_equal(in_chunks(run, least=3, most=4)(inputs)["logits"], inputs * 2)
    assert seen == [4, 4, 3]


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [
    ("FLOAT16", STEPS, 2e-2), ("DOUBLE", STEPS, 1e-5), ("UINT8", Preprocessing(), 1e-2),
])  # fmt: skip
def test_onnx_input_types(here, dtype, steps, tolerance):
    teacher = load(f"onnx:{onnx_file('small.onnx', dtype=dtype)}", steps=steps)
    right = expected() if steps == STEPS else logits_of(IMAGES.astype(np.float32))  # bytes come as bytes
    got = teacher.outputs(IMAGES)["logits"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, right, rtol=tolerance, atol=tolerance)


def test_onnx_layout_is_found_in_its_shape(here):
    teacher = load(f"onnx:{onnx_file('small.onnx', layout='NHWC', input_shape=(8, 8, 3))}")
    assert teacher.preprocessing.layout == "NHWC"
    np.testing.assert_allclose(teacher.outputs(IMAGES)["logits"], expected(), atol=1e-4)
    free = onnx_file("free.onnx", input_shape=("c", "h", "w"))
    with pytest.raises(InputError, match=r"takes \[\?, \?, \?\], which says nothing: give --teacher-input.layout NCHW"):
        load(f"onnx:{free}")
    teacher = load(f"onnx:{free}", steps=dataclasses.replace(STEPS, layout="NCHW"))
    np.testing.assert_allclose(teacher.outputs(IMAGES)["logits"], expected(), atol=1e-4)


def test_onnx_of_two_outputs(here):
    np.testing.assert_allclose(
        load(f"onnx:{onnx_file('a.onnx', extra=('hidden',))}").outputs(IMAGES)["logits"], expected(), atol=1e-4
    )
    twice = onnx_file("b.onnx", extra=("again",))
    with pytest.raises(InputError, match=r"has logits \[\?, 5\], again \[\?, 5\]: pick one, as in onnx:b.onnx#logits"):
        load(f"onnx:{twice}")
    np.testing.assert_allclose(load(f"onnx:{twice}#again").outputs(IMAGES)["logits"], expected(), atol=1e-4)


@pytest.mark.parametrize("extra", [(), ("hidden",)])
def test_onnx_features_by_name(here, extra):
    """Outputs of the graph, and tensors inside it; channels come last whatever the teacher's layout."""
    teacher = load(f"onnx:{onnx_file('a.onnx', extra=extra)}#logits,hidden,flat")
    outputs = teacher.outputs(IMAGES)
    assert outputs.keys() == {"logits", "hidden", "flat"}
    hidden = hidden_of((IMAGES / np.float32(255) - np.array(MEAN)) / np.array(STD))
    np.testing.assert_allclose(outputs["hidden"], hidden, atol=1e-4)
    np.testing.assert_allclose(outputs["flat"], hidden.mean((1, 2)), atol=1e-4)
    assert teacher.digest != load("onnx:a.onnx#logits,hidden").digest
    with pytest.raises(InputError, match=r"got 'hiden' in onnx:a.onnx#logits,hiden: did you mean hidden"):
        load("onnx:a.onnx#logits,hiden")


def test_bad_onnx(here):
    Path("broken.onnx").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match=r"needs a model that onnxruntime can load; broken.onnx fails with"):
        load("onnx:broken.onnx")
    with pytest.raises(InputError, match=r"onnx:FILE needs a file; got 'none.onnx', which is missing"):
        load("onnx:none.onnx")
    with pytest.raises(InputError, match=r"has one input, the examples; .* has 2 \(x, y\)"):
        load(f"onnx:{onnx_file('two.onnx', inputs=2)}")
    with pytest.raises(InputError, match=r"one output per class of the data, 4; onnx:small.onnx has 5"):
        load(f"onnx:{onnx_file('small.onnx')}", classes=CLASSES[:4])


def test_sizes_and_channels_that_differ(here):
    text = f"onnx:{onnx_file('small.onnx')}"
    plain = Preprocessing()
    for shape, way in {
        (8, 8, 1): "--teacher-input.channels 3$",
        (28, 24, 3): "--teacher-input.resize 8 8$",
        (28, 28, 1): "--teacher-input.channels 3 --teacher-input.resize 8 8$",
        (8, 8, 4): "take another teacher or other data$",
        (192,): "take another teacher or other data$",
    }.items():
        with pytest.raises(InputError, match=rf"takes \[3, 8, 8\], the examples are .*: .*{way}"):
            load(text, steps=plain, shape=shape)
    teacher = load(text, steps=Preprocessing(channels=3, resize=(8, 8)), shape=(28, 28, 1))
    assert teacher.outputs(np.zeros((2, 28, 28, 1), np.uint8))["logits"].shape == (2, 5)
    with pytest.raises(InputError, match=r"\[8, 8, 3\] in layout NHWC: give --teacher-input.layout NCHW"):
        load(text, steps=Preprocessing(layout="NHWC"))


def test_torch_outputs_by_name(here):
    for output, names in (("dict", "logits,hidden"), ("tuple", "1,0")):
        file = pt2_file("small.pt2", output=output)
        teacher = load(f"torch:{file}")
        np.testing.assert_allclose(teacher.outputs(IMAGES)["logits"], expected(), atol=1e-4)
        outputs = load(f"torch:{file}#{names}").outputs(IMAGES)
        feature = outputs[names.split(",")[1]]
        hidden = hidden_of((IMAGES / np.float32(255) - np.array(MEAN)) / np.array(STD))
        np.testing.assert_allclose(feature, hidden, atol=1e-4)
    with pytest.raises(InputError, match=r"got 7 in torch:small.pt2#7: it has 0, 1"):
        load("torch:small.pt2#7")


def test_bad_torch_files(here):
    network = torch_network()
    import torch

    for name in ("weights.pth", "weights.pt"):
        torch.save(network.state_dict(), name)
        with pytest.raises(
            InputError, match=r"bare state dict .* got weights.*torch.export.save\(torch.export.export\("
        ):
            load(f"torch:{name}")
    torch.save(network.state_dict(), "weights.pt2")
    with pytest.raises(InputError, match=r"whole archive of torch.export; weights.pt2 is not .*models/model.json"):
        load("torch:weights.pt2")
    Path("cut.pt2").write_bytes(Path(pt2_file("small.pt2")).read_bytes()[:2000])
    with pytest.raises(InputError, match=r"whole archive of torch.export; cut.pt2 is not"):
        load("torch:cut.pt2")
    with pytest.raises(InputError, match=r"dropout.default in training mode: call model.eval\(\)"):
        load(f"torch:{pt2_file('train.pt2', train=True)}")


class Trap:
    """Unpickling this makes a file."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


def tampered(change):
    """The small archive with entries changed: a function of name and bytes."""
    source = zipfile.ZipFile(pt2_file("small.pt2"))
    with zipfile.ZipFile("bad.pt2", "w") as bad:
        for name in source.namelist():
            bad.writestr(name, change(name, source.read(name)))
    return "torch:bad.pt2"


def test_pt2_never_unpickles(here):
    import pickle

    trap = pickle.dumps(Trap())
    text = tampered(lambda name, data: trap if "sample_inputs" in name else data)
    np.testing.assert_allclose(load(text).outputs(IMAGES)["logits"], expected(), atol=1e-4)
    text = tampered(
        lambda name, data: data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("config.json")
        else trap if name.endswith("weight_0") else data
    )  # fmt: skip
    with pytest.raises(InputError, match=r"bad.pt2 has pickled objects"):
        load(text)
    assert not Path("trapped").exists()


@pytest.mark.parametrize(("old", "new", "told"), [
    (b'"torch.ops.aten.relu.default"', b'"torch.hub.load"', "the operator torch.hub.load"),
    (b'"torch.ops.aten.relu.default"', b'"torch.ops.load_library"', "the operator torch.ops.load_library"),
    (b'"torch.ops.aten.relu.default"', b'"torch.ops.aten.__class__"', "the operator torch.ops.aten.__class__"),
    (b'"torch.ops.aten.relu.default"', b'"_operator.attrgetter"', "the operator _operator.attrgetter"),
    (b'"name": "relu"', b'"name": "relu = open(1)"', "a name that is none"),
    (b'"name": "relu"', b'"name": "torch.load"', "a name that is none"),
    (b'"expr_str": "Symbol(', b'"expr_str": "().__class__.mro(', "a size that is no expression"),
    (b'"expr_str": "Symbol(', b'"expr_str": "open(', "a size that is no expression"),
    (b'builtins.tuple', b'os.system', "inputs or outputs in a os.system"),
])  # fmt: skip
def test_pt2_names_no_code(here, old, new, told):
    changed = []

    def change(name, data):
        if name.endswith("model.json") and old in data:
            changed.append(name)
            return data.replace(old, new)
        return data

    text = tampered(change)
    assert changed
    with pytest.raises(InputError, match=told):
        load(text)


def test_missing_packages_are_named(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    Path("a.pt2").touch()
    with pytest.raises(InputError, match=r"need the package torch; .*: pip install 'ev3-distill\[torch\]'"):
        load("torch:a.pt2")
    monkeypatch.setitem(sys.modules, "skops.io", None)
    Path("a.skops").touch()
    with pytest.raises(InputError, match=r"need the package skops.io; .*: pip install 'ev3-distill\[sklearn\]'"):
        load("sklearn:a.skops")
    path = onnx_file("a.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert load(f"onnx:{path}").params is None
    with pytest.raises(InputError, match=r"need the package onnx; .*: pip install 'onnx'"):
        load(f"onnx:{path}#logits,hidden")


def test_flax_runs_inside_the_step_where_it_takes_the_data_as_they_are():
    network, variables = flax_network()
    plain = flax_teacher(network, variables, "mine")
    assert plain.network is network
    assert plain.variables is variables
    np.testing.assert_allclose(plain.outputs(IMAGES)["logits"], logits_of(IMAGES / np.float32(255)), atol=1e-4)
    inputs = IMAGES / np.float32(255)
    np.testing.assert_array_equal(forward(network, variables, batch_size=4)(inputs).shape, (11, 5))
    assert make("flax").network is None
    assert plain.again(Preprocessing(classes=CLASSES)).network is network


def test_flax_that_does_not_fit():
    with pytest.raises(
        InputError, match=r"takes \[8, 8, 3\], the examples are \[9, 9, 3\]: give --teacher-input.resize 8 8"
    ):
        load("flax:x", shape=(9, 9, 3), networks=lambda place: flax_network())
    with pytest.raises(InputError, match="one output per class of the data, 2; flax:x has 5"):
        load("flax:x", classes=("a", "b"), networks=lambda place: flax_network())


def test_python_features(own):
    outputs = load("python:own:both").outputs(IMAGES)
    assert {name: value.shape for name, value in outputs.items()} == {"logits": (11, 5), "hidden": (11, 8, 8, 6)}


@pytest.mark.parametrize(("name", "message"), [
    ("broken", r"fails with OverflowError: out of cheese on a batch \[11, 8, 8, 3\] with values from .* to "),
    ("infinite", "logits must be finite; python:own:infinite gives nan or infinity for example 3 of a batch"),
    ("vector", r"logits must be numbers \[B, K\]; python:own:vector gives float32 \[11\] for 11 examples"),
    ("nothing", "a dictionary without 'logits': it has hidden"),
])  # fmt: skip
def test_python_that_fails(own, name, message):
    teacher = load(f"python:own:{name}")
    with pytest.raises(BatchError, match=message) as caught:
        teacher.outputs(IMAGES)
    assert caught.value.row == (3 if name == "infinite" else None)


@pytest.mark.parametrize(("place", "message"), [
    ("own:missing", "'own:missing', which fails with AttributeError"),
    ("no_such_module:f", "which fails with ModuleNotFoundError"),
    ("own:NUMBER", "a callable; got int of 'own:NUMBER'"),
    ("own", "is python:MODULE:FUNCTION; got 'python:own'"),
])  # fmt: skip
def test_python_that_is_none(own, place, message):
    with pytest.raises(InputError, match=message):
        load(f"python:{place}")


def test_python_of_other_classes(own):
    with pytest.raises(BatchError, match="one column per class, 2; python:own:logits gives 5"):
        load("python:own:logits", classes=("a", "b")).outputs(IMAGES)
    teacher = load("python:own:logits", classes=())
    assert (teacher.num_classes, teacher.class_names) == (None, None)
    assert teacher.outputs(IMAGES)["logits"].shape == (11, 5)


def test_the_number_of_columns_is_constant():
    sys.modules["growing"] = type(sys)("growing")
    sys.modules["growing"].f = lambda x: np.zeros((len(x), len(x)))
    teacher = load("python:growing:f", classes=())
    teacher.outputs(IMAGES[:5])
    with pytest.raises(BatchError, match="one column per class, 5; python:growing:f gives 6"):
        teacher.outputs(IMAGES[:6])


def test_classes_come_in_the_data_order(own):
    order = ("dog", "ant", "elk", "cat", "bee")
    teacher = load("python:own:logits", classes=order, steps=dataclasses.replace(STEPS, classes=CLASSES))
    columns = [CLASSES.index(name) for name in order]
    np.testing.assert_allclose(teacher.outputs(IMAGES)["logits"], expected()[:, columns], atol=1e-4)
    assert teacher.class_names == order
    fewer = load("python:own:logits", classes=order[:3], steps=dataclasses.replace(STEPS, classes=CLASSES))
    np.testing.assert_allclose(fewer.outputs(IMAGES)["logits"], expected()[:, columns[:3]], atol=1e-4)
    assert fewer.num_classes == 3
    with pytest.raises(
        InputError, match=r"knows ant, bee, cat, dog, elk, missing is fox, gnu: give its outputs' names"
    ):
        load("python:own:logits", classes=(*order, "fox", "gnu"), steps=dataclasses.replace(STEPS, classes=CLASSES))
    unlabelled = load("python:own:logits", classes=(), steps=dataclasses.replace(STEPS, classes=CLASSES))
    assert (unlabelled.num_classes, unlabelled.class_names) == (5, CLASSES)
    with pytest.raises(InputError, match="has 5 outputs and 2 names"):
        load(f"onnx:{onnx_file('a.onnx')}", steps=dataclasses.replace(STEPS, classes=("ant", "bee")))


def test_the_file_beside_is_read_and_options_win(own):
    onnx_file("small.onnx")
    Path("small.toml").write_text(f"mean = {list(MEAN)}\nstd = [1, 1, 1]\n")
    got = load("onnx:small.onnx", steps=Preprocessing(std=STD)).outputs(IMAGES)["logits"]
    np.testing.assert_allclose(got, expected(), atol=1e-4)
    Path("own.toml").write_text(f"mean = {list(MEAN)}\nstd = {list(STD)}\n")
    np.testing.assert_allclose(
        load("python:own:logits", steps=Preprocessing()).outputs(IMAGES)["logits"], expected(), atol=1e-4
    )


def estimator(name):
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)),
        "bayes": GaussianNB(),
    }
    return made[name]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["linear", "bayes"])
def test_sklearn(here, name, classes):
    skops = pytest.importorskip("skops.io", reason="sklearn teachers need the extra [sklearn]")
    labels = np.array(["elk", "bee", "ant"])[np.arange(60) % classes]
    rows = RNG.normal(size=(60, 12)).astype(np.float32) + (np.arange(60) % classes)[:, None]
    fitted = estimator(name).fit(rows, labels)
    skops.dump(fitted, "model.skops")
    data_order = ("elk", "bee", "ant")[:classes]
    teacher = load("sklearn:model.skops", steps=Preprocessing(), shape=(2, 2, 3), classes=data_order)
    logits = teacher.outputs(rows.reshape(-1, 2, 2, 3))["logits"]
    assert logits.shape == (60, classes)
    softmax = np.exp(logits - logits.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    columns = [list(fitted.classes_).index(label) for label in data_order]
    np.testing.assert_allclose(softmax, fitted.predict_proba(rows)[:, columns], atol=1e-5)


def test_sklearn_of_labels_without_names(here):
    skops = pytest.importorskip("skops.io")
    rows, labels = RNG.normal(size=(60, 4)), np.arange(60) % 3
    skops.dump(estimator("bayes").fit(rows, labels), "model.skops")
    assert load("sklearn:model.skops", steps=Preprocessing(), shape=(4,), classes=("x", "y", "z")).class_names == (
        "x",
        "y",
        "z",
    )
    with pytest.raises(InputError, match=r"takes \[4\], the examples are \[5\]"):
        load("sklearn:model.skops", steps=Preprocessing(), shape=(5,), classes=("x", "y", "z"))
    with pytest.raises(InputError, match=r"takes 4 numbers, the examples .* have 192"):
        load("sklearn:model.skops", steps=Preprocessing(), classes=("x", "y", "z"))


def test_bad_sklearn_files(here):
    skops = pytest.importorskip("skops.io")
    from sklearn.linear_model import LinearRegression
    from sklearn.preprocessing import FunctionTransformer

    skops.dump(FunctionTransformer(np.load), "untrusted.skops")
    with pytest.raises(InputError, match=r"holds numpy.load: if you trust them, .* python:MODULE:FUNCTION"):
        load("sklearn:untrusted.skops")
    Path("broken.skops").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"that skops.io.dump wrote; broken.skops fails with"):
        load("sklearn:broken.skops")
    skops.dump(LinearRegression().fit(RNG.normal(size=(9, 2)), np.arange(9.0)), "line.skops")
    with pytest.raises(InputError, match=r"line.skops holds LinearRegression: save another"):
        load("sklearn:line.skops")


def test_ensembles(own):
    onnx_file("a.onnx")
    other = Path("own.py").read_text().replace('@ W["HEAD"]', '@ W["HEAD"][:, ::-1] * 3')
    Path("other.py").write_text(other)
    a, b = expected(), expected()[:, ::-1] * 3
    mean = load("ensemble:onnx:a.onnx#logits,hidden,python:other:logits")
    np.testing.assert_allclose(mean.outputs(IMAGES)["logits"], (a + b) / 2, atol=1e-3)
    assert (mean.num_classes, mean.class_names, len(mean.members)) == (5, CLASSES, 2)
    probabilities = load("ensemble-prob:onnx:a.onnx,python:other:logits").outputs(IMAGES)["logits"]

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)

    np.testing.assert_allclose(np.exp(probabilities), (softmax(a) + softmax(b)) / 2, atol=1e-4)
    sys.modules.pop("other")


@pytest.mark.parametrize(("text", "message"), [
    ("ensemble:python:own:logits", "two teachers or more"),
    ("ensemble:python:own:logits,logits:a.npz", "logits:a.npz in .*, which is recorded: average the logits beforehand"),
    ("ensemble:python:own:logits,ensemble:python:own:logits", "members are single teachers"),
    ("onnx:", "a KIND of onnx, torch, flax, python, sklearn, ensemble, ensemble-prob or logits; got 'onnx:'"),
    ("tensorflow:a", "; got 'tensorflow:a': for example"),
    ("resnet", "; got 'resnet'"),
])  # fmt: skip
def test_what_is_no_teacher(own, text, message):
    with pytest.raises(InputError, match=message):
        load(text)


def test_every_kind_is_documented():
    assert all(opened.__doc__ for opened in KINDS.values())


def test_picked():
    assert picked({"a": (None, 5), "b": (None, 7)}, (), 5, source="s") == ("a",)
    assert picked({"a": None}, (), 5, source="s") == ("a",)
    assert picked({"a": (None, None), "b": (None, 6, 8, 8)}, (), 0, source="s") == ("a",)
    with pytest.raises(InputError, match=r"\[B, 9\] must be one of its outputs; s has a \[\?, 5\], b of unknown shape"):
        picked({"a": (None, 5), "b": None}, (), 9, source="s")


def test_the_real_teacher(cifar):
    images, labels, classes = cifar
    path = SHARED.parent / "teachers" / "cifar10_resnet56.onnx"
    if not path.is_file():
        pytest.skip(f"the real teacher is not there: {path.name}")
    steps = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    teacher = load(f"onnx:{path}", steps=steps, shape=images.shape[1:], classes=classes)
    assert teacher.preprocessing.layout == "NCHW"
    assert (teacher.outputs(images)["logits"].argmax(1) == labels).mean() >= 0.88
