"""The policy of a search: start small and grow; once a student meets the guards, look for smaller ones.

Growing. Each stage is one size, an EV3 run of its own in sizes/NN. It ends when decide proves all guards, when the student is
stuck, when its part of the budget is spent (as long as there is a larger size to try), or once it will clearly miss its guards.
Then the student grows into a larger one that computes the same function, and continues with what is left of the error budget.
If there are several ways to continue (wider, deeper, or the same size for longer), each gets a short trial, and assess compares
them: a larger student replaces a smaller one if it leads by TAKEOVER standard errors. With a list of sizes, the next one is
taken.

Shrinking. A smaller student starts from a part of the one that met the guards (`students.growth.narrow`) and learns from it
beside the teacher. The next smaller size comes first, and the search goes on as long as each size meets the guards. How a small
network turns out depends on chance, so each size gets several attempts. NARROWED_ATTEMPTS start from a part and are abandoned
once they will clearly miss their guards. The others start from scratch, since all parts of one student may have the same flaw.
Then the best student of that size that may still meet its guards, one of these or its ancestor from growing, continues with
half of the remaining budget. This repeats as long as enough budget is left and decide sees the best of them above its guards,
even if not significantly. The remaining budget goes to the selected student until it stops improving: it had stopped as soon as
decide was sure, and a larger margin makes it more probable that the sealed split proves the guards.

Further passes repeat this for every size in the archive (EV3, arXiv 2310.18893, section 4: synergy).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ev3_distill.core import plateau
from ev3_distill.runtime.ledger import read_rows
from ev3_distill.search import archive
from ev3_distill.search.archive import Entry
from ev3_distill.search.stage import Stage, falls_behind, first_check, is_stuck, leads, trial_steps
from ev3_distill.search.stage_runner import StageRunner
from ev3_distill.students import count_params
from ev3_distill.training.run_dir import read_json, write_json
from ev3_distill.training.setup import TrainingRun
from ev3_distill.types import ErrorBudget, State

TRIALS = "trials.json"
DELIVERABLE = 3  # students of a stage of which decide prefers one: champion, current and safest
ATTEMPTS = 3  # students of each smaller size before the best of them continues
NARROWED_ATTEMPTS = 2  # of which start from a part of the larger student


class SearchPolicy:
    """Decides what a search trains next. Call `grow`, `shrink` and `polish` in this order, then `repeat` for further passes.

    Attributes:
      trials: outcomes of the trials; stored, since the winner of a trial continues and later differs from its outcome.
    """

    def __init__(self, runner: StageRunner):
        self._runner = runner
        self._trials_file = runner.directory / TRIALS
        self.trials: list[dict[str, Any]] = read_json(self._trials_file)["trials"] if self._trials_file.exists() else []

    # Growing.

    def grow(self) -> None:
        """Grows from the first network until the guards are met, no larger size is allowed or the budget is spent."""
        runner = self._runner
        stage, position = runner.first_stage(runner.setup.network), 0
        while True:
            state = runner.train_while_promising(stage, position)
            if bool(state.met) or int(state.clock.cost) >= runner.limit():
                runner.add(stage, state)
                return
            following = self._next_stage(stage, state)
            runner.add(stage, state)
            if following is None:
                return
            stage, position = following, int(state.clock.position)

    def _next_stage(self, stage: Stage, state: State) -> Stage | None:
        """The stage with which a stage that ended below its guards continues."""
        runner, length = self._runner, self._runner.config.ev3.length
        proposals = runner.sizes.larger(stage.network.spec)
        if not proposals:
            return None
        if len(proposals) == 1 and (runner.sizes.ladder or not bool(state.closed)):
            ((move, spec),) = proposals.items()
            return runner.larger_stage(stage, state, spec, move)
        each = (runner.limit() - int(state.clock.cost)) // (1 + len(proposals))
        steps = trial_steps(int(state.clock.cost), each, length)
        if steps < length:
            return None
        options = [runner.longer_stage(stage, state, shares=True)] if bool(state.closed) else []
        options += [runner.larger_stage(stage, state, spec, move) for move, spec in proposals.items()]
        if not (stored := [trial for trial in self.trials if trial["after"] == stage.number]):
            stored = [self._run_trial(stage, state, options, steps=steps, limit=int(state.clock.cost) + each)]
            self.trials += stored
            write_json(self._trials_file, {"trials": self.trials})
        runner.lost += stored[0]["lost"]
        taken = next(option for option in options if option.number == stored[0]["taken"])
        taken.handed = _handed(stored[0])
        return taken

    def _run_trial(
        self, stage: Stage, state: State, options: Sequence[Stage], *, steps: int, limit: int
    ) -> dict[str, Any]:
        """Trains each way to continue for some steps and selects one; returns the outcome as plain data."""
        runner = self._runner
        ends = [runner.train(option, pause=int(state.clock.position) + steps, limit=limit) for option in options]
        order = sorted(range(len(options)), key=lambda i: count_params(ends[i].current.variables))
        longer = ends[0].current.evidence
        if runner.setup.guards and bool(state.closed) and not leads(longer, state.current.evidence, options[0].run):
            order.remove(0)  # guards ask for more, and training longer brought nothing
        best = order[0]
        for i in order[1:]:
            if leads(ends[i].current.evidence, ends[best].current.evidence, options[i].run):
                best = i
        budget, scores = runner.budget, (float(end.current.evidence.promise.mean()) for end in ends)
        return {
            "after": stage.number,
            "steps": steps,
            "proposals": {option.origin: score for option, score in zip(options, scores, strict=True)},
            "taken": options[best].number,
            "lost": sum(int(end.clock.cost) - int(state.clock.cost) for i, end in enumerate(ends) if i != best),
            "iteration": int(ends[best].clock.iteration),
            "budget": {name: value.item() for name, value in budget._asdict().items()},
        }

    # Shrinking.

    def shrink(self) -> None:
        """Trains ever smaller students, each from a part of the last one that met the guards and taught by it."""
        selected = self._selected()
        while selected.met:
            smaller = [entry for entry in self._best_by_size() if entry.params < selected.params]
            entry = self._shrink_to(smaller[-1], selected) if smaller else None
            if entry is None:
                return
            selected = entry

    def _shrink_to(self, like: Entry, larger: Entry) -> Entry | None:
        """A student of a smaller size that meets the guards; None if that is out of reach or too little budget is left."""
        runner = self._runner
        each = max(runner.left() // (2 * ATTEMPTS), first_check(runner.config.ev3.length))
        run: TrainingRun | None = None
        runner.answered(DELIVERABLE)
        while runner.left() >= each:
            run = run or runner.run_with_peer(like, larger)
            for attempt in range(ATTEMPTS):
                part = runner.part_of(larger, like) if attempt < NARROWED_ATTEMPTS else None
                origin = f"{'taught by' if part is None else 'narrower, from'} {larger.number}"
                entry = runner.train_new(run, like, origin, runner.spent() + each, part=part)
                runner.answered(2)
                if entry.met:
                    return entry
                if runner.left() < each:
                    break
            same_size = [entry for entry in runner.entries if entry.params == like.params]
            if promising := [entry for entry in same_size if self._may_still_meet(entry)]:
                runner.answered(len(promising))
                longer = runner.longer_stage(runner.stage_of(archive.best(promising)), runner.last)
                limit = min(runner.spent() + max(runner.left() // 2, each), runner.limit())
                entry = runner.add(longer, runner.train(longer, limit=limit))
                runner.answered(2)
                if entry.met:
                    return entry
                same_size.append(entry)
            runner.answered(2)
            if archive.best(same_size).least_risk < 0:  # decide sees even the best below its guards
                return None
        return None

    def _may_still_meet(self, entry: Entry) -> bool:
        """Whether a student that was not stuck can be expected to meet its guards with all the budget that is left."""
        runner = self._runner
        stage, left = runner.stage_of(entry), runner.left()
        state, ledger = stage.latest(), list(read_rows(stage.ledger))
        cost, start = int(state.clock.cost), ledger[0]["position"] - max(ledger[0]["steps"].values())
        if is_stuck(state):
            return False
        continued = any(one.origin == f"longer, from {entry.number}" for one in runner.entries)
        if left < runner.config.ev3.length or continued:
            return False
        return not falls_behind(ledger, start, int(state.clock.position) - start, until=cost + left)

    def polish(self) -> None:
        """Continues the selected student; the result replaces it if decide ranks it higher."""
        runner, selected = self._runner, self._selected()
        if not selected.met or runner.spent() + runner.config.ev3.length > runner.limit():
            return
        never = jnp.int32(plateau.NO_END)  # decide has proved the goals already
        longer = runner.longer_stage(runner.stage_of(selected), runner.last, met_cost=never)
        runner.add(longer, runner.train(longer), above=selected)

    # Further passes and delivery.

    def repeat(self, number: int) -> None:
        """Pass `number`: every size trains again, smallest first, with the best other student as a second teacher."""
        runner = self._runner
        runner.total = (runner.setup.steps or 0) * number // runner.config.passes
        sizes = self._best_by_size()
        for i, entry in enumerate(sizes):
            runner.answered((len(runner.entries) - 1) * DELIVERABLE)
            peer = archive.best([one for one in runner.entries if one.number != entry.number] or [entry])
            left = runner.left()
            run = runner.run_with_peer(entry, peer)
            limit = runner.spent() + left // (len(sizes) - i)
            runner.train_new(run, entry, f"pass {number}, taught by {peer.number}", limit)

    def _selected(self) -> Entry:
        """The student that the search would deliver now; which one, and whether it met the guards, are answers of decide."""
        self._runner.answered(2 * len(self._runner.entries))
        return archive.select(self._runner.entries)

    def _best_by_size(self) -> list[Entry]:
        """The best entry of each size, smallest first; which ones are the best are answers of decide."""
        entries = self._runner.entries
        sizes = sorted({entry.params for entry in entries})
        for params in sizes:
            self._runner.answered(sum(entry.params == params for entry in entries))
        return [archive.best(entry for entry in entries if entry.params == params) for params in sizes]

    def candidates(self) -> list[Entry]:
        """Students to deliver, the preferred one first: the smallest that may well be proved, and a larger, surer one."""
        entries = self._runner.entries
        possible = [entry for entry in entries if entry.met or entry.p_value <= self._runner.candidate_level]
        if not possible:
            return [archive.best(entries)]
        least = min(entry.params for entry in possible)
        preferred = archive.best(entry for entry in possible if entry.params == least)
        surer = [entry for entry in entries if entry.params > least and entry.p_value < preferred.p_value]
        return [preferred, archive.select(surer)] if surer else [preferred]


def _handed(trial: Mapping[str, Any]) -> tuple[int, ErrorBudget] | None:
    """The error budget with which the winner of a trial continues, and its iteration at that time; None in older records."""
    if "budget" not in trial:
        return None
    stored = trial["budget"]
    budget = ErrorBudget(jnp.int32(stored["tests"]), jnp.int32(stored["promotions"]), jnp.float32(stored["left"]))
    return trial["iteration"], budget
