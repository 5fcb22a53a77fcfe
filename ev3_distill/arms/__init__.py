"""The zoo of arms by name, and the default portfolio; `ev3-distill bench portfolio` measures it."""

from ev3_distill.arms.registry import (
    ARMS,
    BY_PEERS,
    CONVOLUTIONAL,
    CONVOLUTIONAL_FAMILIES,
    DEFAULT,
    EVOLVING,
    MUON_RATE,
    PEER,
    RATE,
    arms_named,
    default_arms,
    default_names,
    features_asked,
    name_for_labels,
    names_for_peers,
    up_and_down,
)

__all__ = [
    "ARMS",
    "BY_PEERS",
    "CONVOLUTIONAL",
    "CONVOLUTIONAL_FAMILIES",
    "DEFAULT",
    "EVOLVING",
    "MUON_RATE",
    "PEER",
    "RATE",
    "arms_named",
    "default_arms",
    "default_names",
    "features_asked",
    "name_for_labels",
    "names_for_peers",
    "up_and_down",
]
