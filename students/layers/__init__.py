"""Layers shared by student families: convolution and BatchNorm."""

from ev3_distill.students.layers.compiled import standard_convolutions
from ev3_distill.students.layers.conv import Conv, convolve, strided_slice
from ev3_distill.students.layers.norm import BatchNorm

__all__ = ["BatchNorm", "Conv", "convolve", "standard_convolutions", "strided_slice"]
