"""Setup of a student: its guards and arms, checked against the data before anything is written."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from ev3_distill import students
from ev3_distill.arms import PEER_ARMS, arms_named, default_arm_names, teacher_features_of
from ev3_distill.arms.zoo import is_convolutional
from ev3_distill.certify.bounds import clopper_pearson_lower
from ev3_distill.config import Compress
from ev3_distill.data import count_near_copies, count_shared
from ev3_distill.errors import InputError, warn
from ev3_distill.students.layers import compiled
from ev3_distill.students.layers.conv import computed_by
from ev3_distill.tasks.classification.user_metrics import read_costs
from ev3_distill.training.certify_run import sizes_of
from ev3_distill.training.guard_checks import parse_guards
from ev3_distill.training.label_checks import require_labels
from ev3_distill.training.setup import TrainingSetup

FEW_GROUPS_BOUND = 0.8  # a warning appears if the best possible bound is lower
NEAR_SHARE = 0.01  # fraction of near-copies in a split from which on a warning appears


def prepare_student(
    config: Compress, setup: TrainingSetup, feature_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[TrainingSetup, list[str]]:
    """Adds deployment, guards and teacher features to a student's setup, and selects its arms.

    Args:
      config: of the run.
      setup: data, splits and network.
      feature_shapes: of the features that the teacher offers, by name, for one example.

    Returns:
      The completed setup, and the names of the arms.

    Raises:
      InputError: a guard is out of reach or cannot be scored on these data, or an arm does not fit.
    """
    num_classes = setup.network.spec["num_classes"]
    setup = dataclasses.replace(setup, network=students.with_precision(setup.network, config.deploy))
    setup = warn_of_duplicates(setup)
    if is_convolutional(setup.network.spec) and any(why in (by := computed_by()) for why in compiled.AVOIDABLE):
        warn(f"convolutions are computed by {by}: a training step takes about twice as long")
    _warn_of_few_groups(setup, config.confidence)
    costs = read_costs(config.costs, num_classes) if config.costs else None
    sizes = sizes_of(jax.eval_shape(lambda: setup.network.init(jax.random.key(0))))
    guards = parse_guards(
        config.guards,
        setup.dataset,
        num_classes=num_classes,
        sizes=sizes,
        costs=costs,
        grouped=setup.units is not None,
    )
    if config.control:
        require_labels(setup.dataset, "a control that learns from labels alone")
    metrics = [guard.metric for guard in guards]
    names = config.arms or default_arm_names(setup.network.spec, labels=setup.labeled, goals=metrics)
    if by_peers := [name for name in names if name in PEER_ARMS]:
        raise InputError(f"only a search has peers to learn from; got the arm '{by_peers[0]}': omit it")
    if config.tune:
        require_labels(setup.dataset, "an arm that tunes its loss")
        names = (*names, f"tuned-{'-'.join(config.tune)}")
    arms = arms_named(setup.network.apply, names, network=setup.network, teacher_features=feature_shapes)
    features = {name: feature_shapes[name] for name in teacher_features_of(names)}
    setup = dataclasses.replace(setup, teacher_features=features, guards=guards, costs=costs)
    return setup, [arm.name for arm in arms]


def warn_of_duplicates(setup: TrainingSetup) -> TrainingSetup:
    """Warns if examples of one split occur in another one too, exactly or nearly; returns the setup with the counts."""
    shared = count_shared(setup.dataset.inputs, setup.rows)
    for (later, earlier), count in shared.items():
        effect = "the certificate may promise too much" if later == "test" else "its decisions may be optimistic"
        warn(
            f"{count} of the {len(setup.rows[later])} examples of {later} have the same inputs as one in {earlier}: "
            f"{effect}; remove duplicates from the data, or keep them in one split: `ev3-distill copies` writes the file for "
            "--groups and --split-by groups"
        )
    near = count_near_copies(setup.dataset.inputs, setup.rows, memory=setup.memory)
    for name, (copied, sampled) in near.items():
        if copied >= NEAR_SHARE * sampled:
            warn(
                f"{copied} of {sampled} examples of {name} that were compared have a near-copy in another split: "
                f"{'the certificate promises too much for new examples' if name == 'test' else 'promotions prove less'}; "
                "if some examples show the same thing, give their group with --groups and --split-by groups; "
                "`ev3-distill copies` writes such a file"
            )
    facts = {
        "duplicates": {f"{later} in {earlier}": count for (later, earlier), count in shared.items()},
        "near_copies": {name: copies._asdict() for name, copies in near.items()},
    }
    return dataclasses.replace(setup, copies={name: counts for name, counts in facts.items() if counts})


def _warn_of_few_groups(setup: TrainingSetup, confidence: float) -> None:
    """Warns if the sealed split has so few groups that little can be proven, however good the student is."""
    if setup.units is None:
        return
    groups = len(np.unique(setup.units[setup.rows["test"]]))
    best = clopper_pearson_lower(groups, groups, confidence=(1 + confidence) / 2)
    if best < FEW_GROUPS_BOUND:
        warn(
            f"the sealed split has {groups} groups: a student without an error can be promised at most {best:.1%} accuracy; "
            "collect more groups, or raise --test"
        )
