"""The optimizers of the zoo of arms, with the hyperparameters that measurement left."""

import jax
import optax
from jax.tree_util import KeyPath
from optax.contrib import MuonDimensionNumbers

from ev3_distill.types import PyTree

SMALL = 10_000  # parameters


def adamw(rate: float) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019): networks without convolutions learn fast with it."""
    return _flat_if_small(optax.adamw(rate, weight_decay=1e-4))


def sgd(rate: float) -> optax.GradientTransformation:
    """Stochastic gradient descent with Nesterov momentum 0.9 and weight decay 5e-4."""
    return _flat_if_small(optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9, nesterov=True)))


def muon(rate: float) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): orthogonalised momentum for matrices and kernels, Adam at a quarter of the rate for the rest.

    Args:
      rate: of matrices. In a network with convolutions these are its kernels [h, w, C, O], each as the matrix [h w C, O]; in
        others, kernels [I, O].
    """
    return optax.contrib.muon(rate, adam_learning_rate=rate / 4, muon_weight_dimension_numbers=_dimensions)


def _flat_if_small(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that works entry by entry, on one vector if there are fewer than `SMALL` entries.

    A step of a small network then launches a third fewer kernels and takes 4 % less time. Of a large one, XLA:CPU may
    compute the sums over the batch again for each entry of the vector: measured with AdamW on two cores, an MLP of 85,002
    parameters took 1.1 or 9.7 ms a step with one vector, which differed between runs of one program, and 1.0 ms without.
    """
    flat = optax.flatten(optimizer)

    def of(tree: PyTree) -> optax.GradientTransformation:
        return flat if sum(leaf.size for leaf in jax.tree.leaves(tree)) < SMALL else optimizer

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        return of(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: of(params).init(params), update)


def _dimensions(params: PyTree) -> PyTree:
    """Which leaves are matrices, and how; None for those that Adam gets."""
    rank = 4 if any(leaf.ndim == 4 for leaf in jax.tree.leaves(params)) else 2

    def of_leaf(path: KeyPath, leaf: jax.Array) -> MuonDimensionNumbers | None:
        is_matrix = leaf.ndim == rank and (rank == 4 or "kernel" in jax.tree_util.keystr(path[-1:]))
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,)) if is_matrix else None

    return jax.tree_util.tree_map_with_path(of_leaf, params)
