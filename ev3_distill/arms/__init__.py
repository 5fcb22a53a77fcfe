"""Arms: the ways to train that compete within a run."""

from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.arms.registry import arms_named, default_arms, learns_from, teacher_features_of
from ev3_distill.arms.zoo import (
    ARMS,
    DEFAULT,
    EVOLVING,
    PEER,
    PEER_ARMS,
    default_arm_names,
    label_arm_name,
    peer_arm_names,
)

__all__ = [
    "ARMS",
    "DEFAULT",
    "EVOLVING",
    "PEER",
    "PEER_ARMS",
    "arms_named",
    "default_arm_names",
    "default_arms",
    "gradient_arm",
    "label_arm_name",
    "learns_from",
    "peer_arm_names",
    "teacher_features_of",
]
