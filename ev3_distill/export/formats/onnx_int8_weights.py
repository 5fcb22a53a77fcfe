"""int8: an ONNX model whose products and convolutions are of whole numbers, by onnxruntime's static quantiser.

Weights have a scale per output channel and 7 bits of the 8: with all 8, sums of two products overflow 16 bits on x86
processors without VNNI, and the same file would answer otherwise there. Activations have one scale each, from the least and the
greatest that calibration saw.
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
    """Gives a calibrator its inputs, batch by batch."""

    def __init__(self, inputs: np.ndarray):
        starts = range(0, len(inputs), BATCH_SIZE)
        self._batches = iter([{INPUTS: inputs[i : i + BATCH_SIZE]} for i in starts])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None."""
        return next(self._batches, None)


def quantised(model: bytes, inputs: np.ndarray, path: Path, *, about: Mapping[str, str]) -> bytes:
    """The model in int8.

    Args:
      model: float32.
      inputs: [N, ...] that show how large activations get, as the model takes them.
      path: where the quantiser may write.
      about: what the file says of itself, by name.
    """
    onnx = package()
    from onnxruntime import quantization

    original = onnx.load_from_string(model)
    logging.getLogger().addFilter(_silent)  # the quantiser advises on the root logger
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
        logging.getLogger().removeFilter(_silent)
    made = onnx.load(str(path))
    del made.metadata_props[:]
    onnx.helper.set_model_props(made, dict(about))
    return bytes(made.SerializeToString())


def _silent(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
