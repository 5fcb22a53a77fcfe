"""File formats: writing a student as ONNX, StableHLO or safetensors, and running such files in a subprocess."""
