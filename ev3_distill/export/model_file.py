"""Writes a student to a file, with its metadata."""

import functools
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.export.export_config import ExportConfig
from ev3_distill.export.formats import onnx, safetensors_file, stablehlo
from ev3_distill.export.formats.metadata import SIDECAR, ModelMetadata
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.files import sha256_of
from ev3_distill.students import count_params, name_of
from ev3_distill.students.layers import standard_convolutions
from ev3_distill.students.saving import write
from ev3_distill.training.run_dir import write_json
from ev3_distill.types import Network, Variables


def exported_forward(network: Network, config: ExportConfig) -> Callable[[Variables, jax.Array], jax.Array]:
    """The student as a function of its variables and of inputs as the file takes them, using standard operations only."""

    def forward(variables: Variables, inputs: jax.Array) -> jax.Array:
        if config.layout == "nchw":
            inputs = jnp.moveaxis(inputs, 1, -1)
        with standard_convolutions():
            logits = network.apply(variables, inputs, train=False)[0]
        return jax.nn.softmax(logits) if config.softmax else logits

    return forward


def student_facts(network: Network, variables: Variables, name: str) -> dict[str, str | int]:
    """The metadata fields that describe the student itself.

    Args:
      network: the student's.
      variables: the student's.
      name: of the network as the run reports it; may be empty.
    """
    return {
        "precision": str(network.spec.get("deploy", "float32")),
        "params": count_params(variables),
        "student": tree_digest(variables),
        "network": name or name_of(network.spec),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter for an exported file, as far as they are installed."""
    versions = {}
    for name in ("jax", "flax", "onnx"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in versions.items() if version}


def write_model(
    folder: Path,
    network: Network,
    variables: Variables,
    config: ExportConfig,
    about: ModelMetadata,
) -> Path:
    """Writes a student's file and model.json; as flax, also everything else that belongs to the student.

    Args:
      folder: of the export.
      network: the student's.
      variables: the student's.
      config: of the export.
      about: the file's metadata.

    Returns:
      The path of the file.
    """
    example = jax.ShapeDtypeStruct(config.input_shape(about.input_shape), np.dtype(about.dtype))
    forward, name, digests = exported_forward(network, config), about.network, dict[str, str]()
    closed = functools.partial(forward, variables)
    if config.format == "flax":
        path, program = folder / safetensors_file.FILE, folder / safetensors_file.PROGRAM
        write(folder, network, variables)
        path.write_bytes(safetensors_file.serialize_variables(variables, about.as_texts()))
        program.write_bytes(safetensors_file.serialize_apply(forward, variables, example, name=name))
        digests["sha256_program"] = sha256_of(program)
    elif config.format == "stablehlo":
        path = folder / "model.stablehlo"
        path.write_bytes(stablehlo.serialize(closed, example, name=name))
    else:
        path = folder / "model.onnx"
        path.write_bytes(onnx.serialize(closed, example, name=name, output=about.output, metadata=about.as_texts()))
    write_json(folder / SIDECAR, about.as_sidecar(sha256=sha256_of(path), **digests))
    return path
