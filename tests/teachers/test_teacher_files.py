"""Teachers in ONNX, PyTorch and scikit-learn files: batches, inputs, outputs, and faulty files."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_network import (
    CLASSES,
    IMAGES,
    MEAN,
    RNG,
    STD,
    STEPS,
    expected,
    hidden_of,
    load,
    logits_of,
    onnx_file,
    pt2_file,
    torch_network,
)

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.teachers.teacher import in_batches


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


def test_in_batches_splits_and_pads():
    seen = []

    def run(batch):
        seen.append(len(batch))
        return {"logits": batch * 2}

    inputs = np.arange(10.0)[:, None]
    np.testing.assert_array_equal(in_batches(run, smallest=3, largest=4)(inputs)["logits"], inputs * 2)
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


def test_the_onnx_layout_follows_from_its_shape(here):
    teacher = load(f"onnx:{onnx_file('small.onnx', layout='NHWC', input_shape=(8, 8, 3))}")
    assert teacher.preprocessing.layout == "NHWC"
    np.testing.assert_allclose(teacher.outputs(IMAGES)["logits"], expected(), atol=1e-4)
    free = onnx_file("free.onnx", input_shape=("c", "h", "w"))
    with pytest.raises(
        InputError, match=r"takes \[\?, \?, \?\], which fits both layouts: give --teacher-input.layout NCHW"
    ):
        load(f"onnx:{free}")
    teacher = load(f"onnx:{free}", steps=dataclasses.replace(STEPS, layout="NCHW"))
    np.testing.assert_allclose(teacher.outputs(IMAGES)["logits"], expected(), atol=1e-4)


def test_an_onnx_file_with_two_outputs(here):
    np.testing.assert_allclose(
        load(f"onnx:{onnx_file('a.onnx', extra=('hidden',))}").outputs(IMAGES)["logits"], expected(), atol=1e-4
    )
    twice = onnx_file("b.onnx", extra=("again",))
    with pytest.raises(InputError, match=r"has logits \[\?, 5\], again \[\?, 5\]: name one, as in onnx:b.onnx#logits"):
        load(f"onnx:{twice}")
    np.testing.assert_allclose(load(f"onnx:{twice}#again").outputs(IMAGES)["logits"], expected(), atol=1e-4)


@pytest.mark.parametrize("extra", [(), ("hidden",)])
def test_onnx_features_by_name(here, extra):
    """Outputs of the graph, and tensors inside it; channels come last in any layout of the teacher."""
    teacher = load(f"onnx:{onnx_file('a.onnx', extra=extra)}#logits,hidden,flat")
    outputs = teacher.outputs(IMAGES)
    assert outputs.keys() == {"logits", "hidden", "flat"}
    hidden = hidden_of((IMAGES / np.float32(255) - np.array(MEAN)) / np.array(STD))
    np.testing.assert_allclose(outputs["hidden"], hidden, atol=1e-4)
    np.testing.assert_allclose(outputs["flat"], hidden.mean((1, 2)), atol=1e-4)
    assert teacher.digest != load("onnx:a.onnx#logits,hidden").digest
    with pytest.raises(InputError, match=r"got 'hiden' in onnx:a.onnx#logits,hiden: did you mean hidden"):
        load("onnx:a.onnx#logits,hiden")


def test_faulty_onnx_files_are_refused(here):
    Path("broken.onnx").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match=r"needs a model that onnxruntime can load; broken.onnx fails with"):
        load("onnx:broken.onnx")
    with pytest.raises(InputError, match=r"onnx:FILE needs a file; got 'none.onnx', which does not exist"):
        load("onnx:none.onnx")
    with pytest.raises(InputError, match=r"has one input, the examples; .* has 2 \(x, y\)"):
        load(f"onnx:{onnx_file('two.onnx', inputs=2)}")
    with pytest.raises(InputError, match=r"one output per class of the data, 4; onnx:small.onnx has 5"):
        load(f"onnx:{onnx_file('small.onnx')}", classes=CLASSES[:4])


def test_errors_suggest_the_conversion_of_sizes_and_channels(here):
    text = f"onnx:{onnx_file('small.onnx')}"
    plain = Preprocessing()
    for shape, way in {
        (8, 8, 1): "--teacher-input.channels 3$",
        (28, 24, 3): "--teacher-input.resize 8 8$",
        (28, 28, 1): "--teacher-input.channels 3 --teacher-input.resize 8 8$",
        (8, 8, 4): "use another teacher or other data$",
        (192,): "use another teacher or other data$",
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
    with pytest.raises(InputError, match=r"got 7 in torch:small.pt2#7: the outputs are 0, 1"):
        load("torch:small.pt2#7")


def test_faulty_torch_files_are_refused(here):
    network = torch_network()
    import torch

    for name in ("weights.pth", "weights.pt"):
        torch.save(network.state_dict(), name)
        with pytest.raises(
            InputError, match=r"a state dict has no network .* got weights.*torch.export.save\(torch.export.export\("
        ):
            load(f"torch:{name}")
    torch.save(network.state_dict(), "weights.pt2")
    with pytest.raises(
        InputError, match=r"complete archive of torch.export; weights.pt2 cannot be read .*models/model.json"
    ):
        load("torch:weights.pt2")
    Path("cut.pt2").write_bytes(Path(pt2_file("small.pt2")).read_bytes()[:2000])
    with pytest.raises(InputError, match=r"complete archive of torch.export; cut.pt2 cannot be read"):
        load("torch:cut.pt2")
    with pytest.raises(InputError, match=r"dropout.default in training mode: call model.eval\(\)"):
        load(f"torch:{pt2_file('train.pt2', train=True)}")


class Trap:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


def tampered(change):
    """Changes entries of the small archive by a function of name and content."""
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


@pytest.mark.parametrize(("old", "new", "message"), [
    (b'"torch.ops.aten.relu.default"', b'"torch.hub.load"', "the operator torch.hub.load"),
    (b'"torch.ops.aten.relu.default"', b'"torch.ops.load_library"', "the operator torch.ops.load_library"),
    (b'"torch.ops.aten.relu.default"', b'"torch.ops.aten.__class__"', "the operator torch.ops.aten.__class__"),
    (b'"torch.ops.aten.relu.default"', b'"_operator.attrgetter"', "the operator _operator.attrgetter"),
    (b'"name": "relu"', b'"name": "relu = open(1)"', "an invalid name"),
    (b'"name": "relu"', b'"name": "torch.load"', "an invalid name"),
    (b'"expr_str": "Symbol(', b'"expr_str": "().__class__.mro(', "a size that is not an expression"),
    (b'"expr_str": "Symbol(', b'"expr_str": "open(', "a size that is not an expression"),
    (b'builtins.tuple', b'os.system', "inputs or outputs in a os.system"),
])  # fmt: skip
def test_a_pt2_that_names_code_is_refused(here, old, new, message):
    changed = []

    def change(name, data):
        if name.endswith("model.json") and old in data:
            changed.append(name)
            return data.replace(old, new)
        return data

    text = tampered(change)
    assert changed
    with pytest.raises(InputError, match=message):
        load(text)


def estimator(name):
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    estimators = {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)),
        "bayes": GaussianNB(),
    }
    return estimators[name]


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


def test_a_certain_sklearn_classifier_has_finite_logits(here):
    """A probability of 0 counts as 1e-7."""
    skops = pytest.importorskip("skops.io")
    rows = np.repeat([[0.0], [1000.0]], 30, axis=0)
    skops.dump(estimator("bayes").fit(rows, np.repeat([0, 1], 30)), "model.skops")
    teacher = load("sklearn:model.skops", steps=Preprocessing(), shape=(1,), classes=("x", "y"))
    np.testing.assert_allclose(teacher.outputs(rows[:1])["logits"], [[0, np.log(1e-7)]], atol=1e-3)


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


def test_faulty_sklearn_files_are_refused(here):
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
    with pytest.raises(InputError, match=r"line.skops holds LinearRegression: save a classifier"):
        load("sklearn:line.skops")
