"""What an exported file says of itself, in the file or beside it, so that it can be used and judged without the run.

model.json, beside it, has the file's SHA-256 too.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ev3_distill.errors import InputError

BESIDE = "model.json"


@dataclasses.dataclass(frozen=True)
class About:
    """Plain data; every field is one entry of an ONNX file's metadata, as text or JSON."""

    format: str  # onnx, stablehlo or flax
    precision: str  # float32 or int8
    classes: list[str]
    input_shape: list[int]  # of one example as the data have it
    dtype: str  # of inputs; bytes mean x / 255, and the file itself divides
    layout: str  # nhwc or nchw: where the file wants the last axis of an example
    output: str  # logits or probabilities
    params: int
    student: str  # digest of its parameters, see `runtime.digest.tree_digest`
    network: str
    data: dict[str, Any]  # source and fingerprint
    teacher: dict[str, Any]  # source and licence
    promise: str  # the certificate in words
    certificate: dict[str, Any]  # of the student; empty where none is about it
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def as_texts(self) -> dict[str, str]:
        """For formats that keep texts alone."""
        return {name: of if isinstance(of, str) else json.dumps(of) for name, of in self.as_dict().items()}


FIELDS = {field.name: field.type for field in dataclasses.fields(About)}


def from_dict(content: Mapping[str, Any], source: object) -> About:
    """Reads what `as_dict` gave.

    Raises:
      InputError: it is something else.
    """
    if missing := [name for name in FIELDS if name not in content]:
        raise InputError(
            f"an exported file says what it is; {source} lacks {', '.join(missing)}: export it again, or score a file from "
            "elsewhere as --teacher of compress"
        )
    return About(**{name: content[name] for name in FIELDS})


def from_texts(content: Mapping[str, str], source: object) -> About:
    """Reads what `as_texts` gave.

    Raises:
      InputError: it is something else.
    """
    try:
        return from_dict({n: of if FIELDS.get(n) is str else json.loads(of) for n, of in content.items()}, source)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the metadata of {source} cannot be read ({error}): export it again") from None
