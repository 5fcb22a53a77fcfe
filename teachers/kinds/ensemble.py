"""Ensembles. `ensemble:A,B,...` averages logits; `ensemble-prob:A,B,...` averages probabilities and takes the logarithm.

Averaging logits weights the members by the scale of their logits. Averaging probabilities gives each member the same weight.
"""

import re
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax, logsumexp

from ev3_distill.errors import InputError
from ev3_distill.teachers.loading import digest_of
from ev3_distill.teachers.teacher import Request, Teacher


def mean_of_logits(place: str, request: Request) -> Teacher:
    """Loads an ensemble whose logits are the mean of its members' logits.

    The preprocessing options apply to all members. Settings of one member go into the TOML file beside it. The members'
    logits are put in the data's class order first. Features of members are not available.

    Raises:
      InputError: there are fewer than two members, a member is recorded logits or an ensemble, or it cannot be loaded.
    """
    return _ensemble(place, request, probabilities=False)


def mean_of_probabilities(place: str, request: Request) -> Teacher:
    """Loads an ensemble whose softmax is the mean of its members' softmax; otherwise as `mean_of_logits`."""
    return _ensemble(place, request, probabilities=True)


def _ensemble(place: str, request: Request, *, probabilities: bool) -> Teacher:
    texts = re.split(f",(?=(?:{'|'.join(request.kinds)}):)", place)  # output names may hold commas
    if len(texts) < 2:
        raise InputError(
            f"an ensemble is two teachers or more, KIND:PLACE,KIND:PLACE,...; got '{request.source}': name another member"
        )
    for text in texts:
        if text.startswith("logits:"):
            raise InputError(
                f"an ensemble runs its members; got recorded logits, {text}, in '{request.source}': average the logits "
                "yourself and give one logits:FILE"
            )
        if text.startswith("ensemble"):
            raise InputError(f"members of an ensemble are single teachers; got {text}: list its members instead")
    if request.load_member is None:
        raise ValueError("an ensemble needs load_member")
    if probabilities and request.main_shape is not None:
        raise InputError(
            f"only classes have probabilities to average; got {request.source} for a task with {request.main_output}: use "
            "ensemble:"
        )
    members = [request.load_member(text) for text in texts]
    name = request.main_output
    _check_alike(members)
    params = [member.params for member in members]
    return Teacher(
        source=request.source,
        digest=digest_of([f"ensemble {probabilities}", *(member.digest for member in members)]),
        outputs=lambda inputs: {name: _mean([member.outputs(inputs)[name] for member in members], probabilities)},
        num_classes=next((member.num_classes for member in members if member.num_classes), None),
        class_names=members[0].class_names,
        params=None if None in params else sum(number or 0 for number in params),
        members=tuple(members),
        notes=tuple(f"{member.source}: {note}" for member in members for note in member.notes),
        classifier=any(member.classifier for member in members),
    )


def _check_alike(members: Sequence[Teacher]) -> None:
    """Members must have the same classes; this matters if the data do not define them."""
    for member in members[1:]:
        for name in ("num_classes", "class_names"):
            ours, theirs = getattr(members[0], name), getattr(member, name)
            if ours is not None and theirs is not None and ours != theirs:
                raise InputError(
                    f"members of an ensemble have the same classes; {members[0].source} has {ours}, {member.source} has "
                    f"{theirs}: put a TOML file with classes beside each"
                )


def _mean(outputs: Sequence[np.ndarray], probabilities: bool) -> np.ndarray:
    stacked = np.stack(outputs).astype(np.float64)
    if probabilities:
        mean = logsumexp(log_softmax(stacked, axis=-1), axis=0) - np.log(len(stacked))
        return np.asarray(mean, np.float32)
    return np.asarray(stacked.mean(axis=0), np.float32)
