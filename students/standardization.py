"""Standardization of inputs: a part of the student, so that it is saved, certified and exported with it.

The spec of a standardized network has the entry `standardize`: lists `mean` and `scale` along the last axis of the inputs, of
their length or of length 1. The network computes (x - mean) / scale in float32 before its first layer. The lists hold float32
numbers, which JSON keeps exactly. `ev3_distill/data/statistics.py` computes them.

The entry `offset`, if there is one, holds what is subtracted from each column in float64 before the inputs become float32. The
network takes inputs from which it is subtracted already.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.types import Network, Variables

STANDARDIZE = "standardize"  # key of the spec
OFFSET = "offset"  # key within it


def standardized(network: Network, statistics: Mapping[str, Any] | None) -> Network:
    """The network, with its inputs standardized first.

    Args:
      network: in float32; its spec has `input_shape`.
      statistics: `mean` and `scale` of the last axis of the inputs, and their `offset`, which is only recorded; None leaves the
        network as it is.

    Raises:
      InputError: the statistics do not fit the inputs, or are not finite, or a scale is not positive.
    """
    if statistics is None:
        return network
    mean, scale = _checked(statistics, network.spec["input_shape"])

    def ready(inputs: jax.Array) -> jax.Array:
        x = inputs.astype(jnp.float32)
        return (x / 255 if inputs.dtype == jnp.uint8 else x) - mean

    def apply(
        variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        return network.apply(variables, ready(inputs) / scale, train=train, key=key)

    forward = network.features

    def features(
        variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Variables]:
        assert forward is not None
        return forward(variables, ready(inputs) / scale, train=train, key=key)

    recorded = {OFFSET: list(map(float, statistics[OFFSET]))} if OFFSET in statistics else {}
    spec = {**network.spec, STANDARDIZE: {"mean": mean.tolist(), "scale": scale.tolist(), **recorded}}
    return dataclasses.replace(network, apply=apply, spec=spec, features=None if forward is None else features)


def standardized_like(network: Network, spec: Mapping[str, Any]) -> Network:
    """The network, with its inputs standardized as those of the network of another spec are."""
    return standardized(network, spec.get(STANDARDIZE))


def offset_of(spec: Mapping[str, Any]) -> np.ndarray | None:
    """What is subtracted from inputs [B, F] before the network of a spec gets them: [F] float64; None: nothing."""
    offset = (spec.get(STANDARDIZE) or {}).get(OFFSET)
    return None if offset is None else np.asarray(offset, np.float64)


def _checked(statistics: Mapping[str, Any], input_shape: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale as float32 [F] or [1]."""
    mean, scale = (np.asarray(statistics.get(name, ()), np.float32) for name in ("mean", "scale"))
    lengths = (1, int(input_shape[-1]))
    fit = mean.shape == scale.shape and mean.ndim == 1 and mean.size in lengths
    if not fit or not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise InputError(
            f"standardization needs a finite mean and a positive scale for each of the {lengths[1]} entries of the last axis, "
            f"or one for all; got mean {list(mean.shape)} and scale {list(scale.shape)}: use the spec.json that the run wrote"
        )
    return mean, scale
