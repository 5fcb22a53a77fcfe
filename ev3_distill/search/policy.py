"""The way of a search: it begins small and grows; where that met the guards, it comes back down.

Up. A rung is one size on its way, an EV3 run of its own in sizes/NN that ends when decide proves all guards, when the student
is stuck, with its share of the budget (a part of what is left as long as there is a larger size to try), or as soon as its
guards are clearly out of its reach. Then the student grows into a larger one that computes the same, and goes on from there
with what is left of the error budget. Into which is a question with several answers (wider, deeper, or the same for longer):
each gets a short trial, assess compares them, and a larger one takes the place of a smaller where it leads by TAKEOVER
standard errors. With a ladder of sizes the next one is it.

Down. A smaller student begins with a part of the one that met the guards (`students.narrow`) and learns from it beside the
teacher, next smaller first, as long as each meets the guards in its turn. Of small networks it is in part luck what becomes of
them, so a size has two such draws, which are left as soon as their guards are clearly out of reach, and one that begins afresh,
for parts of one student may all miss the same. Then the best of its size that may yet get there goes on with half of what is
left, one of these or its ancestor from the way up; and again, as long as enough is left and decide sees the best of them above
its guards, if not surely. What is still left is for the one that is found, for as long as it gets anywhere: it had stopped as
soon as decide was sure, and the more it is beyond its guards the surer the sealed split will prove them.

Further passes do the same for every size that there is an entry of (EV3, arXiv 2310.18893, section 4: synergy).

Every rung is resumed from its own checkpoints, what a trial decided is kept, and all else follows from what was there before:
so a search that was killed goes on bit by bit, wherever it was.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.arms import PEER, names_for_peers
from ev3_distill.core import plateau
from ev3_distill.errors import InputError
from ev3_distill.runtime.ledger import read_rows
from ev3_distill.runtime.progress import RunProgress
from ev3_distill.search import archive
from ev3_distill.search.archive import Archive, Entry, Measured
from ev3_distill.search.sizes import Sizes
from ev3_distill.search.stage import Rung, falls_behind, leads, level_of, of_rung, until_of
from ev3_distill.students import count_params
from ev3_distill.students.growth import growth_map, narrow
from ev3_distill.tasks.metrics import steers
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.teachers.targets import PeerTargets, TeacherTargets
from ev3_distill.training.certify_run import metrics_to_claim
from ev3_distill.training.iterate import UNLIMITED, Limits
from ev3_distill.training.memory import eval_batch_size
from ev3_distill.training.run_dir import read_json, write_json
from ev3_distill.training.setup import CHUNK, TrainingRun, TrainingSetup, make_run
from ev3_distill.training.train import iterate_run
from ev3_distill.types import Network, Plateau, State, Variables

TRIALS = "trials.json"
LIKELY = 0.9  # so probable must decide make it that the sealed split will prove the guards
EVEN = 0.5  # and of a smaller one for which it is opened, too
CANDIDATES = 2  # students for which the sealed split may be opened
TRIAL = 0.1  # share of the steps so far that each proposal's trial has
STAGE = 10  # first trajectories, after which a size is first asked whether it will get there
SHARE = 10  # of the budget that is left, the part that a size on the way up may take
DRAWS = 3  # on the way down, students of a size before the best of them goes on
PARTS = 2  # of these begin with a part of the larger one, the others afresh: parts of one student may all miss the same


class Climb:
    """One search on its way. Its methods are called in order: up, down, polish, and again for each further pass."""

    def __init__(
        self,
        directory: Path,
        chosen: Any,
        task: TrainingSetup,
        arm_names: Sequence[str],
        targets: TeacherTargets,
        *,
        progress: RunProgress,
    ):
        self.directory, self.chosen, self.task, self.progress = directory, chosen, task, progress
        self.arm_names, self.targets = tuple(arm_names), targets
        self.archive = Archive(directory, confidence=chosen.confidence)
        self.entries: list[Entry] = []  # so far: a search that was resumed finds later ones in the archive
        self.factory = students.import_factory(str(task.network.spec.get("factory", "")))
        self.rungs: list[Rung] = []
        self.last: State  # of the rung that was entered last
        kept = directory / TRIALS
        self.trials: list[dict[str, Any]] = read_json(kept)["trials"] if kept.exists() else []
        self.lost = 0  # steps of trials that led nowhere
        claims = metrics_to_claim(task.guards, labeled=task.labeled, teacher=True)
        level, goals = (1 - chosen.confidence) / len(claims), max(sum(steers(guard.metric) for guard in task.guards), 1)
        ratio = len(task.rows["decide"]) / len(task.rows["test"])
        self.sure = level_of(level, ratio, LIKELY) / goals  # of each goal, on decide
        self.even = level_of(level / CANDIDATES, ratio, EVEN) / goals
        self.stops = self.sure * goals / (1 - chosen.confidence)
        self.total = (task.steps or 0) // chosen.passes
        self.sizes = Sizes(chosen, task, factory=self.factory)

    # Up.

    def up(self) -> None:
        """From the start until the guards are met, nothing larger is allowed or the budget is spent."""
        seed, first, position = self.chosen.seed, self._course(self.task.network), 0
        begin = functools.partial(
            first.distillation.begin_best, first.pools, seed, budget=self.total, pipeline=first.pipeline
        )
        rung = self._rung(self.task.network, first, "begun", begin, shares=True)
        while True:
            state = self._risen(rung, position)
            if bool(state.met) or int(state.clock.cost) >= self._limit():
                self._enter(rung, state)
                return
            following = self._grown(rung, state)
            self._enter(rung, state)
            if following is None:
                return
            rung, position = following, int(state.clock.position)

    def _risen(self, rung: Rung, position: int, *, limit: int | None = None) -> State:
        """Trains a size from that global step on, and leaves it early where it is not on the way to its guards."""
        steps = STAGE * self.chosen.ev3.length
        while self.task.guards and self.sizes.larger(rung.network.spec):
            state = self._trained(rung, pause=position + steps, limit=limit)
            told = list(read_rows(rung.folder / "ledger.jsonl"))
            until = min(until_of(state), self._limit())
            if bool(state.closed) or falls_behind(told, position, steps, until=until):
                return state
            steps *= 2
        return self._trained(rung, limit=limit)

    def _grown(self, rung: Rung, state: State) -> Rung | None:
        """The rung that a stuck one goes on as."""
        proposals = self.sizes.larger(rung.network.spec)
        if not proposals:
            return None
        if len(proposals) == 1 and (self.sizes.ladder or not bool(state.closed)):
            ((name, spec),) = proposals.items()
            return self._larger_rung(rung, state, spec, name)
        count = 1 + len(proposals)
        each = (self._limit() - int(state.clock.cost)) // count
        steps = min(max(2 * self.chosen.ev3.length, round(TRIAL * int(state.clock.cost))), each)
        if steps < self.chosen.ev3.length:
            return None
        tried = [self._longer_rung(rung, state, shares=True)] if bool(state.closed) else []
        tried += [self._larger_rung(rung, state, spec, name) for name, spec in proposals.items()]
        if not (decided := [trial for trial in self.trials if trial["after"] == rung.number]):
            decided = [self._tried(rung, state, tried, steps=steps, limit=int(state.clock.cost) + each)]
            self.trials += decided
            write_json(self.directory / TRIALS, {"trials": self.trials})
        self.lost += decided[0]["lost"]
        return next(one for one in tried if one.number == decided[0]["taken"])

    def _tried(self, rung: Rung, state: State, tried: Sequence[Rung], *, steps: int, limit: int) -> dict[str, Any]:
        """A trial of what a stuck rung may go on as, plain data; kept, for the winner goes on and is another one then."""
        ended = [self._trained(one, pause=int(state.clock.position) + steps, limit=limit) for one in tried]
        order = sorted(range(len(tried)), key=lambda i: count_params(ended[i].current.variables))
        longer = ended[0].current.evidence
        if self.task.guards and bool(state.closed) and not leads(longer, state.current.evidence, tried[0].course):
            order.remove(0)  # guards ask for more, and more of the same brought nothing
        best = order[0]
        for i in order[1:]:
            if leads(ended[i].current.evidence, ended[best].current.evidence, tried[i].course):
                best = i
        scores = (float(after.current.evidence.promise.mean()) for after in ended)
        return {
            "after": rung.number,
            "steps": steps,
            "proposals": {one.how: score for one, score in zip(tried, scores, strict=True)},
            "taken": tried[best].number,
            "lost": sum(int(after.clock.cost) - int(state.clock.cost) for i, after in enumerate(ended) if i != best),
        }

    def _larger_rung(self, rung: Rung, state: State, spec: dict[str, Any], name: str) -> Rung:
        network = students.build(spec, factory=self.factory)
        course = self._course(network)

        def start() -> State:
            seed = self._seed()
            try:
                map_ = growth_map(jax.random.key(seed), rung.network.spec, network.spec, factory=self.factory)
            except InputError:  # no growth keeps the function: the larger student starts afresh
                return self._fresh(course, state, seed)
            grown = course.distillation.grow(course.pools, state, map_)
            clock = grown.clock
            return grown._replace(clock=clock._replace(tested_cost=jnp.maximum(clock.tested_cost, clock.cost)))

        return self._rung(network, course, f"{name}, from {rung.number}", start, shares=True)

    def _longer_rung(
        self, rung: Rung, spent: State, *, shares: bool = False, met_cost: jax.Array | None = None
    ) -> Rung:
        """The rung that the student of an earlier one goes on as, where the run has come to what was spent."""
        distillation = rung.course.distillation

        def start() -> State:
            state = distillation.extend(rung.course.pools, rung.known())
            clock, cost = state.clock, spent.clock.cost
            start_cost = cost - (clock.cost - clock.start_cost)  # the student has used as much as before
            clock = clock._replace(cost=cost, start_cost=start_cost, tested_cost=cost)
            if met_cost is not None:
                clock = clock._replace(met_cost=met_cost)
            return state._replace(clock=clock, budget=spent.budget)

        return self._rung(rung.network, rung.course, f"longer, from {rung.number}", start, shares=shares)

    # Down, and again.

    def down(self) -> None:
        """Smaller students, each of a part of the one that met the guards, which teaches them."""
        found = archive.chosen(self.entries)
        while found.met:
            smaller = [entry for entry in self._by_size() if entry.params < found.params]
            entry = self._narrowed(smaller[-1], found) if smaller else None
            if entry is None:
                return
            found = entry

    def _narrowed(self, like: Entry, found: Entry) -> Entry | None:
        """One of a smaller size that meets the guards; none where there is none in sight, or too little is left."""
        each = max(self._left() // (2 * DRAWS), STAGE * self.chosen.ev3.length)
        course: TrainingRun | None = None
        while self._left() >= each:
            course = course or self._course_with(like, found)
            for draw in range(DRAWS):
                part = self._part_of(found, like) if draw < PARTS else None
                how = f"{'taught by' if part is None else 'narrower, from'} {found.number}"
                entry = self._begun(course, like, how, self._spent() + each, part=part)
                if entry.met:
                    return entry
                if self._left() < each:
                    break
            own = [one for one in self.entries if one.params == like.params]
            if hopeful := [one for one in own if self._may_yet(one)]:
                longer = self._longer_rung(self.rung_of(archive.best(hopeful)), self.last)
                limit = min(self._spent() + max(self._left() // 2, each), self._limit())
                entry = self._enter(longer, self._trained(longer, limit=limit))
                if entry.met:
                    return entry
                own.append(entry)
            if archive.best(own).least_risk < 0:  # decide sees even the best below its guards
                return None
        return None

    def _may_yet(self, entry: Entry) -> bool:
        """Whether a student that was left before it was stuck is on the way to its guards, with all the steps that are left."""
        rung, left = self.rung_of(entry), self._left()
        state, told = rung.known(), list(read_rows(rung.folder / "ledger.jsonl"))
        cost, begun = int(state.clock.cost), told[0]["position"] - max(told[0]["steps"].values())
        if isinstance(state.plateau, Plateau) and bool(state.plateau.stuck) and cost < until_of(state):
            return False
        if left < self.chosen.ev3.length or any(one.how == f"longer, from {entry.number}" for one in self.entries):
            return False
        return not falls_behind(told, begun, int(state.clock.position) - begun, until=cost + left)

    def rung_of(self, entry: Entry) -> Rung:
        """Whose student it is."""
        return next(one for one in self.rungs if one.number == entry.number)

    def polish(self) -> None:
        """The student that met the guards goes on, and takes its own place where decide ranks it higher."""
        found = archive.chosen(self.entries)
        if not found.met or self._spent() + self.chosen.ev3.length > self._limit():
            return
        met = jnp.int32(plateau.NO_END)  # decide has said so
        longer = self._longer_rung(self.rung_of(found), self.last, met_cost=met)
        self._enter(longer, self._trained(longer), above=found)

    def again(self, number: int) -> None:
        """A further pass: every size starts again, smallest first, and the best student so far is its peer."""
        self.total = (self.task.steps or 0) * number // self.chosen.passes
        sizes = self._by_size()
        for i, entry in enumerate(sizes):
            peer = archive.best([one for one in self.entries if one.number != entry.number] or [entry])
            left = self._left()
            course = self._course_with(entry, peer)
            limit = self._spent() + left // (len(sizes) - i)
            self._begun(course, entry, f"pass {number}, taught by {peer.number}", limit)

    def _by_size(self) -> list[Entry]:
        """The best entry of each size, smallest first."""
        sizes = sorted({entry.params for entry in self.entries})
        return [archive.best(one for one in self.entries if one.params == params) for params in sizes]

    def _course_with(self, like: Entry, peer: Entry) -> TrainingRun:
        """That of a size, with a student that teaches beside the teacher."""
        network = students.build(like.spec, factory=self.factory)
        teaches = students.load(self._folder(peer.number), factory=self.factory)
        at_once = eval_batch_size(self.task.dataset, self.task.memory, CHUNK)
        targets = PeerTargets(self.targets, forward(*teaches), batch_size=at_once)
        names = (*self.arm_names, *names_for_peers(network.spec))
        task = dataclasses.replace(
            self.task, teacher_features={**self.task.teacher_features, PEER: (network.spec["num_classes"],)}
        )
        return self._course(network, task=task, names=names, targets=targets)

    def _part_of(self, larger: Entry, like: Entry) -> Variables | None:
        """What a student of a smaller size may begin with; none where nothing of the larger one is of use."""
        variables = students.load(self._folder(larger.number), factory=self.factory)[1]
        try:
            return narrow(jax.random.key(self._seed()), larger.spec, variables, like.spec, factory=self.factory)[1]
        except InputError:
            return None

    def _begun(self, course: TrainingRun, like: Entry, how: str, limit: int, *, part: Variables | None = None) -> Entry:
        """A student of a size that begins in a run that goes on: with a part of another, while that is of use, or afresh."""
        network, before, seed = students.build(like.spec, factory=self.factory), self.last, self._seed()

        def start() -> State:
            if part is None:
                return self._fresh(course, before, seed)
            return self._goes_on(course, before, course.distillation.begin(course.pools, seed, variables=part))

        rung = self._rung(network, course, how, start)
        if part is None:
            return self._enter(rung, self._trained(rung, limit=limit))
        return self._enter(rung, self._risen(rung, int(before.clock.position), limit=limit))

    def _seed(self) -> int:
        """Of the next rung."""
        return int(self.chosen.seed) + len(self.rungs)

    def _fresh(self, course: TrainingRun, before: State, seed: int) -> State:
        """A fresh student, the best of several draws."""
        left = self._limit() - int(before.clock.cost)
        return self._goes_on(
            course, before, course.distillation.begin_best(course.pools, seed, budget=left, pipeline=course.pipeline)
        )

    def _goes_on(self, course: TrainingRun, before: State, begun: State) -> State:
        """A student that begins, in a run that goes on: cost, position and error budget are those of before."""
        state = course.distillation.extend(
            course.pools, begun._replace(clock=begun.clock._replace(position=before.clock.position))
        )
        cost = before.clock.cost + begun.clock.cost
        return state._replace(clock=state.clock._replace(cost=cost, start_cost=cost), budget=before.budget)

    # Rungs.

    def _course(
        self, network: Network, *, task: TrainingSetup | None = None, names: Sequence[str] = (), targets: Any = None
    ) -> TrainingRun:
        task = dataclasses.replace(task or self.task, network=network)
        return make_run(self.chosen, task, names or self.arm_names, targets or self.targets, stop_share=self.stops)

    def _folder(self, number: int) -> Path:
        return self.directory / "sizes" / f"{number:02d}"

    def _rung(
        self, network: Network, course: TrainingRun, how: str, start: Callable[[], State], *, shares: bool = False
    ) -> Rung:
        number = len(self.rungs) + 1
        folder = self._folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        shares = shares and bool(self.sizes.larger(network.spec))

        def begin() -> State:
            state = of_rung(start(), number)
            if not shares or not isinstance(state.plateau, Plateau):
                return state
            until = int(state.clock.cost) + (self._limit() - int(state.clock.cost)) // SHARE
            return state._replace(plateau=state.plateau._replace(until=jnp.int32(until)))

        rung = Rung(number, folder, network, course, how, begin)
        self.rungs.append(rung)
        return rung

    def _limit(self) -> int:
        """Cost that a rung may reach."""
        return self.total - self.lost

    def _spent(self) -> int:
        """Cost so far."""
        return int(self.last.clock.cost)

    def _left(self) -> int:
        """Cost that may still be."""
        return self._limit() - self._spent()

    def _trained(self, rung: Rung, *, limit: int | None = None, pause: int = UNLIMITED) -> State:
        limits = Limits(self._limit() if limit is None else limit, None, pause)
        state = iterate_run(
            rung.folder,
            self.chosen,
            rung.course,
            self.targets,
            self.progress,
            limits=limits,
            start=rung.start,
            row_facts={"size": rung.number},
        )
        rung.state = state
        return state

    def _enter(self, rung: Rung, state: State, *, above: Entry | None = None) -> Entry:
        """The rung's student, saved and in the archive; met, too, where decide ranks it above an entry that was."""
        distillation, pools = rung.course.distillation, rung.course.pools
        _, variables = distillation.evaluator.select(pools, state)

        def measure(variables: Variables) -> Measured:
            evidence = distillation.evaluator.evaluate(variables, pools.decide)
            met, risk, _ = distillation.evaluator.rank(evidence)
            p_value = distillation.evaluator.p_value(variables, pools.decide)
            return Measured(np.asarray(evidence.promise), met, risk, p_value)

        def meets(measured: Measured) -> bool:
            return measured.p_value <= self.sure or (above is not None and measured.rank > above.rank)

        if not any(entry.number == rung.number for entry in self.archive.entries):
            students.save(rung.folder / "student", rung.network, variables)
        entry = self.archive.enter(
            variables,
            measure,
            number=rung.number,
            network=students.name_of(rung.network.spec),
            spec=dict(rung.network.spec),
            how=rung.how,
            cost=int(state.clock.cost) + self.lost,
            meets=meets,
        )
        self.entries.append(entry)
        self.last = state
        return entry

    def candidates(self) -> list[Entry]:
        """What to deliver, the most wanted first: the smallest for which the odds are even, and a larger one that is surer."""
        even = [one for one in self.entries if one.met or one.p_value <= self.even]
        if not even:
            return [archive.best(self.entries)]
        least = min(one.params for one in even)
        wanted = archive.best(one for one in even if one.params == least)
        larger = [one for one in self.entries if one.params > least and one.p_value < wanted.p_value]
        return [wanted, archive.chosen(larger)] if larger else [wanted]
