"""Export: deployable files of a student, the model card, and the evaluation of runs and of such files.

Names are imported on first use, because the process that times a teacher must set its cores before it imports NumPy.
"""

import importlib
from typing import Any

_LOCATIONS = {
    "EvaluationConfig": "evaluate",
    "ExportConfig": "export_config",
    "ExportedModel": "formats.runtime",
    "FileEvaluation": "evaluate",
    "ModelMetadata": "formats.metadata",
    "evaluate_file": "evaluate",
    "evaluate_run": "evaluate",
    "export_run": "export",
    "find_model_file": "formats.runtime",
    "open_exported": "formats.runtime",
}

__all__ = list(_LOCATIONS)


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'ev3_distill.export' has no attribute '{name}'")
    globals()[name] = value = getattr(importlib.import_module(f"ev3_distill.export.{_LOCATIONS[name]}"), name)
    return value
