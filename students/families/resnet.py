"""Residual network for small images, such as CIFAR-10.

References:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2; arXiv:1512.03385.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.students.axes import Axis, GrowthSpec, Layer, Space, Start, next_size, reads, writes
from ev3_distill.students.layers import BatchNorm, Conv, strided_slice
from ev3_distill.students.network import from_nnx
from ev3_distill.types import Network

DEPTHS = (8, 14, 20, 32, 44, 56)


class Block(nnx.Module):
    """relu(x' + BN(conv(relu(BN(conv(x)))))) with x' = x, subsampled and zero-padded in channels where shapes differ."""

    def __init__(self, c_in: int, c_out: int, strides: int, *, rngs: nnx.Rngs):
        self.conv1, self.norm1 = Conv(c_in, c_out, strides=strides, rngs=rngs), BatchNorm(c_out, rngs=rngs)
        self.conv2, self.norm2 = Conv(c_out, c_out, rngs=rngs), BatchNorm(c_out, rngs=rngs)
        self.strides, self.extra = strides, c_out - c_in

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), O]."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = strided_slice(x, (self.strides, self.strides))
        if self.extra:
            shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (self.extra // 2, self.extra - self.extra // 2)))
        return nnx.relu(y + shortcut)


class ResNet(nnx.Module):
    """Maps images [B, H, W, C] to logits [B, K]: a convolution, three stages of n blocks (depth 6n + 2), a linear head."""

    def __init__(self, channels: int, num_classes: int, depth: int, width: int, *, rngs: nnx.Rngs):
        self.conv, self.norm = Conv(channels, width, rngs=rngs), BatchNorm(width, rngs=rngs)
        blocks = (depth - 2) // 6
        self.stages = nnx.List(
            nnx.List(
                Block(c_in if i == 0 else c_out, c_out, strides if i == 0 else 1, rngs=rngs) for i in range(blocks)
            )
            for c_in, c_out, strides in ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        )
        self.head = nnx.Linear(4 * width, num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(inputs)[0]

    def features(self, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and features: `stage1` to `stage3` [B, H, W, C] and `pooled` [B, D]."""
        x = nnx.relu(self.norm(self.conv(inputs)))
        features = {}
        for i, stage in enumerate(self.stages, 1):
            for block in stage:
                x = block(x)
            features[f"stage{i}"] = x
        pooled_BxD = features["pooled"] = x.mean((1, 2))
        return self.head(pooled_BxD), features


def resnet(input_shape: Sequence[int], num_classes: int, *, depth: int = 8, width: int = 16) -> Network:
    """A ResNet for images [H, W, C], with parameter-free shortcuts ("option A").

    Args:
      input_shape: of one image: H, W, C.
      num_classes: K.
      depth: 8, 14, 20, 32, 44 or 56 layers.
      width: number of filters of the first stage; the second has twice, the third four times as many.

    Raises:
      InputError: unsupported depth or width, or the input is not an image.
    """
    if depth not in DEPTHS:
        raise InputError(f"a resnet's depth is one of {', '.join(map(str, DEPTHS))}; got {depth}: use the nearest")
    if len(input_shape) != 3:
        raise InputError(
            f"a resnet's input is an image [H, W, C]; got shape {list(input_shape)}: reshape it, or use an mlp"
        )
    if width < 1:
        raise InputError(f"a resnet's width is a number of filters of at least 1; got {width}: try 16")
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    spec = {"family": "resnet", "depth": depth, "width": width, **shape}
    return from_nnx(lambda rngs: ResNet(input_shape[-1], num_classes, depth, width, rngs=rngs), spec)


def resnet_growth(input_shape: Sequence[int], num_classes: int, *, depth: int = 8, width: int = 16) -> GrowthSpec:
    """How a resnet can grow: wider, or by blocks at the end of each stage whose last BatchNorm starts at zero.

    New channels inside a block are drawn, those of the stages are copied. Copies stay similar for long, and so would half of
    the larger network (the growth benchmark has figures). A padded shortcut keeps its position: the channels of a stage are
    those of the stage before, copied in the same way, surrounded by channels of its own.
    """
    spaces = {
        "stage1": Space(width),
        "stage2": Space(2 * width, holds=("stage1", width // 2)),
        "stage3": Space(4 * width, holds=("stage2", width)),
    }
    layers = {"conv": Layer(("conv",), (None, writes("stage1"))), "norm": Layer(("norm",), (writes("stage1"),))}
    before = "stage1"
    for i in range(3):
        for j in range((depth - 2) // 6):
            stage, name, path = f"stage{i + 1}", f"stage{i + 1}.{j}", ("stages", i, j)
            inner = f"{name}.inner"
            spaces[inner] = Space(spaces[stage].size, drawn=True)
            parts: dict[str, tuple[Axis, ...]] = {
                "conv1": (reads(before), writes(inner)),
                "norm1": (writes(inner),),
                "conv2": (reads(inner), writes(stage)),
                "norm2": (writes(stage),),
            }
            for part, axes in parts.items():
                start: Start = None if j == 0 else "zero" if part == "norm2" else "drawn"
                layers[f"{name}.{part}"] = Layer((*path, part), axes, start)
            before = stage
    layers["head"] = Layer(("head",), (reads("stage3"), None))
    moves = {"wider": {"width": next_size(width)}}
    if deeper := [d for d in DEPTHS if d > depth]:
        moves["deeper"] = {"depth": deeper[0]}
    return GrowthSpec(spaces, layers, moves)
