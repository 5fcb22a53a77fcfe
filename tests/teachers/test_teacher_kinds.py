"""Every kind of teacher: the same network gives the same logits, and errors are clear."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from small_network import (
    BIAS,
    CLASSES,
    HEAD,
    IMAGES,
    KERNEL,
    MEAN,
    STD,
    STEPS,
    expected,
    flax_network,
    load,
    logits_of,
    module,
    onnx_file,
    pt2_file,
)

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.teachers import KINDS
from ev3_distill.teachers.kinds.flax import flax_teacher, forward
from ev3_distill.teachers.teacher import BatchError, pick_outputs
from ev3_distill.types import Variables


@pytest.fixture
def own(here, monkeypatch):
    """The module `own`, importable from a fresh working directory."""
    module()
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return here


def make(kind):
    """A teacher of a kind with the weights above."""
    if kind == "onnx":
        return load(f"onnx:{onnx_file('small.onnx')}")
    if kind == "torch":
        return load(f"torch:{pt2_file('small.pt2')}")
    if kind == "flax":
        return load("flax:somewhere", load_network=lambda place: flax_network())
    return load("python:own:logits")


@pytest.mark.parametrize("kind", ["onnx", "torch", "flax", "python"])
def test_all_kinds_give_the_same_logits(own, kind):
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
def test_the_digest_covers_what_outputs_depend_on(own, kind, monkeypatch):
    teacher = make(kind)
    assert len(teacher.digest) == 64
    monkeypatch.delitem(sys.modules, "own", raising=False)
    assert make(kind).digest == teacher.digest
    assert teacher.with_preprocessing(STEPS).digest == teacher.digest
    for other in (Preprocessing(mean=MEAN), Preprocessing(mean=MEAN, std=STD, order="BGR")):
        assert teacher.with_preprocessing(other).digest != teacher.digest
    for alike in (dataclasses.replace(STEPS, order="RGB", scale=1.0), dataclasses.replace(STEPS, classes=CLASSES)):
        assert teacher.with_preprocessing(alike).digest == teacher.digest
    assert teacher.with_preprocessing(dataclasses.replace(STEPS, classes=CLASSES[::-1])).digest != teacher.digest


def test_other_weights_give_another_digest(own):
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


def test_a_flax_teacher_without_preprocessing_has_a_network():
    network, variables = flax_network()
    plain = flax_teacher(network, variables, "mine")
    assert plain.network is network
    assert plain.variables is variables
    np.testing.assert_allclose(plain.outputs(IMAGES)["logits"], logits_of(IMAGES / np.float32(255)), atol=1e-4)
    inputs = IMAGES / np.float32(255)
    np.testing.assert_array_equal(forward(network, variables, batch_size=4)(inputs).shape, (11, 5))
    assert make("flax").network is None
    assert plain.with_preprocessing(Preprocessing(classes=CLASSES)).network is network


def test_a_flax_teacher_that_does_not_fit_is_refused():
    with pytest.raises(
        InputError, match=r"takes \[8, 8, 3\], the examples are \[9, 9, 3\]: give --teacher-input.resize 8 8"
    ):
        load("flax:x", shape=(9, 9, 3), load_network=lambda place: flax_network())
    with pytest.raises(InputError, match="one output per class of the data, 2; flax:x has 5"):
        load("flax:x", classes=("a", "b"), load_network=lambda place: flax_network())


def test_python_features(own):
    outputs = load("python:own:both").outputs(IMAGES)
    assert {name: value.shape for name, value in outputs.items()} == {"logits": (11, 5), "hidden": (11, 8, 8, 6)}


@pytest.mark.parametrize(("name", "message"), [
    ("broken", r"fails with OverflowError: out of cheese on a batch \[11, 8, 8, 3\] with values from .* to "),
    ("infinite", "logits must be finite; python:own:infinite gives nan or infinity for example 3 of a batch"),
    ("vector", r"one output column per class, 5; python:own:vector has one: return one logit per class"),
    ("nothing", "the dictionary lacks 'logits'; it has hidden"),
])  # fmt: skip
def test_a_python_teacher_that_fails_is_reported(own, name, message):
    teacher = load(f"python:own:{name}")
    with pytest.raises(InputError, match=message) as caught:
        teacher.outputs(IMAGES)
    assert getattr(caught.value, "row", None) == (3 if name == "infinite" else None)


@pytest.mark.parametrize(("place", "message"), [
    ("own:missing", "'own:missing', which fails with AttributeError"),
    ("no_such_module:f", "which fails with ModuleNotFoundError"),
    ("own:NUMBER", "MODULE:FUNCTION; got 'own:NUMBER', which is of type int"),
    ("own", "is python:MODULE:FUNCTION; got 'python:own'"),
])  # fmt: skip
def test_a_python_teacher_that_cannot_be_loaded_is_refused(own, place, message):
    with pytest.raises(InputError, match=message):
        load(f"python:{place}")


def test_a_python_teacher_of_other_classes(own):
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


def test_logits_are_in_the_class_order_of_the_data(own):
    order = ("dog", "ant", "elk", "cat", "bee")
    teacher = load("python:own:logits", classes=order, steps=dataclasses.replace(STEPS, classes=CLASSES))
    columns = [CLASSES.index(name) for name in order]
    np.testing.assert_allclose(teacher.outputs(IMAGES)["logits"], expected()[:, columns], atol=1e-4)
    assert teacher.class_names == order
    fewer = load("python:own:logits", classes=order[:3], steps=dataclasses.replace(STEPS, classes=CLASSES))
    np.testing.assert_allclose(fewer.outputs(IMAGES)["logits"], expected()[:, columns[:3]], atol=1e-4)
    assert fewer.num_classes == 3
    with pytest.raises(InputError, match=r"knows ant, bee, cat, dog, elk, the data .* it lacks fox, gnu: name its"):
        load("python:own:logits", classes=(*order, "fox", "gnu"), steps=dataclasses.replace(STEPS, classes=CLASSES))
    unlabeled = load("python:own:logits", classes=(), steps=dataclasses.replace(STEPS, classes=CLASSES))
    assert (unlabeled.num_classes, unlabeled.class_names) == (5, CLASSES)
    with pytest.raises(InputError, match="has 5 outputs and 2 names"):
        load(f"onnx:{onnx_file('a.onnx')}", steps=dataclasses.replace(STEPS, classes=("ant", "bee")))


def test_the_toml_file_is_read_and_options_win(own):
    onnx_file("small.onnx")
    Path("small.toml").write_text(f"mean = {list(MEAN)}\nstd = [1, 1, 1]\n")
    got = load("onnx:small.onnx", steps=Preprocessing(std=STD)).outputs(IMAGES)["logits"]
    np.testing.assert_allclose(got, expected(), atol=1e-4)
    Path("own.toml").write_text(f"mean = {list(MEAN)}\nstd = {list(STD)}\n")
    np.testing.assert_allclose(
        load("python:own:logits", steps=Preprocessing()).outputs(IMAGES)["logits"], expected(), atol=1e-4
    )


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
    ("ensemble:python:own:logits,logits:a.npz", "got recorded logits, logits:a.npz, in .*: average the logits yourself"),
    ("ensemble:python:own:logits,ensemble:python:own:logits", "members of an ensemble are single teachers"),
    ("onnx:", "a KIND of onnx, torch, flax, python, sklearn, ensemble, ensemble-prob or logits; got 'onnx:'"),
    ("tensorflow:a", "; got 'tensorflow:a': for example"),
    ("resnet", "; got 'resnet'"),
])  # fmt: skip
def test_invalid_teacher_names_are_refused(own, text, message):
    with pytest.raises(InputError, match=message):
        load(text)


def test_every_kind_is_documented():
    assert all(load_kind.__doc__ for load_kind in KINDS.values())


def test_pick_outputs():
    assert pick_outputs({"a": (None, 5), "b": (None, 7)}, (), 5, source="s") == ("a",)
    assert pick_outputs({"a": None}, (), 5, source="s") == ("a",)
    assert pick_outputs({"a": (None, None), "b": (None, 6, 8, 8)}, (), 0, source="s") == ("a",)
    with pytest.raises(InputError, match=r"\[B, 9\] must be one of its outputs; s has a \[\?, 5\], b of unknown shape"):
        pick_outputs({"a": (None, 5), "b": None}, (), 9, source="s")


def test_the_real_teacher(cifar):
    images, labels, classes = cifar
    path = SHARED.parent / "teachers" / "cifar10_resnet56.onnx"
    if not path.is_file():
        pytest.skip(f"the real teacher is missing: {path.name}")
    steps = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    teacher = load(f"onnx:{path}", steps=steps, shape=images.shape[1:], classes=classes)
    assert teacher.preprocessing.layout == "NCHW"
    assert (teacher.outputs(images)["logits"].argmax(1) == labels).mean() >= 0.88
