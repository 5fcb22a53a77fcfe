"""Provenance of a suite's rows: command, machine, package versions and a hash of the code."""

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import ev3_distill

_PACKAGES = ("jax", "flax", "optax", "numpy")


def provenance(suite: str, *, seeds: int, size: str) -> dict[str, Any]:
    """The command, the machine (without its host name), package versions and a hash of the code."""
    command = f"ev3-distill bench {suite} --seeds {seeds}" + (f" --size {size}" if size != "full" else "")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}
    return {
        "suite": suite,
        "size": size,
        "seeds": seeds,
        "command": command,
        "machine": _machine(),
        "versions": versions,
        "code": code_hash(Path(ev3_distill.__file__).parent),
    }


def code_hash(package: Path) -> str:
    """The first 12 hex digits of a SHA-256 of every Python module below a package, links to folders included.

    A checkout, where the rooms `benchmarks`, `students` and `teachers` are links, has the same hash as a wheel built from it.
    """
    modules = [
        Path(folder) / name
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    digest = hashlib.sha256()
    for path in sorted(modules, key=lambda path: path.relative_to(package).as_posix()):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _machine() -> dict[str, Any]:
    """CPU model, number of cores, and the accelerator (null on a CPU)."""
    import jax

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = jax.devices()[0]
    accelerator = None if device.platform == "cpu" else device.device_kind
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "accelerator": accelerator}


def seeds_text(header: dict[str, Any]) -> str:
    """The seeds that a command asked for, in words."""
    return "seed 0" if header["seeds"] == 1 else f"seeds 0 to {header['seeds'] - 1}"


def machine_text(header: dict[str, Any]) -> str:
    """The machine in words."""
    machine = header["machine"]
    accelerator = f", {machine['accelerator']}" if machine["accelerator"] else ""
    return f"{machine['cpu']}, {machine['cores']} cores{accelerator}"


def versions_text(header: dict[str, Any]) -> str:
    """The package versions in words."""
    return ", ".join(f"{name} {version}" for name, version in header["versions"].items())
