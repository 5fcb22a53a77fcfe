"""One teacher as onnx, torch, flax and python: the same logits, and the same run within noise."""

import json
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED
from flax import nnx

from ev3_distill import load_data, students
from ev3_distill.config import Preprocessing
from ev3_distill.data.augment import Augmentation
from ev3_distill.data.batches import sampler
from ev3_distill.data.pipeline import ResidentPipeline, Views
from ev3_distill.data.sources import Dataset
from ev3_distill.students import from_nnx
from ev3_distill.tasks.classification.task import classification
from ev3_distill.teachers import load_teacher
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.teachers.targets import CachedTargets
from ev3_distill.types import Variables

PATHS = ("onnx", "torch", "flax", "python")
ONNX = SHARED.parent / "teachers" / "cifar10_resnet56.onnx"
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def exported(network, example, path):
    """A torch module as a program with a free batch axis."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
        torch.export.save(program, path)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """A trained two-layer teacher of the digits: a folder of flax:, and its weights [(kernel [D, H], bias [H]), ...]."""
    from ev3_distill.cli.main import main

    run = tmp_path_factory.mktemp("paths") / "teacher"
    main(["teach", "--network", "mlp:hidden=16", "--budget", "400", "--out", str(run)])
    params = students.load(run)[1].params
    return run, [(np.asarray(params["layers"][i]["kernel"]), np.asarray(params["layers"][i]["bias"])) for i in range(2)]


def source_of(path, run, weights):
    """Writes the teacher in one format into the working directory and returns its name."""
    (first, bias), (second, shift) = weights
    if path == "flax":
        return f"flax:{run}"
    if path == "python":
        np.savez("weights.npz", first=first, bias=bias, second=second, shift=shift)
        Path("by_hand.py").write_text("""
import numpy as np
with np.load("weights.npz") as file:
    W = dict(file)


def logits(images):
    return np.maximum(images.reshape(len(images), -1) @ W["first"] + W["bias"], 0) @ W["second"] + W["shift"]
""")
        return "python:by_hand:logits"
    if path == "torch":
        torch = pytest.importorskip("torch", reason="torch teachers need the extra [torch]")
        network = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
        )
        with torch.no_grad():
            for layer, (kernel, added) in zip((network[1], network[3]), weights, strict=True):
                layer.weight.copy_(torch.tensor(kernel.T))
                layer.bias.copy_(torch.tensor(added))
        exported(network.eval(), torch.zeros(4, 8, 8, 1), "teacher.pt2")
        return "torch:teacher.pt2"
    onnx = pytest.importorskip("onnx", reason="makes the ONNX file of this test")
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        make.make_node("Flatten", ["x"], ["flat"]),
        make.make_node("Gemm", ["flat", "first", "bias"], ["sums"]),
        make.make_node("Relu", ["sums"], ["hidden"]),
        make.make_node("Gemm", ["hidden", "second", "shift"], ["logits"]),
    ]
    arrays = {"first": first, "bias": bias, "second": second, "shift": shift}
    graph = make.make_graph(
        nodes,
        "digits",
        [make.make_tensor_value_info("x", kind, ["n", 8, 8, 1])],
        [make.make_tensor_value_info("logits", kind, ["n", 10])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    onnx.save(make.make_model(graph, opset_imports=[make.make_operatorsetid("", 17)], ir_version=8), "teacher.onnx")
    return "onnx:teacher.onnx"


def compressed(cli, source, out, seed=0):
    """Runs with a teacher; returns the report and the student's predictions on all digits."""
    options = ("--student", "mlp:hidden=8", "--budget", "1500", "--arms", "kd2", "kd4")
    layout = () if source.startswith("flax") else ("--teacher-input.layout", "NHWC")
    answer = cli("compress", "--teacher", source, *layout, *options, "--seed", seed, "--out", out)
    assert answer.code == 0, answer.err
    logits = forward(*students.load(Path(out)))(load_data("digits").inputs)
    return json.loads((Path(out) / "report.json").read_text()), logits.argmax(axis=1)


@pytest.mark.parametrize("path", PATHS[:2] + PATHS[3:])
def test_runs_by_all_paths_are_the_same(layers, here, monkeypatch, cli, path):
    """The logits differ only in their last bits, and the runs differ far less than with another seed."""
    monkeypatch.delitem(sys.modules, "by_hand", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    by_flax, flax_predictions = compressed(cli, source_of("flax", *layers), "flax")
    by_path, path_predictions = compressed(cli, source_of(path, *layers), "other")
    _, seed_predictions = compressed(cli, source_of("flax", *layers), "seed", seed=1)
    for report in (by_flax, by_path):
        assert report["student"]["accuracy"] > 0.85
    assert by_path["teacher"]["accuracy"] == pytest.approx(by_flax["teacher"]["accuracy"], abs=0.003)
    assert by_path["student"]["accuracy"] == pytest.approx(by_flax["student"]["accuracy"], abs=0.02)
    assert (path_predictions == flax_predictions).mean() >= 0.97
    assert (path_predictions == flax_predictions).mean() > (seed_predictions == flax_predictions).mean()


class Padded(nnx.Module):
    """The CIFAR ResNet with BatchNorm folded into convolutions that pad by one all around, as PyTorch's do."""

    def __init__(self, state):
        self.state = nnx.data({name: nnx.Param(jnp.asarray(array)) for name, array in state.items()})

    def conv(self, name, x, strides=1):
        """The convolution of that name, [B, H, W, C] to [B, H / strides, W / strides, O]."""
        kernel = self.state[f"{name}.weight"][...].transpose(2, 3, 1, 0)
        layout = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(x, kernel, (strides, strides), ((1, 1), (1, 1)), dimension_numbers=layout)
        return out + self.state[f"{name}.bias"][...]

    def __call__(self, x):
        x = nnx.relu(self.conv("conv1", x))
        blocks = sorted({tuple(name.split(".")[:2]) for name in self.state if name.startswith("layer")}, key=_order)
        for stage, block in blocks:
            name, strides = f"{stage}.{block}", 2 if block == "0" and stage != "layer1" else 1
            y = self.conv(f"{name}.conv2", nnx.relu(self.conv(f"{name}.conv1", x, strides)))
            more = y.shape[-1] - x.shape[-1]
            x = jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (more // 2, more // 2)))
            x = nnx.relu(y + x)
        return x.mean((1, 2)) @ self.state["linear.weight"][...].T + self.state["linear.bias"][...]


def _order(block):
    return block[0], int(block[1])


def test_the_real_teacher_by_all_paths(here, monkeypatch, cifar):
    if not ONNX.is_file():
        pytest.skip(f"the real teacher is missing: {ONNX.name}")
    pytest.importorskip("torch", reason="torch teachers need the extra [torch]")
    onnx = pytest.importorskip("onnx", reason="reads the weights of the real teacher")
    import torch

    from ev3_distill.benchmarks import torch_resnet

    images, labels, classes = cifar
    images, labels = images[:100], labels[:100]

    def load(name, **more):
        return load_teacher(
            name, preprocessing=IMAGENET, input_shape=(32, 32, 3), num_classes=10, class_names=classes, **more
        )

    module = torch_resnet.load_teacher(ONNX)
    exported(module, torch.zeros(4, 3, 32, 32), "real.pt2")
    state = {name: array.numpy() for name, array in module.state_dict().items()}
    assert onnx.load(ONNX).graph.initializer
    network = from_nnx(lambda rngs: Padded(state), {"input_shape": [32, 32, 3], "num_classes": 10})
    variables = network.init(jax.random.key(0))
    assert isinstance(variables, Variables)
    Path("served.py").write_text(f"""
import numpy as np
import onnxruntime

SESSION = onnxruntime.InferenceSession({str(ONNX)!r}, providers=["CPUExecutionProvider"])


def logits(images):
    return SESSION.run(None, {{SESSION.get_inputs()[0].name: np.ascontiguousarray(images.transpose(0, 3, 1, 2))}})[0]
""")
    monkeypatch.delitem(sys.modules, "served", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    named = {
        "onnx": load(f"onnx:{ONNX}"),
        "torch": load("torch:real.pt2"),
        "flax": load("flax:real", load_network=lambda place: (network, variables)),
        "python": load("python:served:logits"),
    }
    logits = {path: named[path].outputs(images)["logits"] for path in PATHS}
    assert (logits["onnx"].argmax(axis=1) == labels).mean() >= 0.85
    for path in PATHS:
        np.testing.assert_allclose(logits[path], logits["onnx"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mix", ["", pytest.param("cutmix", marks=pytest.mark.slow)])
def test_cached_logits_belong_to_the_pixels_of_the_batch(tmp_path, cifar, mix):
    """For 1,000 random pairs of example and view, cached logits equal the teacher's on the pixels of the batch."""
    if not ONNX.is_file():
        pytest.skip(f"the real teacher is missing: {ONNX.name}")
    images, labels, classes = cifar
    teacher = load_teacher(
        f"onnx:{ONNX}", preprocessing=IMAGENET, input_shape=(32, 32, 3), num_classes=10, class_names=classes
    )
    dataset = Dataset(images, labels.astype(np.int32), 10, classes, None, "made", "f")
    augmentation = Augmentation(flip=True, crop=4, cutout=8, mix=mix)
    views = Views(images, dataset.labels, np.arange(len(images)), augmentation)
    targets = CachedTargets(teacher, dataset, task=classification(10), root=tmp_path, warn=pytest.fail)
    batch_size, count = 50, 4
    supply = ResidentPipeline(views, targets.for_views(views, count), count=count, batch_size=batch_size, seed=0)
    pool = supply.whole()
    targets.close()
    sample = jax.jit(sampler(batch_size=batch_size, views=count, augmentation=augmentation))
    steps = np.random.default_rng(0).choice(count * len(images) // batch_size, 20, replace=False)
    checked = set()
    for step in steps:
        batch = jax.device_get(sample(pool, jnp.int32(step)))
        expected = teacher.outputs(batch.inputs)["logits"]
        difference = np.abs(expected - batch.teacher["logits"]).max(axis=1)
        assert (difference <= 1e-5 * np.abs(expected).max(axis=1)).all(), difference.max()
        checked |= {(int(i), int(step) * batch_size // len(images)) for i in batch.index}
        assert (batch.inputs != images[batch.index]).any(axis=(1, 2, 3)).mean() > 0.9
    assert len(checked) == 1000
