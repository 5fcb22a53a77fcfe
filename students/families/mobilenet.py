"""MobileNetV2-style network: inverted residuals with depthwise convolutions, for few multiplications.

Few multiplications do not mean few seconds: a CPU waits for memory, and a training step takes about 7 times as long as a
ResNet-8's.

The paper's network halves images of 224x224 five times. Here smaller images are halved fewer times, down to about 4x4, and the
earliest halvings are dropped first. The width scales all filters, including those of the last convolution.

References:
  Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, 2018.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.students.axes import Axis, GrowthSpec, Layer, Path, Space, Start, reads, writes
from ev3_distill.students.layers import BatchNorm, Conv
from ev3_distill.students.network import from_nnx
from ev3_distill.types import Network

BLOCKS = (1, 2, 3, 4, 3, 3, 1)

_STAGES = ((1, 16), (6, 24), (6, 32), (6, 64), (6, 96), (6, 160), (6, 320))  # expansion and filters of each stage
_HALVES = (1, 2, 3, 5)  # stages that start with stride 2; the stem does too
_MIN_PIXELS = 8  # along each side


class BlockSizes(NamedTuple):
    """Sizes of an inverted residual."""

    c_in: int
    c_out: int
    expansion: int
    strides: int

    @property
    def inner(self) -> int:
        """Channels of the depthwise convolution."""
        return self.expansion * self.c_in

    @property
    def residual(self) -> bool:
        """Whether the input is added to the output."""
        return self.strides == 1 and self.c_in == self.c_out


def _filters(width: int, stages: int) -> list[int]:
    """Numbers of filters of the stem, each stage and the last convolution, for a width in percent."""
    paper = (32, *(filters for _, filters in _STAGES[:stages]), 1280)
    return [max(8, round(c * width / 100 / 8) * 8) for c in paper]


def _halves(input_shape: Sequence[int]) -> set[int]:
    """Stages that start with stride 2; the stem is stage -1."""
    return set(((-1, *_HALVES)[::-1])[: min(min(input_shape[:2]).bit_length() - 3, 5)])


def _stages(input_shape: Sequence[int], filters: Sequence[int], blocks: Sequence[int]) -> list[list[BlockSizes]]:
    """The blocks of each stage."""
    halves = _halves(input_shape)
    return [
        [
            BlockSizes(c_in if j == 0 else c_out, c_out, _STAGES[i][0], 1 + (i in halves and j == 0))
            for j in range(count)
        ]
        for i, (c_in, c_out, count) in enumerate(zip(filters, filters[1:-1], blocks, strict=False))
    ]


def mobilenet_sizes(
    input_shape: Sequence[int], width: int, blocks: Sequence[int]
) -> tuple[int, list[int], list[list[BlockSizes]]]:
    """The stem's stride, the filters of the stem, each stage and the last convolution, and the sizes of each stage's blocks."""
    filters = _filters(width, len(blocks))
    return 1 + (-1 in _halves(input_shape)), filters, _stages(input_shape, filters, blocks)


class InvertedResidual(nnx.Module):
    """Expansion, depthwise convolution and projection without ReLU; added to the input if shapes agree."""

    def __init__(self, sizes: BlockSizes, *, rngs: nnx.Rngs):
        c_in, inner, c_out = sizes.c_in, sizes.inner, sizes.c_out
        self.expand = Conv(c_in, inner, 1, rngs=rngs) if sizes.expansion > 1 else None
        self.norm1 = BatchNorm(inner, rngs=rngs) if sizes.expansion > 1 else None
        self.depthwise = Conv(inner, inner, strides=sizes.strides, groups=inner, rngs=rngs)
        self.norm2 = BatchNorm(inner, rngs=rngs)
        self.project, self.norm3 = Conv(inner, c_out, 1, rngs=rngs), BatchNorm(c_out, rngs=rngs)
        self.residual = sizes.residual

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), O]."""
        y = x if self.expand is None or self.norm1 is None else nnx.relu6(self.norm1(self.expand(x)))
        y = nnx.relu6(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.residual else y


class MobileNet(nnx.Module):
    """Maps images [B, H, W, C] to logits [B, K]."""

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        width: int,
        blocks: Sequence[int],
        *,
        filters: Sequence[int] | None = None,
        rngs: nnx.Rngs,
    ):
        filters = _filters(width, len(blocks)) if filters is None else filters
        self.stem = Conv(input_shape[-1], filters[0], strides=1 + (-1 in _halves(input_shape)), rngs=rngs)
        self.stem_norm = BatchNorm(filters[0], rngs=rngs)
        self.stages = nnx.List(
            nnx.List(InvertedResidual(sizes, rngs=rngs) for sizes in stage)
            for stage in _stages(input_shape, filters, blocks)
        )
        self.last, self.last_norm = Conv(filters[-2], filters[-1], 1, rngs=rngs), BatchNorm(filters[-1], rngs=rngs)
        self.head = nnx.Linear(filters[-1], num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(inputs)[0]

    def features(self, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and features: `stage1`, ... [B, H, W, C] and `pooled` [B, D]."""
        x, features = nnx.relu6(self.stem_norm(self.stem(inputs))), {}
        for i, stage in enumerate(self.stages, 1):
            for block in stage:
                x = block(x)
            features[f"stage{i}"] = x
        x = nnx.relu6(self.last_norm(self.last(x)))
        pooled_BxD = features["pooled"] = x.mean((1, 2))
        return self.head(pooled_BxD), features


def mobilenet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: int = 50,
    blocks: Sequence[int] = BLOCKS,
    filters: Sequence[int] | None = None,
) -> Network:
    """A MobileNetV2-style network for images [H, W, C] of at least 8x8.

    Args:
      input_shape: of one image: H, W, C.
      num_classes: K.
      width: number of filters in percent of the paper's, rounded to multiples of 8.
      blocks: number of blocks of each stage, first to last; at most the paper's seven stages.
      filters: numbers of filters of the stem, each stage and the last convolution, multiples of 8; replaces `width`.

    Raises:
      InputError: the input is not an image or too small, there are too many stages, or the filters do not match them.
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < _MIN_PIXELS:
        raise InputError(
            f"a mobilenet's input is an image [H, W, C] of at least 8x8; got shape {list(input_shape)}: use an mlp"
        )
    if not 1 <= len(blocks) <= len(_STAGES):
        raise InputError(f"a mobilenet has 1 to 7 stages; got blocks={list(blocks)}: try blocks=1-2-3-4-3-3-1")
    if filters is not None and (len(filters) != len(blocks) + 2 or any(c < 8 or c % 8 for c in filters)):
        raise InputError(
            "a mobilenet's filters are multiples of 8, for the stem, each stage and the last convolution; "
            f"got filters={list(filters)} for blocks={list(blocks)}: try filters={_filters(width, len(blocks))}"
        )
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    size = {"width": width} if filters is None else {"filters": list(filters)}
    spec = {"family": "mobilenet", **size, "blocks": list(blocks), **shape}
    return from_nnx(lambda rngs: MobileNet(input_shape, num_classes, width, blocks, filters=filters, rngs=rngs), spec)


def mobilenet_growth(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: int = 50,
    blocks: Sequence[int] = BLOCKS,
    filters: Sequence[int] | None = None,
) -> GrowthSpec:
    """How a mobilenet can grow: wider, or by a block at the end of each stage whose last BatchNorm starts at zero.

    A block has a shortcut if its input and output have equally many filters, so equal numbers must stay equal, and others
    different. A larger `width` may break that. The filters that "wider" proposes, 1.5 times as many in multiples of 8, do not.
    """
    filters = _filters(width, len(blocks)) if filters is None else filters
    spaces = {"stem": Space(filters[0])}
    layers = {"stem": Layer(("stem",), (None, writes("stem"))), "stem_norm": Layer(("stem_norm",), (writes("stem"),))}
    space = "stem"
    for i, stage in enumerate(_stages(input_shape, filters, blocks)):
        for j, sizes in enumerate(stage):
            before, inner = space, f"stage{i + 1}.{j}.inner" if sizes.expansion > 1 else space
            space = before if sizes.residual else f"stage{i + 1}"
            spaces |= {inner: Space(sizes.inner), space: Space(sizes.c_out)}
            layers |= _layers(i, j, before, inner, space)
    spaces["last"] = Space(filters[-1])
    layers["last"] = Layer(("last",), (reads(space), writes("last")))
    layers["last_norm"] = Layer(("last_norm",), (writes("last"),))
    layers["head"] = Layer(("head",), (reads("last"), None))
    wider = [8 * -(-3 * c // 16) for c in filters]
    moves: dict[str, dict[str, Any]] = {
        "wider": {"width": None, "filters": wider},
        "deeper": {"blocks": [count + 1 for count in blocks]},
    }
    return GrowthSpec(spaces, layers, moves)


def _layers(i: int, j: int, before: str, inner: str, after: str) -> dict[str, Layer]:
    """The layers of block j of stage i, given the spaces of its input, its depthwise convolution and its output."""
    parts: dict[str, tuple[Axis, ...]] = {
        "depthwise": (writes(inner),),
        "norm2": (writes(inner),),
        "project": (reads(inner), writes(after)),
        "norm3": (writes(after),),
    }
    if inner != before:
        parts |= {"expand": (reads(before), writes(inner)), "norm1": (writes(inner),)}
    layers = {}
    for part, axes in parts.items():
        start: Start = None if j == 0 else "zero" if part == "norm3" else "drawn"
        path: Path = ("stages", i, j, part)
        layers[f"stage{i + 1}.{j}.{part}"] = Layer(path, axes, start)
    return layers
