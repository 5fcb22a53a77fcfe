"""Layers shared by student families: convolution and BatchNorm."""

from ev3_distill.students.layers.conv import BatchNorm, Conv, convolve, standard_convolutions, strided_slice

__all__ = ["BatchNorm", "Conv", "convolve", "standard_convolutions", "strided_slice"]
