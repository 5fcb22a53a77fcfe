"""The content of report.json: plain data about a finished run. The room `monitor` renders it."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ev3_distill.arms.zoo import is_convolutional
from ev3_distill.config import EV3, Compress, RunConfig, Teach
from ev3_distill.data import SPLITS
from ev3_distill.runtime import compile_cache, phases
from ev3_distill.runtime.ledger import read_rows
from ev3_distill.runtime.race import race_of
from ev3_distill.students import count_params
from ev3_distill.students.layers.conv import computed_by
from ev3_distill.training.certify_run import Certification
from ev3_distill.training.evaluate_students import final_steps
from ev3_distill.training.setup import TrainingSetup
from ev3_distill.training.usefulness_checks import usefulness_content
from ev3_distill.types import Network, State, Variables

PACKAGES = ("ev3-distill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


@dataclasses.dataclass(frozen=True, eq=False)
class FinalStudent:
    """The student that a run delivers, and the run that trained it.

    Attributes:
      network: of the student.
      variables: of the student.
      origin: which of the run's students it is: champion, current, ...
      state: the last state of the run.
      arms: names of the run's arms.
      name: of the network, if it is not the configured one.
      facts: entries of the report that replace or extend the usual ones.
      on_decide: [N] promise scores on decide; after a final phase, those of the student before it, which has not learned from
        decide.
    """

    network: Network
    variables: Variables
    origin: str
    state: State
    arms: Sequence[str]
    name: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on_decide: np.ndarray | None = None


def report_content(
    directory: Path,
    config: RunConfig,
    setup: TrainingSetup,
    final: FinalStudent,
    certification: Certification,
    *,
    teacher: Mapping[str, Any] | None,
    control: Mapping[str, float] | None,
    diagnosis: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Collects report.json.

    Args:
      directory: of the run, with its ledger.
      config: of the run.
      setup: what was trained on what.
      final: the delivered student.
      certification: of that student.
      teacher: facts about the teacher; None if the run trained on the data's own targets alone.
      control: the gain over a student that was trained on labels alone.
      diagnosis: what the race shows about the teacher and the labels.
    """
    dataset = setup.dataset
    unknown = {"source": "labels", "params": None, "accuracy": None}
    return {
        "task": setup.task.name,
        **_run_facts(directory, final, config.ev3),
        "teacher": unknown if teacher is None else {**teacher, "accuracy": certification.teacher_score},
        "student": _student_facts(config, setup, final, certification),
        "certificate": certification.certificate.as_dict(),
        "control": control,
        "diagnosis": diagnosis,
        "guards": certification.guards,
        "usefulness": usefulness_content(directory, config, setup, certification),
        "devices": str(setup.devices),
        **({"convolutions": _convolutions(setup)} if is_convolutional(setup.network.spec) else {}),
        "final": None,
        "seed": config.seed,
        "budget": config.budget,
        "splits": {name: len(setup.rows[name]) for name in SPLITS},
        **_groups_of_splits(setup),
        "data": {
            "source": dataset.source,
            "fingerprint": dataset.fingerprint,
            "classes": setup.class_names,
            "input_shape": list(dataset.inputs.shape[1:]),
            "dtype": dataset.inputs.dtype.name,
            **({"labeled": int(dataset.is_labeled.sum())} if dataset.partly_labeled else {}),
            **({} if dataset.offset is None else {"offset": dataset.offset.tolist()}),
            "augmentation": "none" if setup.augmentation is None else setup.augmentation.describe(),
            **setup.copies,
        },
        "command": f"ev3-distill {'teach' if teacher is None else 'compress'} --config config.toml",
        **final.facts,
    }


def _convolutions(setup: TrainingSetup) -> str:
    """What computes the student's convolutions."""
    return computed_by() if setup.devices.step_mesh is None else "XLA (several devices share a batch)"


def final_phase_content(setup: TrainingSetup, final: FinalStudent, before: str) -> dict[str, Any]:
    """The entry of a final phase: decide proves nothing about a student that has learned from it.

    Args:
      setup: of the run.
      final: the delivered student, with the scores of the student before the phase.
      before: which of the run's students that was: champion or current.
    """
    scores = np.asarray(final.on_decide)
    return {
        "steps": final_steps(final.state),
        "rows": len(setup.rows["assess"]) + len(setup.rows["decide"]),  # that it trained on besides explore
        "delivered": final.origin == "final",  # else the phase went wrong, and the student before it is delivered
        "before": before,
        f"before_{setup.task.promise.name}": float(scores.mean()),  # on decide, of the student before the phase
    }


def _groups_of_splits(setup: TrainingSetup) -> dict[str, Any]:
    """The number of groups in each split, where whole groups are divided."""
    if setup.units is None:
        return {}
    return {"groups": {name: len(np.unique(setup.units[setup.rows[name]])) for name in SPLITS}}


def _student_facts(
    config: RunConfig, setup: TrainingSetup, final: FinalStudent, certification: Certification
) -> dict[str, Any]:
    points = {claim.metric: claim.point for claim in certification.certificate.claims}
    configured = config.student if isinstance(config, Compress) else config.network if isinstance(config, Teach) else ""
    promise = setup.task.promise.name
    return {
        "network": final.name or configured,
        "params": count_params(final.variables),
        "deploy": final.network.spec.get("deploy", "float32"),
        promise: points.get(promise),
        "agreement": points.get("agreement"),
        "delivered": final.origin,
    }


def _run_facts(directory: Path, final: FinalStudent, config: EV3) -> dict[str, Any]:
    """What the state and the ledger of a run show.

    Times and the use of the compile cache (programs, from_cache) are the only entries in which two runs of one configuration
    on one machine differ.
    """
    state, history = jax.device_get(final.state), list(read_rows(directory / "ledger.jsonl"))
    cost, arms = int(state.clock.cost), state.arms
    return {
        "cost": {
            **phases.clock().times(),
            "steps": cost,
            "drawing": cost - int(arms.cost.sum()),
            "examples": cost * config.batch_size,
            **compile_cache.usage(),
        },
        "iterations": int(state.clock.iteration),
        "promotions": sum(row["verdict"] == "promote" for row in history),
        "rollbacks": sum(row["verdict"] == "roll back" for row in history),
        "objectives": collections.Counter(row["objective"] for row in history),
        "met": bool(state.met),
        "race": race_of(history),
        "arms": [
            {
                "name": name,
                "share": int(arms.cost[i]) / max(cost, 1),
                "steps": int(arms.cost[i]),
                "wins": int(arms.wins[i]),
                "promotions": int(arms.promotions[i]),
            }
            for i, name in enumerate(final.arms)
        ],
        "error_budget": {
            "delta": config.delta,
            "left": float(state.budget.left),
            "tests": int(state.budget.tests),
        },
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
    }
