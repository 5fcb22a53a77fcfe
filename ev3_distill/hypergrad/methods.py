"""Hypergradients by any method: how hyperparameters of a training loss move the loss on held-out examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ev3_distill.hypergrad.evograd import evograd
from ev3_distill.hypergrad.many_steps import forward, unrolled
from ev3_distill.hypergrad.one_step import guided, jvp, t1t2
from ev3_distill.hypergrad.problem import HypergradientInfo, Problem, TrainLoss, ValLoss, is_finite
from ev3_distill.types import PyTree

METHODS: dict[str, Callable[..., tuple[PyTree, HypergradientInfo]]] = {
    "jvp": jvp,
    "guided": guided,
    "evograd": evograd,
    "t1t2": t1t2,
    "unrolled": unrolled,
    "forward": forward,
}


def hypergradient(
    key: jax.Array,
    params: PyTree,
    hyper: PyTree,
    train_loss: TrainLoss,
    val_loss: ValLoss,
    *,
    method: str = "jvp",
    **options: Any,
) -> tuple[PyTree, HypergradientInfo]:
    """Compute dV / dlambda by a method of METHODS; 0 where it is not finite.

    Args:
      key: of random copies; methods that draw none ignore it.
      params: theta, a pytree of floating arrays.
      hyper: lambda, a pytree of floating arrays.
      train_loss: l, (params, hyper, inner step) -> scalar. A hyperparameter that it ignores gets exactly 0.
      val_loss: V, params -> scalar.
      method: "jvp" (recommended), "guided" or "t1t2" for one step of an optimizer; "evograd" for random copies; "unrolled" or
        "forward" for several steps.
      **options: of the method; see its docstring. All but "evograd" need `optimizer`.

    Returns:
      (dV / dlambda, shaped like `hyper`, info).

    Raises:
      ValueError: there is no such method.

    References:
      Bohdal et al., EvoGrad. NeurIPS 2021, arXiv 2106.10575.
      Franceschi et al., Forward and reverse gradient-based hyperparameter optimization. ICML 2017, arXiv 1703.01785.
    """
    if method not in METHODS:
        raise ValueError(f"the method must be one of {', '.join(METHODS)}; got '{method}': use one of these")
    gradient, info = METHODS[method](key, Problem(params, hyper, train_loss, val_loss), **options)
    finite = info.finite & is_finite(gradient)
    gradient = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), gradient)
    return gradient, info._replace(finite=finite)
