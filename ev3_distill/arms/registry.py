"""Arms from their names: of the zoo, of a task's losses, mixes of losses, losses on features, and arms that tune their loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import optax
from jax.sharding import Mesh

from ev3_distill.arms.evolution_arm import evolution_arm
from ev3_distill.arms.gradient import LossWithParams, gradient_arm
from ev3_distill.arms.optimizers import adamw, muon
from ev3_distill.arms.tuned_arm import TuningConfig, tuned_arm
from ev3_distill.arms.zoo import (
    ARMS,
    DEFAULT,
    EVOLUTION,
    EVOLUTION_RATE,
    EVOLVING,
    MUON_RATE,
    PEER,
    PEER_ARMS,
    RATE,
    Forward,
    Recipe,
    is_convolutional,
    kd4,
    round_late,
    up_and_down,
)
from ev3_distill.errors import InputError
from ev3_distill.students import feature_shapes
from ev3_distill.tasks.classification.feature_losses import FEATURE_LOSSES, with_features
from ev3_distill.tasks.classification.losses import LOSSES, mix
from ev3_distill.types import Apply, Arm, Loss, Network

Shapes = Mapping[str, Sequence[int]]  # of features by name, without the batch axis
Losses = Mapping[str, Callable[..., Loss]]  # loss factories by name
LABELS, TEACHER, BOTH = "labels", "teacher", "both"  # what an arm learns from
STRAIGHT = "-straight"  # ending of an arm's name: train with rounded weights from the start


def arms_named(
    apply: Apply,
    names: Sequence[str] = (),
    *,
    network: Network | None = None,
    teacher_features: Shapes | None = None,
    mesh: Mesh | None = None,
    losses: Losses | None = None,
) -> tuple[Arm, ...]:
    """Arms for a student's forward pass, by name; the default portfolio if no name is given.

    A name is one of these:
      An arm of the zoo, such as `kd4`.
      A loss of the run's task, such as `kd`.
      A weighted mix of such losses, with an optional learning rate: `0.7*kd+0.3*ce@0.003`.
      A loss on features beside that of kd4, of `feature_losses.FEATURE_LOSSES`, with an optional weight and learning rate:
        `at:stage3=layer3*500@0.003` draws the student's feature `stage3` to the teacher's `layer3`.
      What the arm tunes of kd4's loss, of `tuned_arm.TUNABLE`: `tuned-temperature-mix`.
    If the student is deployed as int8, the first three kinds train with rounded weights once ROUNDING_START of the budget is
    spent, or from the start with `-straight` at the end of the name.

    Args:
      apply: the student's forward pass.
      names: of the arms.
      network: the student. Needed for losses on features (with `input_shape` in its spec) and for rounding; it also decides the
        optimizer of an arm that tunes its loss.
      teacher_features: shapes [...] of the teacher's features of one example.
      mesh: of devices over which populations are spread, `Devices.step_mesh`.
      losses: of the run's task, by name; None for those of classification.

    Raises:
      InputError: a name is unknown, repeated or malformed; a feature does not exist or does not fit; or `-straight` for a
        student in float32.
    """
    names = tuple(names) or DEFAULT
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"arms need distinct names; got '{name}' twice: remove one")

    def named(name: str) -> Arm:
        if ":" in name:
            return _feature_arm(name, network, teacher_features or {})
        if name.startswith("tuned-"):
            return _tuned_arm(name, apply, network)
        if name in EVOLVING:
            return evolution_arm(name, apply, EVOLVING[name](), optax.adam(EVOLUTION_RATE), EVOLUTION, mesh=mesh)
        return _recipe(name.removesuffix(STRAIGHT), losses).arm(name, _forward(name, apply, network))

    return tuple(map(named, names))


def default_arms(apply: Apply) -> tuple[Arm, ...]:
    """The default portfolio for a student's forward pass."""
    return arms_named(apply)


def teacher_features_of(names: Sequence[str]) -> tuple[str, ...]:
    """The teacher's features that arms of these names learn from, each once.

    Raises:
      InputError: a name with a loss on features is malformed.
    """
    features = (_parse(name).teacher if ":" in name else PEER for name in names if ":" in name or name in PEER_ARMS)
    return tuple(dict.fromkeys(features))


def learns_from(name: str) -> str:
    """What an arm learns from: LABELS alone, the TEACHER, or BOTH, where labels decide how far it trusts the teacher.

    A loss on teacher outputs with a small part of labels counts as the teacher's.
    """
    name = name.removesuffix(STRAIGHT).partition("@")[0]
    if ":" in name or name.startswith("tuned-"):
        return TEACHER
    if name in EVOLVING or (name in ARMS and not ARMS[name].uses_teacher):
        return LABELS
    if name.startswith("trust"):
        return BOTH
    losses = {term.rpartition("*")[2] for term in name.split("+")}
    return LABELS if losses == {"ce"} else BOTH if "trusted_kd" in losses else TEACHER


def _recipe(name: str, task_losses: Losses | None) -> Recipe:
    """The recipe of an arm of the zoo, of a loss, or of a mix of losses."""
    if name in ARMS:
        return ARMS[name]
    if task_losses and name in task_losses:
        return Recipe(task_losses[name])
    return _mix_recipe(name, task_losses or LOSSES)


def _mix_recipe(text: str, losses: Losses) -> Recipe:
    """The recipe of a mix such as `0.7*kd+0.3*ce@0.01`."""
    formula, _, rate = text.partition("@")
    try:
        terms = [part.split("*") for part in formula.split("+")]
        mixed = mix(*[(float(weight), losses[loss]()) for weight, loss in terms])
        return Recipe(lambda: mixed, _positive(rate or str(RATE)))
    except (KeyError, ValueError):
        raise InputError(
            f"an arm is one of {', '.join((*ARMS, *EVOLVING))}, or a mix WEIGHT*LOSS+WEIGHT*LOSS@RATE of {', '.join(losses)}, "
            f"or LOSS:STUDENT_FEATURE=TEACHER_FEATURE of {', '.join(FEATURE_LOSSES)}; got '{text}': for example 0.7*kd+0.3*ce"
        ) from None


def _forward(name: str, apply: Apply, network: Network | None) -> Forward:
    """The forward pass of an arm: a student for int8 trains with rounded weights late, or from the start."""
    straight = None if network is None else network.straight
    if name.endswith(STRAIGHT) and straight is None:
        raise InputError(
            f"an arm that ends in {STRAIGHT} needs a student for int8; got '{name}' for a student in float32: add "
            f"--deploy int8, or remove {STRAIGHT}"
        )
    if straight is None:
        return Forward(apply)
    return Forward(straight, None if name.endswith(STRAIGHT) else round_late)


def _tuned_arm(name: str, apply: Apply, network: Network | None) -> Arm:
    """The arm of a name such as `tuned-temperature-mix`, with the default optimizer of the network's family."""
    config = TuningConfig(tune=tuple(name.split("-")[1:]))
    if network is not None and is_convolutional(network.spec):
        return tuned_arm(name, apply, muon(MUON_RATE), config, anneal=up_and_down)
    return tuned_arm(name, apply, adamw(RATE), config)


class _FeatureName(NamedTuple):
    """The parts of a name such as `at:stage3=layer3*500@0.003`."""

    kind: str
    student: str
    teacher: str
    weight: float | None
    rate: float


def _parse(text: str) -> _FeatureName:
    """Parse the name of an arm with a loss on features. A feature's name may contain any of these signs but the first =."""
    kind, _, rest = text.partition(":")
    rest, rate = _split_number(rest, "@")
    rest, weight = _split_number(rest, "*")
    student, _, teacher = rest.partition("=")
    try:
        if kind not in FEATURE_LOSSES or not student or not teacher:
            raise ValueError(text)
        return _FeatureName(kind, student, teacher, _positive(weight) if weight else None, _positive(rate or str(RATE)))
    except ValueError:
        raise InputError(
            f"an arm that learns features is LOSS:STUDENT_FEATURE=TEACHER_FEATURE*WEIGHT@RATE, with LOSS one of "
            f"{', '.join(FEATURE_LOSSES)} and positive numbers; got '{text}': for example at:stage3=layer3"
        ) from None


def _split_number(text: str, sign: str) -> tuple[str, str]:
    """Split off the number after the last `sign`; "" if there is none."""
    head, _, tail = text.rpartition(sign)
    try:
        float(tail)
    except ValueError:
        return text, ""
    return (head, tail) if head else (text, "")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _feature_arm(name: str, network: Network | None, teacher: Shapes) -> Arm:
    """The arm with kd4's loss and one on features."""
    query, student = _parse(name), {} if network is None else feature_shapes(network)
    if network is None or network.features is None or query.student not in student or query.teacher not in teacher:
        raise InputError(
            f"an arm learns a student's feature from a teacher's feature; got '{name}': the student has {_list(student)}; "
            f"the teacher has {_list(teacher)}"
        )
    feature_loss = FEATURE_LOSSES[query.kind]()
    loss = with_features(kd4(), feature_loss, student=query.student, teacher=query.teacher, weight=query.weight)
    params = feature_loss.begin(student[query.student], teacher[query.teacher])
    return gradient_arm(name, network.features, LossWithParams(loss, params), adamw(query.rate))


def _list(shapes: Shapes) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "none"
