"""ev3-distill: small students from big teachers, with a promise. Names are imported at first use."""

import importlib
from typing import Any

_HOME = {
    "Arm": "ev3_distill.types:Arm",
    "Batch": "ev3_distill.types:Batch",
    "Decision": "ev3_distill.types:Decision",
    "Distillation": "ev3_distill.loop:Distillation",
    "EV3": "ev3_distill.config:EV3",
    "Fractions": "ev3_distill.config:Fractions",
    "InputError": "ev3_distill.errors:InputError",
    "Network": "ev3_distill.types:Network",
    "Pools": "ev3_distill.types:Pools",
    "State": "ev3_distill.types:State",
    "Variables": "ev3_distill.types:Variables",
    "certify": "ev3_distill.certificate:certify",
    "default_arms": "ev3_distill.arms:default_arms",
    "distill": "ev3_distill.loop:distill",
    "from_nnx": "ev3_distill.network:from_nnx",
    "goal": "ev3_distill.goals:goal",
    "gradient_arm": "ev3_distill.arms.gradient:gradient_arm",
    "load_data": "ev3_distill.sources:load_data",
    "load_student": "students:load",
    "losses": "ev3_distill.losses:",
    "objectives": "ev3_distill.objectives:",
    "split": "ev3_distill.pool:split",
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
