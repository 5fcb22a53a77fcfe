"""Formats: a student as a file that others run, ONNX or StableHLO, and such files run as others would run them."""
