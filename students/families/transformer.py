"""Transformer encoder: the student for sequences whose order matters far apart. Its blocks are those of `students.vit` too.

References:
  Vaswani et al., Attention is all you need, 2017.
  Xiong et al., On layer normalization in the transformer architecture, 2020 (pre-norm).
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.students.growth.axes import Axis, Layer, Layout, Path, Space, Start, next_size, reads, writes
from ev3_distill.students.network import from_nnx
from ev3_distill.types import Network

_EXPANSION = 4  # of the hidden layer between attentions


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Attention has no biases: that of the keys would meet no gradient."""

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
    """Tokens [B, T, D] to logits [B, K]: learned positions, blocks, a norm, the mean over tokens, a linear head."""

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
        """Returns logits [B, K] and what they are made of: `block1`, ... [B, T, D] and `pooled` [B, D]."""
        x_BxTxD, found = x_BxTxD + self.positions[...], {}
        for i, block in enumerate(self.blocks, 1):
            x_BxTxD = found[f"block{i}"] = block(x_BxTxD)
        pooled_BxD = found["pooled"] = self.norm(x_BxTxD).mean(1)
        return self.head(pooled_BxD), found


class Transformer(nnx.Module):
    """Sequences [B, L, C] to logits [B, K]: a token is a linear map of one step."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, width: int, *, rngs: nnx.Rngs, **sizes: Any):
        """Takes the other sizes of `Encoder`, too."""
        length, channels = input_shape
        self.embed = nnx.Linear(channels, width, rngs=rngs)
        self.encoder = Encoder(length, num_classes, width=width, **sizes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(inputs)[0]

    def features(self, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and what they are made of, see `Encoder.features`."""
        return self.encoder.features(self.embed(inputs))


def check_heads(family: str, width: int, heads: int, head_size: int | None) -> None:
    """Raises InputError where the heads have no size of their own and do not share the width evenly."""
    if head_size is None and width % heads:
        raise InputError(
            f"a {family}'s heads divide its width; got width={width}, heads={heads}: try heads=4,width={4 * -(-width // 4)}"
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
      width: D.
      depth: blocks.
      heads: of each attention; they divide the width.
      head_size: of each head; without, the width is shared among them.

    Raises:
      InputError: no sequence, or heads that do not divide the width.
    """
    if len(input_shape) != 2:
        raise InputError(
            f"a transformer's input is a sequence [L, C]; got shape {list(input_shape)}: reshape it, or take a vit or mlp"
        )
    check_heads("transformer", width, heads, head_size)
    sizes: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "head_size": head_size}
    spec = {"family": "transformer", **sizes, "input_shape": list(input_shape), "num_classes": num_classes}
    if head_size is None:
        del spec["head_size"]
    return from_nnx(lambda rngs: Transformer(input_shape, num_classes, **sizes, rngs=rngs), spec)


def grow(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
    head_size: int | None = None,
) -> Layout:
    """How a transformer grows: see `encoder`."""
    return encoder(width=width, depth=depth, heads=heads, head_size=head_size)


def encoder(*, width: int, depth: int, heads: int, head_size: int | None) -> Layout:
    """How a network of `embed` and `encoder` grows: by width, heads, or blocks at its end whose branches end in zeros.

    A LayerNorm takes mean and variance over the width, which therefore doubles: every feature is copied equally often. The
    heads keep their size when they become more, and without a size of their own grow with the width.
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
            where: Path = ("encoder", "blocks", i, *path)
            layers[f"{name}.{part}"] = Layer(where, axes, start, f"block{i}.{part}" if i else None)
    moves = {"wider": {"width": 2 * width}, "deeper": {"depth": next_size(depth)}}
    return Layout(spaces, layers, {**moves, "heads": {"heads": next_size(heads), "head_size": size}})


_LAST = (("attention", "out"), ("down",))  # of the two branches of a block


def _parts(block: str) -> dict[tuple[str, ...], tuple[Axis, ...]]:
    """The axes of a block's layers, by path.

    A head's scores are sums over its size, divided by the root of it: of queries, which are divided among copies, and keys,
    which are copied.
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
