"""Transformer encoder: the student for sequences whose order matters far apart. Its blocks are those of `students.vit` too.

References:
  Vaswani et al., Attention is all you need, 2017.
  Xiong et al., On layer normalization in the transformer architecture, 2020 (pre-norm).
"""

from collections.abc import Sequence

import jax
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.network import from_nnx
from ev3_distill.types import Network

_EXPANSION = 4  # of the hidden layer between attentions


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Attention has no biases: that of the keys would meet no gradient."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, use_bias=False, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, _EXPANSION * width, rngs=rngs)
        self.down = nnx.Linear(_EXPANSION * width, width, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns [B, T, D]."""
        x_BxTxD = x_BxTxD + self.attention(self.norm1(x_BxTxD))
        return x_BxTxD + self.down(nnx.gelu(self.up(self.norm2(x_BxTxD))))


class Encoder(nnx.Module):
    """Tokens [B, T, D] to logits [B, K]: learned positions, blocks, a norm, the mean over tokens, a linear head."""

    def __init__(self, tokens: int, width: int, depth: int, heads: int, num_classes: int, *, rngs: nnx.Rngs):
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, width)))
        self.blocks = nnx.List(Block(width, heads, rngs=rngs) for _ in range(depth))
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

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, width: int, depth: int, heads: int, *, rngs: nnx.Rngs
    ):
        length, channels = input_shape
        self.embed = nnx.Linear(channels, width, rngs=rngs)
        self.encoder = Encoder(length, width, depth, heads, num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(inputs)[0]

    def features(self, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and what they are made of, see `Encoder.features`."""
        return self.encoder.features(self.embed(inputs))


def check_heads(family: str, width: int, heads: int) -> None:
    """Raises InputError where the heads do not share the width evenly."""
    if width % heads:
        raise InputError(
            f"a {family}'s heads divide its width; got width={width}, heads={heads}: try heads=4,width={4 * -(-width // 4)}"
        )


def transformer(
    input_shape: Sequence[int], num_classes: int, *, width: int = 64, depth: int = 3, heads: int = 4
) -> Network:
    """A transformer encoder for sequences [L, C]; its cost grows with the square of L.

    Args:
      input_shape: of one sequence, L, C.
      num_classes: K.
      width: D.
      depth: blocks.
      heads: of each attention; they divide the width.

    Raises:
      InputError: no sequence, or heads that do not divide the width.
    """
    if len(input_shape) != 2:
        raise InputError(
            f"a transformer's input is a sequence [L, C]; got shape {list(input_shape)}: reshape it, or take a vit or mlp"
        )
    check_heads("transformer", width, heads)
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    spec = {"family": "transformer", "width": width, "depth": depth, "heads": heads, **shape}
    return from_nnx(lambda rngs: Transformer(input_shape, num_classes, width, depth, heads, rngs=rngs), spec)
