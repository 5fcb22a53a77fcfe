"""`ensemble:A,B,...`, the mean of the members' logits, and `ensemble-prob:A,B,...`, the logarithm of their mean probability.

Members' logits may have different scales, by which the first weighs them; the second gives each member one vote.
"""

import re
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax, logsumexp

from ev3_distill.errors import InputError
from ev3_distill.teachers.loading import digest_of
from ev3_distill.teachers.teacher import Outputs, Request, Teacher


def mean_of_logits(place: str, request: Request) -> Teacher:
    """The teacher whose logits are the mean of its members'.

    The preprocessing options apply to each member; what differs between them stands in the files beside them. Members are
    brought to the data's class order before. Features of members are not passed on.

    Raises:
      InputError: fewer than two members, a member that is recorded or an ensemble itself, or one that cannot be loaded.
    """
    return _ensemble(place, request, probabilities=False)


def mean_of_probabilities(place: str, request: Request) -> Teacher:
    """The teacher whose softmax is the mean of its members'; else as `mean_of_logits`."""
    return _ensemble(place, request, probabilities=True)


def _ensemble(place: str, request: Request, *, probabilities: bool) -> Teacher:
    texts = re.split(f",(?=(?:{'|'.join(request.kinds)}):)", place)  # names of outputs have commas too
    if len(texts) < 2:
        raise InputError(
            f"an ensemble is two teachers or more, KIND:PLACE,KIND:PLACE,...; got '{request.source}': name another member"
        )
    for text in texts:
        if text.startswith("logits:"):
            raise InputError(
                f"an ensemble runs its members; got {text} in '{request.source}', which is recorded: average the logits "
                "beforehand and give logits:FILE alone"
            )
        if text.startswith("ensemble"):
            raise InputError(f"an ensemble's members are single teachers; got {text}: name its members here instead")
    if request.load is None:
        raise ValueError("an ensemble needs load=, which loads a member")
    members = [request.load(text) for text in texts]
    _check_alike(members)
    params = [member.params for member in members]
    return Teacher(
        source=request.source,
        digest=digest_of([f"ensemble {probabilities}", *(member.digest for member in members)]),
        outputs=lambda inputs: {"logits": _mean([member.outputs(inputs) for member in members], probabilities)},
        num_classes=next((member.num_classes for member in members if member.num_classes), None),
        class_names=members[0].class_names,
        params=None if None in params else sum(number or 0 for number in params),
        members=tuple(members),
    )


def _check_alike(members: Sequence[Teacher]) -> None:
    """Members must agree among themselves where the data leave their classes open."""
    for member in members[1:]:
        for name in ("num_classes", "class_names"):
            ours, theirs = getattr(members[0], name), getattr(member, name)
            if ours is not None and theirs is not None and ours != theirs:
                raise InputError(
                    f"an ensemble's members have the same classes; {members[0].source} has {ours}, {member.source} {theirs}: "
                    "bring them to one order by a teacher.toml with classes beside each"
                )


def _mean(outputs: Sequence[Outputs], probabilities: bool) -> np.ndarray:
    logits = np.stack([output["logits"] for output in outputs]).astype(np.float64)
    if probabilities:
        mean = logsumexp(log_softmax(logits, axis=-1), axis=0) - np.log(len(logits))
        return np.asarray(mean, np.float32)
    return np.asarray(logits.mean(axis=0), np.float32)
