"""The zoo of arms by name, and the default portfolio; `ev3-distill bench portfolio` measures it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ev3_distill.arms.evolution_arm import evolution_arm
from ev3_distill.arms.gradient import LossWithParams, gradient_arm
from ev3_distill.arms.optimizers import adamw, muon
from ev3_distill.arms.tuned_arm import TuningConfig, tuned_arm
from ev3_distill.errors import InputError
from ev3_distill.evolution import EvolutionConfig
from ev3_distill.students import feature_shapes
from ev3_distill.tasks.classification import example_scores, steering
from ev3_distill.tasks.classification import losses as class_losses
from ev3_distill.tasks.classification.feature_losses import FEATURE_LOSSES, with_features
from ev3_distill.tasks.metrics import find_metric
from ev3_distill.types import Apply, Arm, Loss, Network, Objective

RATE, MUON_RATE = 1e-2, 5e-2
ROUNDS = 0.75  # of the budget, from which on a student that is deployed rounded trains so
Shapes = Mapping[str, Sequence[int]]  # of features by name, without the batch axis


Shares = Callable[[jax.Array], jax.Array]  # of the budget that is spent -> of the rounding


class _Pass(NamedTuple):
    """The forward pass that an arm trains by."""

    apply: Apply
    share: Shares | None = None  # of a `Straight`'s rounding; None where all of it is rounded, or nothing


Make = Callable[[str, _Pass], Arm]


def _adamw(loss: Callable[[], Loss], rate: float = RATE) -> Make:
    return lambda name, by: gradient_arm(name, by.apply, loss(), adamw(rate), rounding=by.share)


def _muon(loss: Callable[[], Loss], rate: float = MUON_RATE) -> Make:
    return lambda name, by: gradient_arm(name, by.apply, loss(), muon(rate), anneal=up_and_down, rounding=by.share)


def _challenger(make: Make) -> Make:
    return lambda name, by: make(name, by)._replace(races=False)


def late(spent: jax.Array) -> jax.Array:
    """The share of rounding: none until ROUNDS of the budget is spent, then all."""
    return jnp.where(spent >= ROUNDS, 1.0, 0.0)


def up_and_down(spent: jax.Array) -> jax.Array:
    """A factor that rises within the first twentieth of the budget and then falls in a line, to zero at its end."""
    return jnp.clip(jnp.minimum(0.05 + spent / 0.05, (1 - spent) / 0.95), 0, 1)


def _evolving(objective: Callable[[], Objective]) -> Callable[[str, Apply, Mesh | None], Arm]:
    config = EvolutionConfig(pairs=32, sigma=0.02)
    return lambda name, apply, mesh: evolution_arm(name, apply, objective(), optax.adam(3e-3), config, mesh=mesh)


def _with_labels(teacher: Loss) -> Loss:
    return class_losses.mix((0.9, teacher), (0.1, class_losses.cross_entropy()))


def _by_peer(share: float) -> Callable[[], Loss]:
    return lambda: class_losses.taught_by(_with_labels(class_losses.kd(temperature=4.0)), PEER, share=share)


def _balanced(loss: Callable[[], Loss], power: float = 1.0) -> Callable[[], Loss]:
    return lambda: class_losses.balanced(loss(), power=power)


ARMS: dict[str, Make] = {
    "ce": _adamw(class_losses.cross_entropy),
    "ce-challenger": _challenger(_adamw(class_losses.cross_entropy)),
    "ce-slow": _adamw(class_losses.cross_entropy, 1e-3),
    "kd2": _adamw(lambda: _with_labels(class_losses.kd(temperature=2.0))),
    "kd2-challenger": _challenger(_adamw(lambda: _with_labels(class_losses.kd(temperature=2.0)))),
    "kd2-slow": _adamw(lambda: _with_labels(class_losses.kd(temperature=2.0)), 1e-3),
    "kd4": _adamw(lambda: _with_labels(class_losses.kd(temperature=4.0))),
    "kd4-fast": _adamw(lambda: _with_labels(class_losses.kd(temperature=4.0)), 3e-2),
    "mse": _adamw(class_losses.logit_mse),
    "dkd": _adamw(class_losses.dkd),
    "dist": _adamw(class_losses.dist),
    "dist-challenger": _challenger(_adamw(class_losses.dist)),
    "nkd": _adamw(class_losses.nkd),
    "standardized": _adamw(lambda: _with_labels(class_losses.standardized_kd())),
    "reverse-kl": _adamw(class_losses.reverse_kl),
    "jsd": _adamw(class_losses.jsd),
    "ce-muon": _muon(class_losses.cross_entropy),
    "ce-muon-challenger": _challenger(_muon(class_losses.cross_entropy)),
    "kd2-muon": _muon(lambda: _with_labels(class_losses.kd(temperature=2.0))),
    "kd4-muon": _muon(lambda: _with_labels(class_losses.kd(temperature=4.0))),
    "dist-muon": _muon(class_losses.dist),
    "ce-balanced": _adamw(_balanced(class_losses.cross_entropy)),
    "ce-half-balanced": _adamw(_balanced(class_losses.cross_entropy, 0.5)),
    "kd2-balanced": _adamw(_balanced(lambda: _with_labels(class_losses.kd(temperature=2.0)))),
    "kd4-balanced": _adamw(_balanced(lambda: _with_labels(class_losses.kd(temperature=4.0)))),
    "kd4-peer": _challenger(_adamw(_by_peer(1.0))),
    "kd4-ensemble": _challenger(_adamw(_by_peer(0.5))),
    "kd4-muon-peer": _challenger(_muon(_by_peer(1.0))),
    "kd4-muon-ensemble": _challenger(_muon(_by_peer(0.5))),
    "kd4-muon-balanced": _muon(_balanced(lambda: _with_labels(class_losses.kd(temperature=4.0)))),
}
EVOLVING: dict[str, Callable[[str, Apply, Mesh | None], Arm]] = {
    "es-accuracy": _evolving(lambda: example_scores.accuracy),
    "es-worst-class": _evolving(lambda: steering.goal("worst_class_accuracy", 0).score),
}
# One leads from the start: a race of some 50 steps each is won by losses that start fast (ce, then kd2), and all of the run
# would pay for it. See README. Whether another would do better now, labels alone among them, is asked now and then.
DEFAULT = ("kd4", "ce-challenger", "kd2-challenger", "dist-challenger")
CONVOLUTIONAL = ("kd4-muon", "ce-muon-challenger")
GUARDED = (
    "ce",
    "kd2",
    "kd4",
    "dist",
    "ce-balanced",
    "ce-half-balanced",
)  # where rare classes must count: these do race
# Peers challenge late, too: one that is no better than what a student will be starts it fast, and holds it back for long.
PEER = "peer"  # the feature that holds a peer's logits, another student's, in a search
PEERS, CONVOLUTIONAL_PEERS = ("kd4-peer", "kd4-ensemble"), ("kd4-muon-peer", "kd4-muon-ensemble")
BY_PEERS = PEERS + CONVOLUTIONAL_PEERS
CONVOLUTIONAL_FAMILIES = ("resnet", "mobilenet", "conv4", "convnet1d")
STRAIGHT = "-straight"  # ends the name of an arm that trains rounded all along what is deployed rounded


def default_names(spec: Mapping[str, Any], *, labels: bool = True, goals: Sequence[str] = ()) -> tuple[str, ...]:
    """The default portfolio of a network.

    Args:
      spec: the network's; its family decides.
      labels: whether there are any; without, arms that follow nothing else are left out.
      goals: metrics that the run steers by; for some a way to train that serves them joins.
    """
    convolutional = spec.get("family") in CONVOLUTIONAL_FAMILIES
    names: tuple[str, ...] = CONVOLUTIONAL if convolutional else DEFAULT
    if any((query := find_metric(name)) and query.row.balances_classes for name in goals):
        names = (*CONVOLUTIONAL, "kd4-muon-balanced") if convolutional else GUARDED
    return tuple(name for name in names if labels or not name.startswith("ce"))


def names_for_peers(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The arms that learn from another student: from it alone, and from its mean with the teacher."""
    return CONVOLUTIONAL_PEERS if spec.get("family") in CONVOLUTIONAL_FAMILIES else PEERS


def name_for_labels(spec: Mapping[str, Any]) -> str:
    """The arm that trains a network by labels alone."""
    return "ce-muon" if spec.get("family") in CONVOLUTIONAL_FAMILIES else "ce"


def arms_named(
    apply: Apply,
    names: Sequence[str] = (),
    *,
    network: Network | None = None,
    teacher_features: Shapes | None = None,
    mesh: Mesh | None = None,
    losses: Mapping[str, Callable[..., Loss]] | None = None,
) -> tuple[Arm, ...]:
    """Arms for a student's forward pass, by name; the default portfolio where none is named.

    Args:
      apply: the student's.
      names: of the zoo, or weighted mixes of losses by their names in `losses.LOSSES`, such as `0.7*kd+0.3*ce`, with a
        learning rate of their own after an @ if wanted: `0.5*dkd+1*ce@0.003`. Or kd4's loss with one on features, by its
        name in `features.FEATURE_LOSSES`: `at:stage3=layer3` draws the student's `stage3` to the teacher's `layer3`; its
        own weight after a * and rate after an @ if wanted, `at:stage3=layer3*500@0.003`. Or kd4's loss with what follows the
        loss on assess while it trains, of `tuned.TUNABLE`: `tuned-temperature-mix`. Of a student that is deployed rounded,
        the first two kinds train with rounded weights once ROUNDS of the budget is spent, and with `-straight` behind their
        names all along.
      network: the student, for losses on features (its spec must tell its `input_shape`), for the optimizer of one that
        tunes its loss, and for training rounded.
      teacher_features: shapes [...] of what the teacher shows of one example.
      mesh: over whose devices populations are spread, `Devices.step_mesh`.
      losses: of the run's task, by name; a name that is no arm of the zoo but one of these trains with that loss.

    Raises:
      InputError: an unknown name, one given twice, a mix that is none, a feature that is not there or does not fit, or
        training rounded for a student that is not.
    """
    names = tuple(names) or DEFAULT
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"arms need distinct names; got '{name}' twice: name it once")

    def named(name: str) -> Arm:
        if ":" in name:
            return _featured(name, network, teacher_features or {})
        if name.startswith("tuned-"):
            return _tuned(name, apply, network)
        if name in EVOLVING:
            return EVOLVING[name](name, apply, mesh)
        kind = name.removesuffix(STRAIGHT)
        of_task = {kind: _adamw(losses[kind])} if losses and kind in losses else {}
        make = {**of_task, **ARMS}.get(kind) or _mixed(kind)
        return make(name, _pass(name, apply, network))

    return tuple(map(named, names))


def features_asked(names: Sequence[str]) -> tuple[str, ...]:
    """The teacher's features that arms of these names learn from, each once.

    Raises:
      InputError: what should be a loss on features is none.
    """
    of_names = (_asked(name).teacher if ":" in name else PEER for name in names if ":" in name or name in BY_PEERS)
    return tuple(dict.fromkeys(of_names))


class _Asked(NamedTuple):
    """An arm's name, taken apart."""

    kind: str
    student: str
    teacher: str
    weight: float | None
    rate: float


def _asked(text: str) -> _Asked:
    """What `at:stage3=layer3*500@0.003` asks for; a feature's own name may hold any of these signs but the first =."""
    kind, _, rest = text.partition(":")
    rest, rate = _number_off(rest, "@")
    rest, weight = _number_off(rest, "*")
    student, _, teacher = rest.partition("=")
    try:
        if kind not in FEATURE_LOSSES or not student or not teacher:
            raise ValueError(text)
        return _Asked(kind, student, teacher, _positive(weight) if weight else None, _positive(rate or str(RATE)))
    except ValueError:
        raise InputError(
            f"an arm that learns features is LOSS:STUDENT_FEATURE=TEACHER_FEATURE*WEIGHT@RATE, LOSS one of "
            f"{', '.join(FEATURE_LOSSES)}, weight and rate above 0 if given; got '{text}': for example at:stage3=layer3"
        ) from None


def _number_off(text: str, sign: str) -> tuple[str, str]:
    """A text and the number after its last sign, "" where there is none."""
    head, _, tail = text.rpartition(sign)
    try:
        float(tail)
    except ValueError:
        return text, ""
    return (head, tail) if head else (text, "")


def _tuned(name: str, apply: Apply, network: Network | None) -> Arm:
    """The arm of a name such as `tuned-temperature-mix`, with the optimizer that its kind of network learns by."""
    config = TuningConfig(tune=tuple(name.split("-")[1:]))
    if network is not None and network.spec.get("family") in CONVOLUTIONAL_FAMILIES:
        return tuned_arm(name, apply, muon(MUON_RATE), config, anneal=up_and_down)
    return tuned_arm(name, apply, adamw(RATE), config)


def _pass(name: str, apply: Apply, network: Network | None) -> _Pass:
    """What an arm of that name trains by: what is deployed rounded trains rounded late, or all along."""
    straight = None if network is None else network.straight
    if name.endswith(STRAIGHT) and straight is None:
        raise InputError(
            f"an arm that ends in {STRAIGHT} trains rounded what is deployed rounded; got '{name}' for a student in float32: "
            f"add --deploy int8, or leave {STRAIGHT} out"
        )
    if straight is None:
        return _Pass(apply)
    return _Pass(straight, None if name.endswith(STRAIGHT) else late)


def _featured(name: str, network: Network | None, teacher: Shapes) -> Arm:
    """The arm of kd4's loss and one on features."""
    asked, student = _asked(name), {} if network is None else feature_shapes(network)
    if network is None or network.features is None or asked.student not in student or asked.teacher not in teacher:
        raise InputError(
            f"an arm learns a feature that the student has from one that the teacher has; got '{name}': the student has "
            f"{_listed(student)}; the teacher has {_listed(teacher)}"
        )
    feature_loss = FEATURE_LOSSES[asked.kind]()
    logits_loss = _with_labels(class_losses.kd(temperature=4.0))
    loss = with_features(logits_loss, feature_loss, student=asked.student, teacher=asked.teacher, weight=asked.weight)
    extra = feature_loss.begin(student[asked.student], teacher[asked.teacher])
    return gradient_arm(name, network.features, LossWithParams(loss, extra), adamw(asked.rate))


def _listed(shapes: Shapes) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "none"


def _mixed(text: str) -> Make:
    """The arm of a mix such as `0.7*kd+0.3*ce@0.01`."""
    formula, _, rate = text.partition("@")
    try:
        terms = [part.split("*") for part in formula.split("+")]
        weighted = [(float(weight), class_losses.LOSSES[loss]()) for weight, loss in terms]
        mixed = class_losses.mix(*weighted)
        return _adamw(lambda: mixed, _positive(rate or str(RATE)))
    except (KeyError, ValueError):
        known = ", ".join((*ARMS, *EVOLVING))
        raise InputError(
            f"an arm is one of {known}, or a mix WEIGHT*LOSS+WEIGHT*LOSS@RATE of {', '.join(class_losses.LOSSES)}, "
            f"or LOSS:STUDENT_FEATURE=TEACHER_FEATURE of {', '.join(FEATURE_LOSSES)}; got '{text}': for example 0.7*kd+0.3*ce"
        ) from None


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def default_arms(apply: Apply) -> tuple[Arm, ...]:
    """The default portfolio for a student's forward pass."""
    return arms_named(apply)
