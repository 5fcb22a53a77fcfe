"""Metadata of an exported file: all that is needed to use and judge it without its run.

ONNX and safetensors files hold the metadata themselves. `model.json` beside the file repeats it, with the file's SHA-256.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ev3_distill.errors import InputError

SIDECAR = "model.json"
METADATA_DIGEST = "sha256_metadata"  # key of `model.json`; missing in exports of older versions


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """Plain data. Each field is one entry of an ONNX file's metadata, as text or JSON."""

    format: str  # onnx, stablehlo or flax
    precision: str  # float32 or int8
    classes: list[str]
    input_shape: list[int]  # of one example in the data set
    dtype: str  # of the inputs; the file divides uint8 inputs by 255 itself
    layout: str  # nhwc or nchw: where the file expects the last axis of an example
    output: str  # logits or probabilities
    params: int
    student: str  # digest of its variables, see `runtime.digest.tree_digest`
    network: str
    data: dict[str, Any]  # source, fingerprint and, where columns were shifted, the offset to subtract in float64
    teacher: dict[str, Any]  # source and license, under the key "licence"
    promise: str  # the certificate in words
    certificate: dict[str, Any]  # of the student; empty if it has none
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Converts to a dictionary for JSON."""
        return dataclasses.asdict(self)

    def as_texts(self) -> dict[str, str]:
        """Converts to a dictionary of strings, for formats whose metadata hold only text."""
        return {name: of if isinstance(of, str) else json.dumps(of) for name, of in self.as_dict().items()}

    def as_sidecar(self, **digests: str) -> dict[str, Any]:
        """The content of `model.json`, with digests of the files beside it and of the metadata themselves."""
        content = self.as_dict()
        return {**content, **digests, METADATA_DIGEST: metadata_digest(content)}


def metadata_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the metadata fields in the content of `model.json`, in hexadecimal."""
    fields = {name: content[name] for name in FIELDS if name in content}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


FIELDS = {field.name: field.type for field in dataclasses.fields(ModelMetadata)}


def from_dict(content: Mapping[str, Any], source: object) -> ModelMetadata:
    """Reads what `ModelMetadata.as_dict` returned.

    Args:
      content: the dictionary.
      source: the file, for error messages.

    Raises:
      InputError: a field is missing.
    """
    if missing := [name for name in FIELDS if name not in content]:
        raise InputError(
            f"an exported file needs its metadata; {source} lacks {', '.join(missing)}: export the student again, or use a "
            "file from another tool as --teacher of compress"
        )
    return ModelMetadata(**{name: content[name] for name in FIELDS})


def from_texts(content: Mapping[str, str], source: object) -> ModelMetadata:
    """Reads what `ModelMetadata.as_texts` returned.

    Args:
      content: the dictionary.
      source: the file, for error messages.

    Raises:
      InputError: a field is missing, or is not valid JSON.
    """
    try:
        return from_dict({n: of if FIELDS.get(n) is str else json.loads(of) for n, of in content.items()}, source)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the metadata of {source} cannot be read ({error}): export the student again") from None
