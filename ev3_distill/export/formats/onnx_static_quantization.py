"""Post-training int8 quantization of an ONNX model, by onnxruntime's static quantizer.

Weights get one scale per output channel and use 7 of the 8 bits: with all 8, sums of two products overflow 16 bits on x86
processors without VNNI, and the same file would give other outputs there. Each activation gets one scale, from the minimum and
maximum over the calibration inputs.
"""

import contextlib
import io
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ev3_distill.export.formats.onnx import INPUTS, package

OPERATORS = ["Conv", "MatMul", "Gemm"]
BATCH_SIZE = 32


class _Reader:
    """Feeds calibration inputs to the quantizer, batch by batch."""

    def __init__(self, inputs: np.ndarray):
        starts = range(0, len(inputs), BATCH_SIZE)
        self._batches = iter([{INPUTS: inputs[i : i + BATCH_SIZE]} for i in starts])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Returns the next batch, or None at the end."""
        return next(self._batches, None)


def quantize(model: bytes, inputs: np.ndarray, path: Path, *, metadata: Mapping[str, str]) -> bytes:
    """Quantizes a model to int8.

    Args:
      model: float32 ONNX model.
      inputs: calibration inputs [N, ...] as the model takes them.
      path: scratch file for the quantizer.
      metadata: entries of the new file's metadata, by name.
    """
    onnx = package()
    from onnxruntime import quantization

    original = onnx.load_from_string(model)
    logging.getLogger().addFilter(_errors_only)  # the quantizer logs advice to the root logger
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            quantization.quantize_static(
                original,
                str(path),
                _Reader(inputs),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
    finally:
        logging.getLogger().removeFilter(_errors_only)
    quantized = onnx.load(str(path))
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, dict(metadata))
    return bytes(quantized.SerializeToString())


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
