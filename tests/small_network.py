"""One small network in every form that a teacher can have: NumPy, a Python module, ONNX, torch and flax."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from ev3_distill.config import Preprocessing
from ev3_distill.students import from_nnx
from ev3_distill.teachers import load_teacher
from ev3_distill.types import Variables

SHAPE, CLASSES = (8, 8, 3), ("ant", "bee", "cat", "dog", "elk")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STEPS = Preprocessing(mean=MEAN, std=STD)
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 3, 3, 6)).astype(np.float32) / 3  # height, width, in, out
BIAS = RNG.normal(size=6).astype(np.float32)
HEAD = RNG.normal(size=(6, 5)).astype(np.float32)
IMAGES = RNG.integers(0, 256, size=(11, *SHAPE), dtype=np.uint8)


def hidden_of(inputs):
    """The feature `hidden` of the small network [B, H, W, 6], in NumPy."""
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
    """Writes a user's module to the working directory, own.py."""
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


def onnx_file(path, *, batch="n", extra=(), dtype="FLOAT", input_shape=(3, 8, 8), layout="NCHW", inputs=1):
    """Writes the small network as an ONNX file."""
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
