"""The student family `mobilenet` in PyTorch, for comparisons of speed. Images are [B, 3, H, W], channels_last in memory."""

from typing import TYPE_CHECKING, Any

from ev3_distill.students.families.mobilenet import BLOCKS, BlockSizes, mobilenet_sizes

if TYPE_CHECKING:
    import torch


def mobilenet(input_shape: tuple[int, int, int], num_classes: int, *, width: int = 50) -> "torch.nn.Module":
    """A MobileNetV2 with the sizes of `students.families.mobilenet`."""
    import torch
    from torch import nn

    class Block(nn.Module):
        """Expansion, depthwise convolution and projection."""

        def __init__(self, sizes: BlockSizes):
            super().__init__()
            inner, expands = sizes.inner, sizes.expansion > 1
            parts = [*_conv(sizes.c_in, inner, 1), nn.ReLU6(inplace=True)] if expands else []
            parts += [*_conv(inner, inner, 3, sizes.strides, inner), nn.ReLU6(inplace=True)]
            self.parts, self.residual = nn.Sequential(*parts, *_conv(inner, sizes.c_out, 1)), sizes.residual

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            return x + self.parts(x) if self.residual else self.parts(x)

    stem_strides, filters, stages = mobilenet_sizes(input_shape, width, BLOCKS)
    layers: list[nn.Module] = [*_conv(input_shape[2], filters[0], 3, stem_strides), nn.ReLU6(inplace=True)]
    for sizes in (sizes for stage in stages for sizes in stage):
        layers.append(Block(sizes))
    layers += [*_conv(filters[-2], filters[-1], 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model: Any = nn.Sequential(*layers, nn.Linear(filters[-1], num_classes))  # Any: PyTorch's stubs lack memory_format
    return model.to(memory_format=torch.channels_last)


def _conv(c_in: int, c_out: int, size: int, strides: int = 1, groups: int = 1) -> "list[torch.nn.Module]":
    from torch import nn

    conv = nn.Conv2d(c_in, c_out, size, strides, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]
