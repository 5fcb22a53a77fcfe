"""Runs a JAX function as an ONNX model."""

import jax
import onnxruntime

from ev3_distill.export.formats import onnx as onnx_format


def run_onnx(function, inputs):
    model = onnx_format.serialize(
        function, jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype), name="it", output="result", metadata={}
    )
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["result"], {"inputs": inputs})[0]
