"""CIFAR ResNets in PyTorch, and the pretrained one of an ONNX file.

Reference:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2; arXiv:1512.03385.
"""

import functools
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def resnet(depth: int, width: int, num_classes: int, *, folded: bool = False) -> "torch.nn.Module":
    """A CIFAR ResNet, channels_last, with parameter-free shortcuts ("option A"): inputs [B, 3, H, W] to logits [B, K].

    Args:
      depth: 6n + 2 layers.
      width: filters of the first stage; the second has twice, the third four times as many.
      num_classes: K.
      folded: whether BatchNorm is folded into the convolutions, which then have a bias.
    """
    import torch
    from torch import nn

    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"a resnet's depth is 6n + 2, at least 8; got {depth}: try 8")
    layers = dict(zip(("conv1", "bn1", "relu"), [*_conv(3, width, 1, folded), nn.ReLU(inplace=True)], strict=True))
    for i, c_out in enumerate((width, 2 * width, 4 * width), 1):
        blocks = [_block()(c_out if i == 1 else c_out // 2, c_out, 1 if i == 1 else 2, folded)]
        blocks += [_block()(c_out, c_out, 1, folded) for _ in range((depth - 2) // 6 - 1)]
        layers[f"layer{i}"] = nn.Sequential(*blocks)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(4 * width, num_classes)}
    model: Any = nn.Sequential(OrderedDict(layers))  # Any: PyTorch's type stubs lack memory_format
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model.to(memory_format=torch.channels_last)


@functools.cache
def _block() -> Any:
    """The class of a residual block, created on first use so that importing this module needs no PyTorch."""
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        """relu(x' + BN(conv(relu(BN(conv(x)))))) with x' = x, subsampled and zero-padded where shapes differ."""

        def __init__(self, c_in: int, c_out: int, stride: int, folded: bool):
            super().__init__()
            self.conv1, self.bn1 = _conv(c_in, c_out, stride, folded)
            self.conv2, self.bn2 = _conv(c_out, c_out, 1, folded)
            self.stride, self.more = stride, (c_out - c_in) // 2

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
            y = self.bn2(self.conv2(y))
            if self.more:
                x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
            return functional.relu(y + x, inplace=True)

    return Block


def _conv(c_in: int, c_out: int, stride: int, folded: bool) -> "list[torch.nn.Module]":
    """A 3x3 convolution and its BatchNorm, or an identity."""
    from torch import nn

    norm = nn.Identity() if folded else nn.BatchNorm2d(c_out)
    return [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=folded), norm]


def load_teacher(path: Path | str) -> "torch.nn.Module":
    """The network of an ONNX file, in eval mode: normalized inputs [B, 3, H, W] to logits [B, K].

    The file must hold a CIFAR ResNet that was exported with BatchNorm folded into the convolutions. Depth, width and K follow
    from the shapes of its initializers.
    """
    import onnx
    import torch

    initializers = {item.name: item for item in onnx.load(path).graph.initializer}
    state = {
        name.replace("weight_bias", "bias"): torch.tensor(onnx.numpy_helper.to_array(item))
        for name, item in initializers.items()
        if name.endswith((".weight", "bias"))
    }
    depth = sum(value.ndim == 4 for value in state.values()) + 1  # convolutions, and the linear layer
    model = resnet(depth, len(state["conv1.weight"]), len(state["linear.weight"]), folded=True)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def num_classes(model: "torch.nn.Module") -> int:
    """K of a network that `resnet` built."""
    head: Any = model.get_submodule("linear")
    return head.out_features
