"""Which output of an ONNX or PyTorch model holds the logits: softmax beside them, ZipMap, labels, sigmoids."""

import warnings

import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax
from small_network import load

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.teachers.diagnosis import diagnose
from ev3_distill.teachers.kinds.onnx_outputs import Origins

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(4, 3)).astype(np.float32)
INPUTS = RNG.normal(size=(60, 4)).astype(np.float32)
SCORES = INPUTS @ WEIGHTS
NAMES = ("0", "1", "2")


def linear_file(*outputs, columns=3, operator="Softmax"):
    """An ONNX file of logits = inputs @ WEIGHTS, and what an operator makes of them, with these outputs."""
    onnx = pytest.importorskip("onnx", reason="makes the ONNX file of this test")
    helper, kinds = onnx.helper, onnx.TensorProto
    shapes = {name: ["n", columns] for name in ("logits", "scores", "copy")} | {"label": ["n"]}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
        helper.make_node(operator, ["logits"], ["scores"]),
        helper.make_node("Identity", ["scores"], ["copy"]),
        helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["n", 4])],
        [
            helper.make_tensor_value_info(name, kinds.INT64 if name == "label" else kinds.FLOAT, shapes[name])
            for name in outputs
        ],
        [onnx.numpy_helper.from_array(WEIGHTS[:, :columns].copy(), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "model.onnx")


def converted_file(*, zip_map=True):
    """An ONNX file as skl2onnx writes a logistic regression: the label, and the probabilities behind a ZipMap."""
    onnx = pytest.importorskip("onnx", reason="makes the ONNX file of this test")
    helper, kinds = onnx.helper, onnx.TensorProto
    domain = "ai.onnx.ml"
    nodes = [
        helper.make_node(
            "LinearClassifier",
            ["X"],
            ["label", "raw"],
            domain=domain,
            coefficients=WEIGHTS.T.ravel().tolist(),
            intercepts=[0.0, 0.0, 0.0],
            classlabels_ints=[0, 1, 2],
            multi_class=1,
            post_transform="SOFTMAX",
        ),
        helper.make_node("Normalizer", ["raw"], ["probabilities"], domain=domain, norm="L1"),
    ]
    outputs = [helper.make_tensor_value_info("label", kinds.INT64, ["n"])]
    if zip_map:
        nodes.append(
            helper.make_node(
                "ZipMap", ["probabilities"], ["output_probability"], domain=domain, classlabels_int64s=[0, 1, 2]
            )
        )
        value = helper.make_tensor_type_proto(kinds.FLOAT, [])
        sequence = helper.make_sequence_type_proto(helper.make_map_type_proto(kinds.INT64, value))
        outputs.append(helper.make_value_info("output_probability", sequence))
    else:
        outputs.append(helper.make_tensor_value_info("probabilities", kinds.FLOAT, ["n", 3]))
    graph = helper.make_graph(nodes, "converted", [helper.make_tensor_value_info("X", kinds.FLOAT, ["n", 4])], outputs)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 3)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), "model.onnx")


def teacher(text="onnx:model.onnx", *, classes=NAMES, outputs=""):
    return load(text, steps=Preprocessing(outputs=outputs), shape=(4,), classes=classes)


def logits_of(loaded):
    return loaded.outputs(INPUTS)["logits"]


@pytest.mark.parametrize("classes", [NAMES, ()])
@pytest.mark.parametrize("outputs", [("logits", "scores"), ("scores", "logits"), ("label", "copy", "logits")])
def test_logits_are_used_rather_than_their_softmax(here, outputs, classes):
    linear_file(*outputs)
    loaded = teacher(classes=classes)
    np.testing.assert_allclose(logits_of(loaded), SCORES, atol=1e-5)
    other = "copy" if "copy" in outputs else "scores"
    assert loaded.notes == (f"its output logits holds the logits; {other} is their softmax",)
    assert teacher("onnx:model.onnx#logits").notes == ()


@pytest.mark.parametrize(("operator", "function"), [("Softmax", softmax), ("Sigmoid", expit)])
def test_the_tensor_before_a_lone_softmax_or_sigmoid_is_named(here, operator, function):
    linear_file("copy", operator=operator)
    loaded = teacher()
    (note,) = loaded.notes
    assert note == (
        f"its output copy is the {operator.lower()} of logits; give onnx:model.onnx#logits for the logits before it"
    )
    np.testing.assert_allclose(logits_of(teacher("onnx:model.onnx#logits")), SCORES, atol=1e-5)
    labels = SCORES.argmax(1)
    found = diagnose(loaded, INPUTS, labels, NAMES)
    stated = "probabilities" if operator == "Softmax" else "sigmoid"
    assert any(f"give --teacher-input.outputs {stated} to" in line for line in found.lines())
    converted = teacher(outputs=stated)
    assert not any("warning" in line for line in diagnose(converted, INPUTS, labels, NAMES).lines())
    values = log_softmax(SCORES, axis=1) if operator == "Softmax" else SCORES
    np.testing.assert_allclose(logits_of(converted), values, atol=1e-3)


def test_without_the_package_onnx_the_user_is_asked(here, monkeypatch):
    linear_file("scores", "logits")
    monkeypatch.setattr("ev3_distill.teachers.kinds.onnx.origins_of", lambda path: Origins({}, {}))
    with pytest.raises(
        InputError, match=r"must be one of its outputs; .* has scores \[\?, 3\], logits \[\?, 3\]: name one"
    ):
        teacher()


def test_a_sigmoid_of_one_column_needs_a_statement(here):
    linear_file("scores", columns=1, operator="Sigmoid")
    with pytest.raises(
        InputError, match=r"class, 2; .* has one: .* --teacher-input.outputs probabilities if it is the prob"
    ):
        teacher(classes=("no", "yes"))
    logits = logits_of(teacher(classes=("no", "yes"), outputs="probabilities"))
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], SCORES[:, 0], atol=1e-3)


@pytest.mark.parametrize("text", ["onnx:model.onnx", "onnx:model.onnx#output_probability"])
def test_a_zip_map_names_the_tensor_that_it_reads(here, text):
    converted_file()
    with pytest.raises(InputError, match=r"output_probability of .* is a dictionary .* \(ZipMap\): give onnx:model"):
        teacher(text)
    advised = teacher("onnx:model.onnx#probabilities", outputs="probabilities")
    np.testing.assert_allclose(logits_of(advised), log_softmax(SCORES, axis=1), atol=1e-4)


def test_a_zip_map_without_the_package_onnx_names_the_option_of_the_converter(here, monkeypatch):
    converted_file()
    monkeypatch.setattr("ev3_distill.teachers.kinds.onnx.origins_of", lambda path: Origins({}, {}))
    with pytest.raises(InputError, match=r"\(ZipMap\): convert it again with the option zipmap=False"):
        teacher()


def test_a_conversion_without_zip_map_gives_probabilities(here):
    converted_file(zip_map=False)
    found = diagnose(teacher(), INPUTS, SCORES.argmax(1), NAMES)
    assert found.probabilities
    np.testing.assert_allclose(logits_of(teacher(outputs="probabilities")), log_softmax(SCORES, axis=1), atol=1e-4)


@pytest.mark.parametrize("text", ["onnx:model.onnx", "onnx:model.onnx#label"])
def test_labels_alone_are_refused(here, text):
    linear_file("label")
    with pytest.raises(
        InputError, match=r"a score for each class, \[B, 3\]; .* such as the predicted class: take the output"
    ):
        teacher(text).outputs(INPUTS)


def test_pytorch_logits_are_used_rather_than_their_softmax(here):
    torch = pytest.importorskip("torch", reason="torch teachers need the extra [torch]")

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3, bias=False)

        def forward(self, x):
            logits = self.linear(x)
            return torch.softmax(logits, dim=1), logits

    network = Two()
    with torch.no_grad():
        network.linear.weight.copy_(torch.tensor(WEIGHTS.T))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("n")},))
        torch.export.save(program, "two.pt2")
    loaded = teacher("torch:two.pt2")
    np.testing.assert_allclose(logits_of(loaded), SCORES, atol=1e-5)
    assert loaded.notes == ("its output 1 holds the logits; 0 is their softmax",)
    assert teacher("torch:two.pt2#0").notes == ("its output 0 is the softmax of 1",)
