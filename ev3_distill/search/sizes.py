"""Candidate sizes of a search: what a student may become next, within the limits of the user."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from ev3_distill import students
from ev3_distill.config import Compress
from ev3_distill.errors import InputError, warn
from ev3_distill.students import count_params
from ev3_distill.students.growth import moves
from ev3_distill.training.setup import TrainingSetup
from ev3_distill.types import Network


def first_network(config: Compress, spec: Mapping[str, Any]) -> Network:
    """The network with which a search starts.

    Args:
      config: of a run that searches.
      spec: of the network that `config.student` names.

    Raises:
      InputError: --sizes are not in ascending order of parameters.
    """
    shape = spec["input_shape"], spec["num_classes"]
    if config.start == "tiny":
        return students.standardized_like(students.tiny(config.student, *shape), spec)
    if config.start:
        return students.standardized_like(students.from_name(config.start, *shape), spec)
    ladder = [students.from_name(text, *shape) for text in config.sizes]
    params = [count_params(jax.eval_shape(network.init, jax.random.key(0))) for network in ladder]
    if sorted(set(params)) != params:
        raise InputError(
            f"the sizes of a search must come smallest first; got {', '.join(config.sizes)} of {params} parameters: order "
            "them"
        )
    return students.standardized_like(ladder[0], spec)


class Sizes:
    """The candidate sizes of a search.

    Attributes:
      ladder: specs that the user listed, smallest first; empty if sizes follow from growth.
    """

    def __init__(self, config: Compress, setup: TrainingSetup, *, factory: Callable[..., Any] | None):
        """Derives the limits.

        Args:
          config: of a run that searches.
          setup: with the first network and the guards.
          factory: of a family of the user's own.
        """
        spec = setup.network.spec
        named = [students.from_name(text, spec["input_shape"], spec["num_classes"]) for text in config.sizes]
        self.ladder = [dict(students.standardized_like(network, spec).spec) for network in named]
        self._moves, self._factory = config.moves, factory
        limits = [(guard.metric, guard.threshold) for guard in setup.guards if guard.row.source == "size"]
        self._limits = limits + ([("params", config.max_params)] if config.max_params else [])
        self._larger: dict[str, dict[str, dict[str, Any]]] = {}  # by network

    def larger(self, spec: Any) -> dict[str, dict[str, Any]]:
        """The specs that a network may become next within the limits, by move."""
        text = students.name_of(spec)
        if text not in self._larger:
            self._larger[text] = {name: one for name, one in self._next(spec).items() if self._fits(one)}
        return self._larger[text]

    def _next(self, spec: Any) -> dict[str, dict[str, Any]]:
        if self.ladder:
            following = self.ladder[self.ladder.index(dict(spec)) + 1 :]
            return {"the next size": following[0]} if following else {}
        try:
            proposals = moves(spec, factory=self._factory)
            return {name: proposals[name] for name in self._moves or proposals if name in proposals}
        except InputError as error:
            warn(f"the student does not grow: {error}")
            return {}

    def _fits(self, spec: Any) -> bool:
        """Whether a network is within the limits on size."""
        shapes = jax.eval_shape(students.build(spec, factory=self._factory).init, jax.random.key(0))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        sizes = {"params": count_params(shapes), "bytes": size}
        return all(sizes[metric] <= most for metric, most in self._limits)
