"""Conv4, the standard few-shot network: four blocks of convolution, BatchNorm, ReLU and pooling, and a linear head.

References:
  Vinyals et al., Matching networks for one shot learning, 2016.
  Snell et al., Prototypical networks for few-shot learning, 2017: 64 filters, 111,936 parameters without a head, for one
    channel. Here there are 256 fewer: the convolutions' biases, which BatchNorm cancels.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.students.axes import GrowthSpec, Layer, Space, next_size, reads, writes
from ev3_distill.students.layers import BatchNorm, Conv, strided_slice
from ev3_distill.students.network import from_nnx
from ev3_distill.types import Network

_BLOCKS = 4


def max_pool(x_BxHxWxC: jax.Array) -> jax.Array:
    """Maximum over 2x2 patches; an odd last row or column is dropped.

    Computed as a maximum of four slices, whose gradient is 8x faster on CPU than that of a windowed reduction.
    """
    height, width = (size // 2 * 2 for size in x_BxHxWxC.shape[1:3])
    corners = [strided_slice(x_BxHxWxC, (2, 2), first=(i, j), end=(height, width)) for i in (0, 1) for j in (0, 1)]
    return functools.reduce(jnp.maximum, corners)


class Conv4(nnx.Module):
    """Maps images [B, H, W, C] to logits [B, K]; the embedding is the last block's output, flattened."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, width: int, *, rngs: nnx.Rngs):
        image_height, image_width, channels = input_shape
        filters = [channels, *[width] * _BLOCKS]
        self.convs = nnx.List(Conv(a, b, rngs=rngs) for a, b in itertools.pairwise(filters))
        self.norms = nnx.List(BatchNorm(width, rngs=rngs) for _ in range(_BLOCKS))
        self.head = nnx.Linear((image_height >> _BLOCKS) * (image_width >> _BLOCKS) * width, num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(inputs)[0]

    def features(self, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and features: `block1` to `block4` [B, H, W, C] and `embedding` [B, D]."""
        x, features = inputs, {}
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            x = features[f"block{i}"] = max_pool(nnx.relu(norm(conv(x))))
        embedding_BxD = features["embedding"] = x.reshape(x.shape[0], -1)
        return self.head(embedding_BxD), features


def conv4(input_shape: Sequence[int], num_classes: int, *, width: int = 64) -> Network:
    """A Conv4 for images [H, W, C] of at least 16x16.

    Args:
      input_shape: of one image: H, W, C.
      num_classes: K.
      width: number of filters of every block.

    Raises:
      InputError: the input is not an image, or too small to be halved four times.
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < 2**_BLOCKS:
        raise InputError(
            f"a conv4's input is an image [H, W, C] of at least 16x16; got shape {list(input_shape)}: use an mlp, or "
            "resize the images"
        )
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    return from_nnx(
        lambda rngs: Conv4(input_shape, num_classes, width, rngs=rngs), {"family": "conv4", "width": width, **shape}
    )


def conv4_growth(input_shape: Sequence[int], num_classes: int, *, width: int = 64) -> GrowthSpec:
    """How a conv4 can grow: all blocks get wider."""
    names = [f"block{i}" for i in range(1, _BLOCKS + 1)]
    layers = {}
    for i, name in enumerate(names):
        layers[f"{name}.conv"] = Layer(("convs", i), (reads(names[i - 1]) if i else None, writes(name)))
        layers[f"{name}.norm"] = Layer(("norms", i), (writes(name),))
    pixels = (input_shape[0] >> _BLOCKS) * (input_shape[1] >> _BLOCKS)
    layers["head"] = Layer(("head",), (reads(names[-1], times=pixels), None))
    return GrowthSpec(dict.fromkeys(names, Space(width)), layers, {"wider": {"width": next_size(width)}})
