"""The zoo of arms by name, and the default portfolio; `ev3-distill bench portfolio` measures it."""

from collections.abc import Callable, Sequence

import optax

from ev3_distill import losses
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.errors import InputError
from ev3_distill.types import Apply, Arm, Loss


def _adamw(loss: Callable[[], Loss], rate: float = 1e-2) -> Callable[[str, Apply], Arm]:
    return lambda name, apply: gradient_arm(name, apply, loss(), optax.adamw(rate, weight_decay=1e-4))


def _with_labels(teacher: Loss) -> Loss:
    return losses.mix((0.9, teacher), (0.1, losses.cross_entropy()))


ARMS: dict[str, Callable[[str, Apply], Arm]] = {
    "ce": _adamw(losses.cross_entropy),
    "ce-slow": _adamw(losses.cross_entropy, 1e-3),
    "kd2": _adamw(lambda: _with_labels(losses.kd(temperature=2.0))),
    "kd2-slow": _adamw(lambda: _with_labels(losses.kd(temperature=2.0)), 1e-3),
    "kd4": _adamw(lambda: _with_labels(losses.kd(temperature=4.0))),
    "kd4-fast": _adamw(lambda: _with_labels(losses.kd(temperature=4.0)), 3e-2),
    "mse": _adamw(losses.logit_mse),
    "dkd": _adamw(losses.dkd),
    "dist": _adamw(losses.dist),
    "nkd": _adamw(losses.nkd),
    "standardized": _adamw(lambda: _with_labels(losses.standardized_kd())),
    "reverse-kl": _adamw(losses.reverse_kl),
    "jsd": _adamw(losses.jsd),
}
DEFAULT = ("ce", "kd2", "kd4", "dist")


def arms_named(apply: Apply, names: Sequence[str] = ()) -> tuple[Arm, ...]:
    """Arms for a student's forward pass, by name; the default portfolio where none is named.

    Args:
      apply: the student's.
      names: of the zoo, or weighted mixes of losses by their names in `losses.LOSSES`, such as `0.7*kd+0.3*ce`, with a
        learning rate of their own after an @ if wanted: `0.5*dkd+1*ce@0.003`.

    Raises:
      InputError: an unknown name, one given twice, or a mix that is none.
    """
    names = tuple(names) or DEFAULT
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"arms need distinct names; got '{name}' twice: name it once")
    return tuple((ARMS[name] if name in ARMS else _mixed(name))(name, apply) for name in names)


def _mixed(text: str) -> Callable[[str, Apply], Arm]:
    """The arm of a mix such as `0.7*kd+0.3*ce@0.01`."""
    formula, _, rate = text.partition("@")
    try:
        terms = [part.split("*") for part in formula.split("+")]
        weighted = [(float(weight), losses.LOSSES[loss]()) for weight, loss in terms]
        mixed = losses.mix(*weighted)
        return _adamw(lambda: mixed, _positive(rate or "0.01"))
    except (KeyError, ValueError):
        raise InputError(
            f"an arm is one of {', '.join(ARMS)}, or a mix WEIGHT*LOSS+WEIGHT*LOSS@RATE of {', '.join(losses.LOSSES)}; "
            f"got '{text}': for example 0.7*kd+0.3*ce"
        ) from None


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def default_arms(apply: Apply) -> tuple[Arm, ...]:
    """The default portfolio for a student's forward pass."""
    return arms_named(apply)
