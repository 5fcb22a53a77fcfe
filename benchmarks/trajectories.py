"""Trajectories without EV3: one arm trains a fresh student for all its steps, without held-out decisions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.arms.optimizers import adamw, muon
from ev3_distill.arms.tuned_arm import TuningConfig, tuned_arm
from ev3_distill.arms.zoo import CONVOLUTIONAL_FAMILIES, MUON_RATE, RATE, up_and_down
from ev3_distill.config import EV3
from ev3_distill.core.assess import outputs_of
from ev3_distill.core.explore import draw_from, held_from
from ev3_distill.data import batches
from ev3_distill.runtime.compile import jit
from ev3_distill.types import Arm, Batch, Loss, Network, Pools, PyTree, Stretch, Variables


def whole_trajectory(network: Network, arm: Arm) -> Callable[[Pools, Any, Any], tuple[PyTree, Variables]]:
    """(pools, seed, steps) -> the arm's final state and proposal, from a fresh student; not compiled."""

    def train(pools: Pools, seed: Any, steps: Any) -> tuple[PyTree, Variables]:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        batch_size = EV3().batch_size
        draw = draw_from(pools.explore, batches.sampler(batch_size=batch_size), run_key)
        held = [held_from(pools.assess, run_key, batch_size=batch_size)] if arm.uses_held_out else []
        whole = Stretch(jnp.int32(0), jnp.int32(steps), jnp.float32(0), jnp.float32(1 / steps))
        return arm.propose(arm.init(network.init(init_key)), draw, whole, *held)

    return train


def bare_trajectory(network: Network, arm: Arm) -> Callable[[Pools, Any, Any], Variables]:
    """(pools, seed, steps) -> the proposal of the arm's uninterrupted trajectory; compiled."""
    train = whole_trajectory(network, arm)
    compiled: Callable[[Pools, Any, Any], Variables] = jit(lambda pools, seed, steps: train(pools, seed, steps)[1])
    return compiled


def arm_of(network: Network, loss: Loss) -> Arm:
    """An arm with a loss and the default arms' optimizer for the network."""
    return gradient_arm("bare", network.apply, loss, **_recipe(network))


def tuned_arm_of(network: Network, tune: Sequence[str], **options: Any) -> Arm:
    """The same with a tuned loss; `options` are those of `TuningConfig`."""
    return tuned_arm("tuned", network.apply, config=TuningConfig(tune=tuple(tune), **options), **_recipe(network))


def _recipe(network: Network) -> dict[str, Any]:
    if network.spec["family"] in CONVOLUTIONAL_FAMILIES:
        return {"optimizer": muon(MUON_RATE), "anneal": up_and_down}
    return {"optimizer": adamw(RATE)}


@functools.cache
def accuracy_of(network: Network) -> Callable[[Variables, Batch], jax.Array]:
    """(variables, split) -> accuracy; compiled."""

    @jit
    def accuracy(variables: Variables, split: Batch) -> jax.Array:
        logits = outputs_of(network.apply, variables, split.inputs, batch_size=EV3().eval_batch_size)
        return (logits.argmax(-1) == split.targets).mean()

    compiled: Callable[[Variables, Batch], jax.Array] = accuracy
    return compiled
