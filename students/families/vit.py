"""Small vision transformer: patches are the tokens of an encoder. The default sizes are for images of 32x32.

References:
  Dosovitskiy et al., An image is worth 16x16 words: transformers for image recognition at scale, 2021.
  Beyer et al., Better plain ViT baselines for ImageNet-1k, 2022 (mean over tokens instead of a class token).
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.students.axes import GrowthSpec
from ev3_distill.students.families.transformer import Encoder, check_heads, encoder_growth
from ev3_distill.students.network import from_nnx
from ev3_distill.types import Network


class ViT(nnx.Module):
    """Maps images [B, H, W, C] to logits [B, K]: a token is a linear map of one patch."""

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, patch: int, width: int, *, rngs: nnx.Rngs, **sizes: Any
    ):
        """Initializes the network; `sizes` are the other sizes of `Encoder`."""
        rows, columns, channels = input_shape[0] // patch, input_shape[1] // patch, input_shape[2]
        self.patch = patch
        self.embed = nnx.Linear(patch * patch * channels, width, rngs=rngs)
        self.encoder = Encoder(rows * columns, num_classes, width=width, **sizes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(inputs)[0]

    def features(self, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and features; see `Encoder.features`."""
        batch, height, width, channels = inputs.shape
        rows, columns, p = height // self.patch, width // self.patch, self.patch
        patches = inputs.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)
        return self.encoder.features(self.embed(patches.reshape(batch, rows * columns, -1)))


def vit(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    head_size: int | None = None,
) -> Network:
    """A ViT for images [H, W, C].

    Args:
      input_shape: of one image, H, W, C.
      num_classes: K.
      patch: side of a patch in pixels; must divide H and W.
      width: number of features of a token, D.
      depth: number of blocks.
      heads: number of attention heads; must divide the width unless head_size is given.
      head_size: features of each head; by default width / heads.

    Raises:
      InputError: the input is not an image, or sizes do not divide.
    """
    if len(input_shape) != 3:
        raise InputError(
            f"a vit's input is an image [H, W, C]; got shape {list(input_shape)}: reshape it, or use an mlp"
        )
    if input_shape[0] % patch or input_shape[1] % patch:
        raise InputError(
            f"a vit's patch must divide height and width; got patch={patch} for shape {list(input_shape)}: "
            "use a common divisor of both"
        )
    check_heads("vit", width, heads, head_size)
    sizes: dict[str, Any] = {"patch": patch, "width": width, "depth": depth, "heads": heads, "head_size": head_size}
    spec = {"family": "vit", **sizes, "input_shape": list(input_shape), "num_classes": num_classes}
    if head_size is None:
        del spec["head_size"]
    return from_nnx(lambda rngs: ViT(input_shape, num_classes, **sizes, rngs=rngs), spec)


def vit_growth(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    head_size: int | None = None,
) -> GrowthSpec:
    """How a vit can grow: as its encoder; the patches stay the same."""
    return encoder_growth(width=width, depth=depth, heads=heads, head_size=head_size)._replace(fixed=("patch",))
