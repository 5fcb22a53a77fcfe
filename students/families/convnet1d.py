"""1-D convolutional network for sequences of one length, such as sensor readings and spectra.

References:
  Wang et al., Time series classification from scratch with deep neural networks: a strong baseline, 2017 (FCN).
"""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx

from ev3_distill.errors import InputError
from ev3_distill.students.axes import GrowthSpec, Layer, Space, next_size, reads, writes
from ev3_distill.students.layers import BatchNorm, Conv
from ev3_distill.students.network import from_nnx
from ev3_distill.types import Network

_SIZES = (8, 5, 3)  # of the kernels, first to last; further layers use the last size


class ConvNet1d(nnx.Module):
    """Maps sequences [B, L, C] to logits [B, K]: convolutions over time with BatchNorm and ReLU, a mean over time, a head."""

    def __init__(self, channels: int, num_classes: int, filters: Sequence[int], *, rngs: nnx.Rngs):
        sizes = itertools.chain(_SIZES, itertools.repeat(_SIZES[-1]))
        layers = list(zip((channels, *filters), filters, sizes, strict=False))
        self.convs = nnx.List(Conv(c_in, c_out, (1, size), rngs=rngs) for c_in, c_out, size in layers)
        self.norms = nnx.List(BatchNorm(c_out, rngs=rngs) for c_out in filters)
        self.head = nnx.Linear(filters[-1], num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        return self.features(inputs)[0]

    def features(self, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits [B, K] and features: `layer1`, ... [B, L, C] and `pooled` [B, D]."""
        x_Bx1xLxC, features = inputs[:, None], {}
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            x_Bx1xLxC = nnx.relu(norm(conv(x_Bx1xLxC)))
            features[f"layer{i}"] = x_Bx1xLxC[:, 0]
        pooled_BxD = features["pooled"] = x_Bx1xLxC.mean((1, 2))
        return self.head(pooled_BxD), features


def convnet1d(input_shape: Sequence[int], num_classes: int, *, filters: Sequence[int] = (64, 128, 64)) -> Network:
    """A fully convolutional network for sequences [L, C].

    Args:
      input_shape: of one sequence, L, C.
      num_classes: K.
      filters: number of filters of each layer, first to last; the paper uses 128-256-128.

    Raises:
      InputError: the input is not a sequence.
    """
    if len(input_shape) != 2:
        raise InputError(
            f"a convnet1d's input is a sequence [L, C]; got shape {list(input_shape)}: save the array as `sequences` "
            "[N, L, C], or use an mlp"
        )
    shape = {"input_shape": list(input_shape), "num_classes": num_classes}
    spec = {"family": "convnet1d", "filters": list(filters), **shape}
    return from_nnx(lambda rngs: ConvNet1d(input_shape[-1], num_classes, filters, rngs=rngs), spec)


def convnet1d_growth(
    input_shape: Sequence[int], num_classes: int, *, filters: Sequence[int] = (64, 128, 64)
) -> GrowthSpec:
    """How a convnet1d can grow: all layers get wider. A new layer could not keep the function, for lack of a shortcut."""
    names, layers = [f"layer{i}" for i in range(1, len(filters) + 1)], {}
    for i, name in enumerate(names):
        layers[f"{name}.conv"] = Layer(("convs", i), (reads(names[i - 1]) if i else None, writes(name)))
        layers[f"{name}.norm"] = Layer(("norms", i), (writes(name),))
    layers["head"] = Layer(("head",), (reads(names[-1]), None))
    spaces = dict(zip(names, map(Space, filters), strict=True))
    return GrowthSpec(spaces, layers, {"wider": {"filters": [next_size(n) for n in filters]}})
