"""MobileNetV2-style network: inverted residuals with depthwise convolutions, for a student of few multiplications.

Few multiplications are not few seconds: on CPU, which waits for memory, a training step takes some 12 times a ResNet-8's.

The paper's network halves images of 224x224 five times; here smaller images are halved less, the earliest times first left
out, until about 4x4 are left. All filters follow the width, also those of the last convolution.

References:
  Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, 2018.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.network import from_nnx
from ev3_distill.types import Network
from students.conv import BatchNorm, Conv

BLOCKS = (1, 2, 3, 4, 3, 3, 1)

_STAGES = ((1, 16), (6, 24), (6, 32), (6, 64), (6, 96), (6, 160), (6, 320))  # expansion and filters
_HALVES = (1, 2, 3, 5)  # stages that begin with stride 2; so does the stem
_LEAST = 8  # pixels


class InvertedResidual(nnx.Module):
    """Expand, convolve depthwise, project without ReLU; added to the input where shapes agree."""

    def __init__(self, c_in: int, c_out: int, expansion: int, strides: int, *, rngs: nnx.Rngs):
        inner = expansion * c_in
        self.expand = Conv(c_in, inner, 1, rngs=rngs) if expansion > 1 else None
        self.norm1 = BatchNorm(inner, rngs=rngs) if expansion > 1 else None
        self.depthwise = Conv(inner, inner, strides=strides, groups=inner, rngs=rngs)
        self.norm2 = BatchNorm(inner, rngs=rngs)
        self.project, self.norm3 = Conv(inner, c_out, 1, rngs=rngs), BatchNorm(c_out, rngs=rngs)
        self.residual = strides == 1 and c_in == c_out

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), O]."""
        y = x if self.expand is None or self.norm1 is None else nnx.relu6(self.norm1(self.expand(x)))
        y = nnx.relu6(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.residual else y


class MobileNet(nnx.Module):
    """Images [B, H, W, C] to logits [B, K]."""

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, width: int, blocks: Sequence[int], *, rngs: nnx.Rngs
    ):
        def filters(of_paper: int) -> int:
            return max(8, round(of_paper * width / 100 / 8) * 8)

        halves = set(((-1, *_HALVES)[::-1])[: min(min(input_shape[:2]).bit_length() - 3, 5)])  # the stem is stage -1
        c = filters(32)
        self.stem = Conv(input_shape[-1], c, strides=1 + (-1 in halves), rngs=rngs)
        self.stem_norm = BatchNorm(c, rngs=rngs)
        stages = []
        for i, ((expansion, of_paper), count) in enumerate(zip(_STAGES, blocks, strict=False)):
            sizes = [c, *[filters(of_paper)] * count]
            strides = [1 + (i in halves), *[1] * (count - 1)]
            stages.append(nnx.List(
                InvertedResidual(a, b, expansion, s, rngs=rngs)
                for a, b, s in zip(sizes, sizes[1:], strides, strict=False)
            ))  # fmt: skip
            c = sizes[-1]
        self.stages = nnx.List(stages)
        self.last, self.last_norm = Conv(c, filters(1280), 1, rngs=rngs), BatchNorm(filters(1280), rngs=rngs)
        self.head = nnx.Linear(filters(1280), num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(inputs)[0]

    def features(self, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and what they are made of: `stage1`, ... [B, H, W, C] and `pooled` [B, D]."""
        x, found = nnx.relu6(self.stem_norm(self.stem(inputs))), {}
        for i, stage in enumerate(self.stages, 1):
            for block in stage:
                x = block(x)
            found[f"stage{i}"] = x
        x = nnx.relu6(self.last_norm(self.last(x)))
        pooled_BxD = found["pooled"] = x.mean((1, 2))
        return self.head(pooled_BxD), found


def mobilenet(
    input_shape: Sequence[int], num_classes: int, *, width: int = 50, blocks: Sequence[int] = BLOCKS
) -> Network:
    """A MobileNetV2-style network for images [H, W, C] of at least 8x8.

    Args:
      input_shape: of one image, H, W, C.
      num_classes: K.
      width: filters in percent of the paper's, rounded to multiples of 8.
      blocks: of each stage, first to last; at most the paper's seven stages.

    Raises:
      InputError: no image, too small, or too many stages.
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < _LEAST:
        raise InputError(
            f"a mobilenet's input is an image [H, W, C] of at least 8x8; got shape {list(input_shape)}: take an mlp"
        )
    if not 1 <= len(blocks) <= len(_STAGES):
        raise InputError(f"a mobilenet has 1 to 7 stages; got blocks={list(blocks)}: try blocks=1-2-3-4-3-3-1")
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    spec = {"family": "mobilenet", "width": width, "blocks": list(blocks), **shape}
    return from_nnx(lambda rngs: MobileNet(input_shape, num_classes, width, blocks, rngs=rngs), spec)
