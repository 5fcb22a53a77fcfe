"""The optimizers of the zoo of arms, with the hyperparameters that measurement left."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from ev3_distill.types import PyTree


def adamw(rate: float) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019): networks without convolutions learn fast with it.

    It sees all parameters as one vector, which is the same entry by entry: a step of a small network then launches a third
    fewer kernels and takes 4 % less time, and the moments are two arrays to compare, copy and save in place of two per layer.
    """
    return optax.flatten(optax.adamw(rate, weight_decay=1e-4))


def muon(rate: float) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): orthogonalised momentum for matrices and kernels, Adam at a quarter of the rate for the rest.

    Args:
      rate: of matrices; a kernel [h, w, C, O] counts as the matrix [h w C, O].
    """
    return optax.contrib.muon(rate, adam_learning_rate=rate / 4, muon_weight_dimension_numbers=_dimensions)


def _dimensions(params: PyTree) -> PyTree:
    """Which leaves are matrices, and how; None for those that Adam gets."""
    return jax.tree.map(_of_leaf, params)


def _of_leaf(leaf: jax.Array) -> MuonDimensionNumbers | None:
    return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,)) if leaf.ndim == 4 else None
