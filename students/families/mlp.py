"""Multilayer perceptron with ReLU, for vectors and very small images."""

import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx

from ev3_distill.students.axes import GrowthSpec, Layer, Space, next_size, reads, writes
from ev3_distill.students.network import from_nnx
from ev3_distill.types import Network


class MLP(nnx.Module):
    """Maps inputs [B, ...], flattened to [B, D], to logits [B, K] through ReLU layers."""

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
        self.layers = nnx.List(nnx.Linear(n_in, n_out, rngs=rngs) for n_in, n_out in itertools.pairwise(sizes))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits [B, K]."""
        x_BxD = inputs.reshape(inputs.shape[0], -1)
        for layer in self.layers[:-1]:
            x_BxD = nnx.relu(layer(x_BxD))
        return self.layers[-1](x_BxD)


def mlp(input_shape: Sequence[int], num_classes: int, *, hidden: Sequence[int] = (32,)) -> Network:
    """An MLP with hidden layers of the given widths.

    Args:
      input_shape: of one example, without the batch axis.
      num_classes: K.
      hidden: widths of the hidden layers, first to last; without any, a linear classifier.
    """
    sizes = [math.prod(input_shape), *hidden, num_classes]
    spec = {"family": "mlp", "hidden": list(hidden), "input_shape": list(input_shape), "num_classes": num_classes}
    return from_nnx(lambda rngs: MLP(sizes, rngs=rngs), spec)


def mlp_growth(input_shape: Sequence[int], num_classes: int, *, hidden: Sequence[int] = (32,)) -> GrowthSpec:
    """How an mlp can grow: all hidden layers get wider, or one more is added, first as the identity on the last ReLU's output.

    A linear classifier has no ReLU and cannot grow.
    """
    names = [f"hidden{i}" for i in range(1, len(hidden) + 1)]
    ends = [reads(name) for name in names]
    layers = {
        name: Layer(("layers", i), (ends[i - 1] if i else None, writes(name)), start="identity" if i else None)
        for i, name in enumerate(names)
    }
    layers["head"] = Layer(("layers", len(hidden)), (ends[-1] if ends else None, None))
    moves = {"wider": {"hidden": [next_size(n) for n in hidden]}, "deeper": {"hidden": [*hidden, *hidden[-1:]]}}
    spaces = {name: Space(size, drawn=True) for name, size in zip(names, hidden, strict=True)}
    return GrowthSpec(spaces, layers, moves if hidden else {})
