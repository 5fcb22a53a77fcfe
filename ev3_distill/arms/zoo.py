"""The zoo: every arm for classification by name, and the default portfolios. `ev3-distill bench portfolio` measures them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.arms.gradient import Schedule, gradient_arm
from ev3_distill.arms.optimizers import adamw, muon, sgd
from ev3_distill.evolution import EvolutionConfig
from ev3_distill.tasks.classification import example_scores, losses, steering
from ev3_distill.tasks.metrics import find_metric
from ev3_distill.types import Apply, Arm, Loss, Objective

RATE, MUON_RATE, SGD_RATE = 1e-2, 5e-2, 1e-1  # learning rates of AdamW, Muon and SGD
EVOLUTION_RATE = 3e-3
EVOLUTION = EvolutionConfig(pairs=32, sigma=0.02)
ROUNDING_START = 0.75  # fraction of the budget after which a student for int8 trains with rounded weights


def round_late(spent: jax.Array) -> jax.Array:
    """Schedule of rounding: none until ROUNDING_START of the budget is spent, then all."""
    return jnp.where(spent >= ROUNDING_START, 1.0, 0.0)


def up_and_down(spent: jax.Array) -> jax.Array:
    """Schedule that rises linearly over the first twentieth of the budget, then falls linearly to 0 at its end."""
    return jnp.clip(jnp.minimum(0.05 + spent / 0.05, (1 - spent) / 0.95), 0, 1)


class Forward(NamedTuple):
    """The forward pass that an arm trains with."""

    apply: Apply
    rounding: Schedule | None = None  # of the weights; None if the forward pass rounds always or never


class Recipe(NamedTuple):
    """A gradient arm of the zoo: a loss and an optimizer."""

    loss: Callable[[], Loss]
    rate: float = RATE
    optimizer: str = "adamw"  # or sgd; or muon, with the schedule `up_and_down`
    races: bool = True  # whether it takes part in the race that starts a run; otherwise it waits to be asked
    uses_teacher: bool = True  # whether the loss needs a teacher; otherwise it needs labels

    def arm(self, name: str, forward: Forward) -> Arm:
        """The arm of this name."""
        optimizer = {"adamw": adamw, "sgd": sgd, "muon": muon}[self.optimizer](self.rate)
        anneal = up_and_down if self.optimizer == "muon" else None
        arm = gradient_arm(name, forward.apply, self.loss(), optimizer, anneal=anneal, rounding=forward.rounding)
        return arm._replace(races=self.races, starts_fast=anneal is None)


def with_labels(teacher: Loss) -> Loss:
    """A loss on teacher outputs, mixed with a tenth of cross-entropy by labels."""
    return losses.mix((0.9, teacher), (0.1, losses.cross_entropy()))


def kd2() -> Loss:
    """Distillation at temperature 2, with labels."""
    return with_labels(losses.kd(temperature=2.0))


def kd4() -> Loss:
    """Distillation at temperature 4, with labels."""
    return with_labels(losses.kd(temperature=4.0))


def _from_peer(share: float) -> Callable[[], Loss]:
    return lambda: losses.taught_by(kd4(), PEER, share=share)


def _trusted(temperature: float) -> Callable[[], Loss]:
    return lambda: losses.trusted_kd(temperature=temperature)


def _balanced(loss: Callable[[], Loss], power: float = 1.0) -> Callable[[], Loss]:
    return lambda: losses.balanced(loss(), power=power)


# A peer is another student of a search; its logits are teacher outputs of this name. Arms that learn from a peer wait
# to be asked: a peer no better than the student will be gives it a fast start, and holds it back for long.
PEER = "peer"
ARMS: dict[str, Recipe] = {
    "ce": Recipe(losses.cross_entropy, uses_teacher=False),
    "ce-slow": Recipe(losses.cross_entropy, 1e-3, uses_teacher=False),
    "kd2": Recipe(kd2),
    "kd2-slow": Recipe(kd2, 1e-3),
    "kd4": Recipe(kd4),
    "kd4-fast": Recipe(kd4, 3e-2),
    "mse": Recipe(losses.logit_mse),
    "dkd": Recipe(losses.dkd),
    "dist": Recipe(losses.dist),
    "nkd": Recipe(losses.nkd),
    "standardized": Recipe(lambda: with_labels(losses.standardized_kd())),
    "reverse-kl": Recipe(losses.reverse_kl),
    "jsd": Recipe(losses.jsd),
    "ce-muon": Recipe(losses.cross_entropy, MUON_RATE, "muon", uses_teacher=False),
    "ce-sgd": Recipe(losses.cross_entropy, SGD_RATE, "sgd", uses_teacher=False),
    "kd2-sgd": Recipe(kd2, SGD_RATE, "sgd"),
    "trust": Recipe(_trusted(4.0)),
    "trust-sgd": Recipe(_trusted(2.0), SGD_RATE, "sgd"),
    "trust-muon": Recipe(_trusted(4.0), MUON_RATE, "muon"),
    "kd2-muon": Recipe(kd2, MUON_RATE, "muon"),
    "kd4-muon": Recipe(kd4, MUON_RATE, "muon"),
    "dist-muon": Recipe(losses.dist, MUON_RATE, "muon"),
    "ce-balanced": Recipe(_balanced(losses.cross_entropy), uses_teacher=False),
    "ce-half-balanced": Recipe(_balanced(losses.cross_entropy, 0.5), uses_teacher=False),
    "kd2-balanced": Recipe(_balanced(kd2)),
    "kd4-balanced": Recipe(_balanced(kd4)),
    "kd4-peer": Recipe(_from_peer(1.0), races=False),
    "kd4-ensemble": Recipe(_from_peer(0.5), races=False),
    "kd4-muon-peer": Recipe(_from_peer(1.0), MUON_RATE, "muon", races=False),
    "kd4-muon-ensemble": Recipe(_from_peer(0.5), MUON_RATE, "muon", races=False),
    "kd4-muon-balanced": Recipe(_balanced(kd4), MUON_RATE, "muon"),
    "ce-sgd-balanced": Recipe(_balanced(losses.cross_entropy), SGD_RATE, "sgd", uses_teacher=False),
}
EVOLVING: dict[str, Callable[[], Objective]] = {  # evolution arms, by what they improve
    "es-accuracy": lambda: example_scores.accuracy,
    "es-worst-class": lambda: steering.goal("worst_class_accuracy", 0).score,
}
# Arms that differ in loss and optimizer race, labels alone among them. With guards on rare classes, balanced losses do, too.
# The SGD arms alone race if the budget is short: both start fast, and one of them needs no teacher. The first of them, and of
# the convolutional arms, leads after a short race that shows little: it trusts the teacher only where the labels agree.
DEFAULT = ("kd4-muon", "trust-sgd", "ce-sgd", "kd4")
CONVOLUTIONAL = ("trust-muon", "ce-muon")
BALANCED = ("ce-sgd-balanced", "kd4-muon-balanced")
CONVOLUTIONAL_BALANCED = ("kd4-muon-balanced",)
MLP_PEER_ARMS = ("kd4-peer", "kd4-ensemble")
CONVOLUTIONAL_PEER_ARMS = ("kd4-muon-peer", "kd4-muon-ensemble")
PEER_ARMS = MLP_PEER_ARMS + CONVOLUTIONAL_PEER_ARMS
CONVOLUTIONAL_FAMILIES = ("resnet", "mobilenet", "conv4", "convnet1d")


def is_convolutional(spec: Mapping[str, Any]) -> bool:
    """Whether a network of this spec trains with Muon by default."""
    return spec.get("family") in CONVOLUTIONAL_FAMILIES


def default_arm_names(spec: Mapping[str, Any], *, labels: bool = True, goals: Sequence[str] = ()) -> tuple[str, ...]:
    """The default portfolio of a network.

    Args:
      spec: of the network; its family decides.
      labels: whether there are any; if not, arms that learn from labels only are left out.
      goals: metrics that the run steers by; for those that balance classes, arms with balanced losses are added.
    """
    convolutional = is_convolutional(spec)
    names: tuple[str, ...] = CONVOLUTIONAL if convolutional else DEFAULT
    if any((query := find_metric(name)) and query.row.balances_classes for name in goals):
        names += CONVOLUTIONAL_BALANCED if convolutional else BALANCED
    return tuple(name for name in names if labels or ARMS[name].uses_teacher)


def peer_arm_names(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The arms that learn from another student: from it alone, and from its mean with the teacher."""
    return CONVOLUTIONAL_PEER_ARMS if is_convolutional(spec) else MLP_PEER_ARMS


def label_arm_name(spec: Mapping[str, Any]) -> str:
    """The arm that trains a network with labels only."""
    return "ce-muon" if is_convolutional(spec) else "ce"
