"""Search: the smallest student that meets its guards, from the first step to the certificate and the report.

The way is a `climb.Climb`: up from a small student by growth, and back down. At its end the sealed split is opened for the
student that is wanted and, where one is surer, for a larger one that is delivered if it does not prove the guards of the first.
Both have their share of the error probability, so what is promised holds whichever it is; and the search may be bold.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ev3_distill import students
from ev3_distill.runtime.ledger import read_rows
from ev3_distill.runtime.progress import RunProgress
from ev3_distill.search import archive
from ev3_distill.search.archive import Entry
from ev3_distill.search.policy import Climb
from ev3_distill.teachers.targets import TeacherTargets
from ev3_distill.training.report_content import FinalStudent
from ev3_distill.training.run_dir import write_lines
from ev3_distill.training.setup import TrainingSetup
from ev3_distill.training.train import conclude

PATIENCE = 6.0  # of a search, where none is named: what growth has added, or another arm, takes its time


def search(
    directory: Path,
    chosen: Any,
    task: TrainingSetup,
    arm_names: Sequence[str],
    targets: TeacherTargets,
    *,
    teacher: dict[str, Any],
) -> dict[str, Any]:
    """The search, to certificate and report; returns the content of report.json.

    Args:
      directory: of the run, held by this process.
      chosen: config.Compress with a start or sizes.
      task: what is trained on what; its network is the smallest.
      arm_names: of the arms.
      targets: of the teacher.
      teacher: facts for the report.
    """
    if not chosen.ev3.patience:
        chosen = dataclasses.replace(chosen, ev3=dataclasses.replace(chosen.ev3, patience=PATIENCE))
    with RunProgress("search", steps=task.steps, seconds=None) as progress:
        made = Climb(directory, chosen, task, arm_names, targets, progress=progress)
        made.up()
        made.down()
        made.polish()
        for number in range(2, chosen.passes + 1):
            made.again(number)
    of_rungs = [list(read_rows(one.folder / "ledger.jsonl")) for one in made.rungs]
    history, wall_s = [row for told in of_rungs for row in told], sum(told[-1]["wall_s"] for told in of_rungs if told)
    entered = {one.number for one in made.archive.entries}
    write_lines(directory / "ledger.jsonl", [row for row in history if row["size"] in entered])
    courses = {id(one.course): one.course for one in made.rungs}.values()
    compile_s = sum(course.distillation.compile_s for course in courses)
    steps = int(made.last.clock.cost) + made.lost
    best = archive.front(made.archive.entries)
    facts = {
        "cost": {
            "wall_s": round(wall_s + compile_s, 3),
            "compile_s": round(compile_s, 3),
            "steps": steps,
            "drawing": steps - sum(sum(row["steps"].values()) for row in history),
            "examples": steps * chosen.ev3.batch_size,
        },
        "arms": _arms_in(history),
    }
    candidates = made.candidates()

    def final_of(entry: Entry) -> FinalStudent:
        rung = made.rung_of(entry)
        told = {
            "sizes": [{**dataclasses.asdict(one), "on_front": one in best} for one in made.archive.entries],
            "trials": made.trials,
            "candidates": [one.number for one in candidates],
            "delivered": entry.number,
        }
        return FinalStudent(
            rung.network,
            students.load(rung.folder, factory=made.factory)[1],
            f"sizes/{entry.number:02d}",
            rung.known(),
            rung.course.arms,
            compile_s,
            name=entry.network,
            facts={**facts, "search": told},
        )

    final, *surer = map(final_of, candidates)
    return conclude(directory, chosen, task, final, targets, teacher=teacher, fallback=surer[0] if surer else None)


def _arms_in(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each arm did in all rungs."""
    total = sum(sum(row["steps"].values()) for row in history)
    found = []
    for name in dict.fromkeys(name for row in history for name in row["steps"]):
        steps = sum(row["steps"].get(name, 0) for row in history)
        moved = [row for row in history if row["selected"] == name and row["verdict"] in ("adopt", "promote")]
        promoted = [row for row in history if row["verdict"] == "promote" and row["arm"] == name]
        found.append(
            {
                "name": name,
                "share": steps / max(total, 1),
                "steps": steps,
                "wins": len(moved),
                "promotions": len(promoted),
            }
        )
    return found
