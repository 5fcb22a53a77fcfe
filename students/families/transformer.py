"""Transformer encoder, for sequences with long-range dependencies. `vit.py` uses its blocks too.

References:
  Vaswani et al., Attention is all you need, 2017.
  Xiong et al., On layer normalization in the transformer architecture, 2020 (pre-norm).
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.students.axes import Axis, GrowthSpec, Layer, Path, Space, Start, next_size, reads, writes
from ev3_distill.students.network import from_nnx
from ev3_distill.types import Network

_EXPANSION = 4  # of the hidden layer of each block's mlp


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Attention has no biases; that of the keys would get no gradient."""

    def __init__(self, width: int, heads: int, head_size: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, heads * head_size, use_bias=False, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(width, _EXPANSION * width, rngs=rngs)
        self.down = nnx.Linear(_EXPANSION * width, width, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns [B, T, D]."""
        x_BxTxD = x_BxTxD + self.attention(self.norm1(x_BxTxD))
        return x_BxTxD + self.down(nnx.gelu(self.up(self.norm2(x_BxTxD))))


class Encoder(nnx.Module):
    """Maps tokens [B, T, D] to logits [B, K]: learned positions, blocks, a norm, the mean over tokens, a linear head."""

    def __init__(
        self,
        tokens: int,
        num_classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        head_size: int | None,
        rngs: nnx.Rngs,
    ):
        size = head_size or width // heads
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, width)))
        self.blocks = nnx.List(Block(width, heads, size, rngs=rngs) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(x_BxTxD)[0]

    def features(self, x_BxTxD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and features: `block1`, ... [B, T, D] and `pooled` [B, D]."""
        x_BxTxD, features = x_BxTxD + self.positions[...], {}
        for i, block in enumerate(self.blocks, 1):
            x_BxTxD = features[f"block{i}"] = block(x_BxTxD)
        pooled_BxD = features["pooled"] = self.norm(x_BxTxD).mean(1)
        return self.head(pooled_BxD), features


class Transformer(nnx.Module):
    """Maps sequences [B, L, C] to logits [B, K]: a token is a linear map of one step."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, width: int, *, rngs: nnx.Rngs, **sizes: Any):
        """Initializes the network; `sizes` are the other sizes of `Encoder`."""
        length, channels = input_shape
        self.embed = nnx.Linear(channels, width, rngs=rngs)
        self.encoder = Encoder(length, num_classes, width=width, **sizes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(inputs)[0]

    def features(self, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and features; see `Encoder.features`."""
        return self.encoder.features(self.embed(inputs))


def check_heads(family: str, width: int, heads: int, head_size: int | None) -> None:
    """Raises InputError if the heads have no explicit size and do not divide the width."""
    if head_size is None and width % heads:
        raise InputError(
            f"the heads of a {family} must divide its width; got width={width}, heads={heads}: try "
            f"heads=4,width={4 * -(-width // 4)}"
        )


def transformer(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
    head_size: int | None = None,
) -> Network:
    """A transformer encoder for sequences [L, C]; its cost grows with the square of L.

    Args:
      input_shape: of one sequence, L, C.
      num_classes: K.
      width: number of features of a token, D.
      depth: number of blocks.
      heads: number of attention heads; must divide the width unless head_size is given.
      head_size: features of each head; by default width / heads.

    Raises:
      InputError: the input is not a sequence, or the heads do not divide the width.
    """
    if len(input_shape) != 2:
        raise InputError(
            f"a transformer's input is a sequence [L, C]; got shape {list(input_shape)}: save the array as "
            "`sequences` [N, L, C], or use a vit or mlp"
        )
    check_heads("transformer", width, heads, head_size)
    sizes: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "head_size": head_size}
    spec = {"family": "transformer", **sizes, "input_shape": list(input_shape), "num_classes": num_classes}
    if head_size is None:
        del spec["head_size"]
    return from_nnx(lambda rngs: Transformer(input_shape, num_classes, **sizes, rngs=rngs), spec)


def transformer_growth(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
    head_size: int | None = None,
) -> GrowthSpec:
    """How a transformer can grow; see `encoder_growth`."""
    return encoder_growth(width=width, depth=depth, heads=heads, head_size=head_size)


def encoder_growth(*, width: int, depth: int, heads: int, head_size: int | None) -> GrowthSpec:
    """How a network of `embed` and `encoder` can grow: in width, in heads, or by blocks at its end whose branches end in zeros.

    A LayerNorm averages over the width, which therefore doubles: every feature is copied equally often. When heads are added,
    all heads keep their size; without an explicit size, it grows with the width.
    """
    size = head_size or width // heads
    spaces, width_axis = {"width": Space(width, even=True)}, writes("width")
    layers = {
        "embed": Layer(("embed",), (None, width_axis)),
        "positions": Layer(("encoder", "positions"), (width_axis,)),
        "norm": Layer(("encoder", "norm"), (width_axis,)),
        "head": Layer(("encoder", "head"), (reads("width"), None)),
    }
    for i in range(depth):
        name = f"block{i + 1}"
        inner = {"heads": heads, "size": size, "hidden": _EXPANSION * width}
        spaces |= {f"{name}.{of}": Space(n) for of, n in inner.items()}
        for path, axes in _parts(name).items():
            start: Start = None if i == 0 else "zero" if path in _LAST else "drawn"
            part = ".".join(path)
            location: Path = ("encoder", "blocks", i, *path)
            layers[f"{name}.{part}"] = Layer(location, axes, start)
    moves = {"wider": {"width": 2 * width}, "deeper": {"depth": next_size(depth)}}
    return GrowthSpec(spaces, layers, {**moves, "heads": {"heads": next_size(heads), "head_size": size}})


_LAST = (("attention", "out"), ("down",))  # last layers of the two branches of a block


def _parts(block: str) -> dict[tuple[str, ...], tuple[Axis, ...]]:
    """The axes of a block's layers, by path.

    A head's scores are sums over its size, divided by the root of the size: queries are divided among copies, keys are copied.
    """
    heads, size, hidden = f"{block}.heads", f"{block}.size", f"{block}.hidden"
    return {
        ("norm1",): (writes("width"),),
        ("norm2",): (writes("width"),),
        ("attention", "query"): (reads("width"), writes(heads), reads(size, power=0.5)),
        ("attention", "key"): (reads("width"), writes(heads), writes(size)),
        ("attention", "value"): (reads("width"), writes(heads), writes(size)),
        ("attention", "out"): (reads(heads), reads(size), writes("width")),
        ("up",): (reads("width"), writes(hidden)),
        ("down",): (reads(hidden), writes("width")),
    }
