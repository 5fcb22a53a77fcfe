"""ev3-distill: small students from big teachers, with a promise. Names are imported at first use."""

import importlib
from typing import Any

_HOME = {
    "Arm": "ev3_distill.types:Arm",
    "Batch": "ev3_distill.types:Batch",
    "Decision": "ev3_distill.types:Decision",
    "Distillation": "ev3_distill.training.trainer:Distillation",
    "EV3": "ev3_distill.config:EV3",
    "Fractions": "ev3_distill.config:Fractions",
    "InputError": "ev3_distill.errors:InputError",
    "Network": "ev3_distill.types:Network",
    "Pools": "ev3_distill.types:Pools",
    "State": "ev3_distill.types:State",
    "Variables": "ev3_distill.types:Variables",
    "make_certificate": "ev3_distill.certify.certificate:make_certificate",
    "default_arms": "ev3_distill.arms:default_arms",
    "distill": "ev3_distill.training.trainer:distill",
    "from_nnx": "ev3_distill.students.network:from_nnx",
    "goal": "ev3_distill.tasks.classification.steering:goal",
    "hypergradient": "ev3_distill.hypergrad:hypergradient",
    "gradient_arm": "ev3_distill.arms.gradient:gradient_arm",
    "load_data": "ev3_distill.data.sources:load_data",
    "load_student": "ev3_distill.students:load",
    "losses": "ev3_distill.tasks.classification.losses:",
    "objectives": "ev3_distill.tasks.classification.example_scores:",
    "split": "ev3_distill.data.batches:split",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ev3_distill' has no attribute '{name}'")
    module, _, attribute = _HOME[name].partition(":")
    home = importlib.import_module(module)
    globals()[name] = value = getattr(home, attribute) if attribute else home
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
