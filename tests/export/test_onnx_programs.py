"""The conversion of JAX programs to ONNX, one operation or pattern at a time."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax import nnx
from onnx_runner import run_onnx

from ev3_distill.errors import InputError
from ev3_distill.export.formats import onnx as onnx_format


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
    "standardized": lambda x: jax.nn.standardize(x, axis=-1),
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


def test_a_missing_onnx_package_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"needs the package onnx, .*pip install 'ev3-distill\[onnx\]'"):
        run_onnx(lambda x: x, np.zeros((1, 2), np.float32))
