"""Outputs of a model that are the softmax or the sigmoid of another tensor: which output holds the logits instead."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Normalized(NamedTuple):
    """Origin of an output.

    Attributes:
      operator: `softmax` or `sigmoid`.
      tensor: what it is applied to: the logits.
    """

    operator: str
    tensor: str


def notes_on(
    taken: str, named: Sequence[str], normalized: Mapping[str, Normalized], *, source: str, inside: bool
) -> tuple[str, ...]:
    """Sentences about the output in use, where a user should know of another one.

    Args:
      taken: name of the output in use.
      named: output names that the user gave.
      normalized: the normalized outputs of the model by name.
      source: the teacher as the user named it.
      inside: whether tensors inside the model can be named after `#`.
    """
    if taken in normalized:
        operator, tensor = normalized[taken]
        way_out = f"; give {source.partition('#')[0]}#{tensor} for the logits before it" if inside else ""
        return (f"its output {taken} is the {operator} of {tensor}{way_out}",)
    others = [name for name, (_, tensor) in normalized.items() if tensor == taken]
    if named or not others:
        return ()
    return (f"its output {taken} holds the logits; {others[0]} is their {normalized[others[0]].operator}",)
