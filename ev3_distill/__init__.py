"""Distills a big model into a small one, with a certificate.

`compress` runs what the command line runs: data, teacher and student by name, a run directory out. `distill` is the trainer
below it, for a network, arms and data of your own. Names are imported on first use, so that importing the package is fast.
"""

import importlib
from typing import Any

_LOCATIONS = {
    "Arm": "ev3_distill.types:Arm",
    "Batch": "ev3_distill.types:Batch",
    "Compress": "ev3_distill.config:Compress",
    "Decision": "ev3_distill.types:Decision",
    "Distillation": "ev3_distill.training.trainer:Distillation",
    "EV3": "ev3_distill.config:EV3",
    "Fractions": "ev3_distill.config:Fractions",
    "InputError": "ev3_distill.errors:InputError",
    "Network": "ev3_distill.types:Network",
    "Pools": "ev3_distill.types:Pools",
    "RunResult": "ev3_distill.cli.commands:RunResult",
    "State": "ev3_distill.types:State",
    "Teach": "ev3_distill.config:Teach",
    "Variables": "ev3_distill.types:Variables",
    "compress": "ev3_distill.cli.commands:compress",
    "default_arms": "ev3_distill.arms:default_arms",
    "distill": "ev3_distill.training.trainer:distill",
    "from_nnx": "ev3_distill.students.network:from_nnx",
    "goal": "ev3_distill.tasks.classification.steering:goal",
    "gradient_arm": "ev3_distill.arms.gradient:gradient_arm",
    "hypergradient": "ev3_distill.hypergrad:hypergradient",
    "load_data": "ev3_distill.data.sources:load_data",
    "load_student": "ev3_distill.students:load",
    "losses": "ev3_distill.tasks.classification.losses:",
    "make_certificate": "ev3_distill.certify.certificate:make_certificate",
    "objectives": "ev3_distill.tasks.classification.example_scores:",
    "split": "ev3_distill.data.batches:split",
    "teach": "ev3_distill.cli.commands:teach",
}

__all__ = list(_LOCATIONS)


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'ev3_distill' has no attribute '{name}'")
    module_name, _, attribute = _LOCATIONS[name].partition(":")
    module = importlib.import_module(module_name)
    globals()[name] = value = getattr(module, attribute) if attribute else module
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOCATIONS})
