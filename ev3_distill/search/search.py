"""The search for the smallest student that meets its guards, from the first step to the certificate and the report.

`policy.SearchPolicy` decides what to train. At the end the sealed split is opened for the preferred student and, if there is a
surer one, for a larger student, which is delivered if the first does not prove the guards. Each has its share of the error
probability, so the certificate holds whichever is delivered, and the search can afford to prefer a small student.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill import students
from ev3_distill.config import Compress
from ev3_distill.runtime import compile_cache, phases
from ev3_distill.runtime.ledger import MOVES, read_rows
from ev3_distill.runtime.progress import RunProgress
from ev3_distill.search import archive
from ev3_distill.search.archive import Entry
from ev3_distill.search.policy import SearchPolicy
from ev3_distill.search.stage_runner import StageRunner
from ev3_distill.teachers.targets import TeacherTargets
from ev3_distill.training.report_content import FinalStudent
from ev3_distill.training.run_dir import write_lines
from ev3_distill.training.setup import TrainingSetup
from ev3_distill.training.train import conclude

PATIENCE = 6.0  # default patience of a search: what growth has added needs time to pay off


def run_search(
    directory: Path,
    config: Compress,
    setup: TrainingSetup,
    arm_names: Sequence[str],
    targets: TeacherTargets,
    *,
    teacher: dict[str, Any],
) -> dict[str, Any]:
    """Runs a search to certificate and report; returns the content of report.json.

    Args:
      directory: of the run, locked by this process.
      config: of a run that searches.
      setup: data, splits, guards and the first network.
      arm_names: of the arms.
      targets: teacher outputs.
      teacher: facts for the report.
    """
    if not config.ev3.patience:
        config = dataclasses.replace(config, ev3=dataclasses.replace(config.ev3, patience=PATIENCE))
    with phases.phase("training"), RunProgress("search", steps=setup.steps, seconds=None) as progress:
        runner = StageRunner(directory, config, setup, arm_names, targets, progress=progress)
        policy = SearchPolicy(runner)
        policy.grow()
        policy.shrink()
        policy.polish()
        for number in range(2, config.passes + 1):
            policy.repeat(number)
    facts = _write_ledger(runner)
    candidates = policy.candidates()
    finals = [_final(runner, policy, entry, candidates, facts) for entry in candidates]
    surer = finals[1] if len(finals) > 1 else None
    return conclude(directory, config, setup, finals[0], targets, teacher=teacher, fallback=surer)


def _write_ledger(runner: StageRunner) -> dict[str, Any]:
    """Joins the ledgers of all stages in the run directory; returns costs and arms for the report."""
    ledgers = [list(read_rows(stage.ledger)) for stage in runner.stages]
    history = [row for ledger in ledgers for row in ledger]
    added = {entry.number for entry in runner.archive.entries}
    write_lines(runner.directory / "ledger.jsonl", [row for row in history if row["size"] in added])
    steps = runner.spent() + runner.lost
    return {
        "cost": {
            **phases.clock().times(),
            "steps": steps,
            "drawing": steps - sum(sum(row["steps"].values()) for row in history),
            "examples": steps * runner.config.ev3.batch_size,
            **compile_cache.usage(),
        },
        "arms": _arms_in(history),
        "error_budget": {
            "delta": runner.config.ev3.delta,
            "left": float(runner.budget.left),
            "tests": int(runner.budget.tests),
        },
    }


def _final(
    runner: StageRunner, policy: SearchPolicy, entry: Entry, candidates: Sequence[Entry], facts: dict[str, Any]
) -> FinalStudent:
    """What the run delivers if it delivers an entry's student."""
    stage, entries = runner.stage_of(entry), runner.archive.entries
    front = archive.pareto_front(entries)
    outcome = {
        "sizes": [{**one.as_dict(), "on_front": one in front} for one in entries],
        "trials": policy.trials,
        "candidates": [one.number for one in candidates],
        "delivered": entry.number,
    }
    variables = students.load(stage.folder, factory=runner.factory)[1]
    return FinalStudent(
        stage.network,
        variables,
        f"sizes/{entry.number:02d}",
        stage.latest(),
        stage.run.arms,
        name=entry.network,
        facts={**facts, "search": outcome},
        on_decide=np.asarray(stage.run.distillation.evaluator.evaluate(variables, stage.run.pools.decide).promise),
    )


def _arms_in(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps, wins and promotions of each arm in all stages."""
    total = sum(sum(row["steps"].values()) for row in history)
    arms = []
    for name in dict.fromkeys(name for row in history for name in row["steps"]):
        steps = sum(row["steps"].get(name, 0) for row in history)
        wins = [row for row in history if row["selected"] == name and row["verdict"] in MOVES]
        promotions = [row for row in history if row["verdict"] == "promote" and row["arm"] == name]
        arms.append(
            {
                "name": name,
                "share": steps / max(total, 1),
                "steps": steps,
                "wins": len(wins),
                "promotions": len(promotions),
            }
        )
    return arms
