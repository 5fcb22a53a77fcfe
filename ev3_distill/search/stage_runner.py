"""Creates and trains the stages of a search, and adds their students to the archive.

Every stage resumes from its own checkpoints, and everything else follows from what was stored before, so a search that was
killed continues bit by bit where it stopped.

All stages share one error budget, in the order in which they are trained: each begins with what the one before left. Where
the search itself follows an answer of decide, `answered` divides the budget. See docs/explanation/error-budget.md.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.arms import PEER, peer_arm_names
from ev3_distill.config import Compress
from ev3_distill.core import adapt
from ev3_distill.errors import InputError
from ev3_distill.runtime.ledger import read_rows
from ev3_distill.runtime.progress import RunProgress
from ev3_distill.search.archive import Archive, Entry, Measurement
from ev3_distill.search.sizes import Sizes
from ev3_distill.search.stage import (
    Stage,
    cost_limit,
    falls_behind,
    first_check,
    first_state,
    required_levels,
    stage_limit,
)
from ev3_distill.students.growth import growth_map, narrow
from ev3_distill.tasks.metrics import steers
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.teachers.targets import PeerTargets, TeacherTargets
from ev3_distill.training.certify_run import metrics_to_claim
from ev3_distill.training.iterate import UNLIMITED, Limits
from ev3_distill.training.memory import eval_batch_size
from ev3_distill.training.setup import CHUNK, TrainingRun, TrainingSetup, make_run
from ev3_distill.training.train import iterate_run
from ev3_distill.types import ErrorBudget, Network, Plateau, State, Variables


class StageRunner:
    """The stages of one search and what they share: data, teacher, budget and archive.

    Attributes:
      stages: in the order of their creation.
      entries: students added so far. When a search resumes, the archive already has later ones.
      last: state of the stage that was added last; cost and position continue from it.
      budget: the error budget that is left for the next stage.
      lost: steps of trials that were not continued.
      total: cost that the search may reach.
      candidate_level: p-value on decide below which a student is worth opening the sealed split.
    """

    last: State

    def __init__(
        self,
        directory: Path,
        config: Compress,
        setup: TrainingSetup,
        arm_names: Sequence[str],
        targets: TeacherTargets,
        *,
        progress: RunProgress,
    ):
        self.directory, self.config, self.setup = directory, config, setup
        self._arm_names, self._targets, self._progress = tuple(arm_names), targets, progress
        self.factory = students.import_factory(str(setup.network.spec.get("factory", "")))
        self.sizes = Sizes(config, setup, factory=self.factory)
        self.archive = Archive(directory, confidence=config.confidence)
        self.entries: list[Entry] = []
        self.stages: list[Stage] = []
        self.lost = 0
        self.budget = adapt.initial_budget(config.ev3.delta)
        self.total = (setup.steps or 0) // config.passes
        claims = metrics_to_claim(setup.guards, labeled=setup.labeled, teacher=True)
        level, goals = (
            (1 - config.confidence) / len(claims),
            max(sum(steers(guard.metric) for guard in setup.guards), 1),
        )
        ratio = len(setup.rows["decide"]) / len(setup.rows["test"])
        self._met_level, self.candidate_level = required_levels(level, ratio, goals)
        self._stop_share = self._met_level * goals / (1 - config.confidence)

    # The budget.

    def limit(self) -> int:
        """Cost that a stage may reach."""
        return self.total - self.lost

    def spent(self) -> int:
        """Cost so far."""
        return int(self.last.clock.cost)

    def left(self) -> int:
        """Cost that is left."""
        return self.limit() - self.spent()

    # Training.

    def train(self, stage: Stage, *, limit: int | None = None, pause: int = UNLIMITED) -> State:
        """Trains a stage up to a cost, or until it pauses at a global step."""
        limits = Limits(self.limit() if limit is None else limit, None, pause)
        stage.state = iterate_run(
            stage.folder,
            self.config,
            stage.run,
            self._targets,
            self._progress,
            limits=limits,
            start=stage.begin,
            row_facts={"size": stage.number},
        )
        self.budget = ErrorBudget(*map(jnp.asarray, jax.device_get(stage.state.budget)))
        return stage.state

    def answered(self, answers: int) -> None:
        """Divides the error budget among the possible answers of decide that the search follows here."""
        self.budget = adapt.divide(self.budget, max(answers, 1))

    def train_while_promising(self, stage: Stage, position: int, *, limit: int | None = None) -> State:
        """Trains a stage that starts at a global step, and abandons it once it will clearly miss its guards."""
        steps = first_check(self.config.ev3.length)
        while self.setup.guards and self.sizes.larger(stage.network.spec):
            state = self.train(stage, pause=position + steps, limit=limit)
            until = min(cost_limit(state), self.limit())
            if bool(state.closed) or falls_behind(list(read_rows(stage.ledger)), position, steps, until=until):
                return state
            steps *= 2
        return self.train(stage, limit=limit)

    def add(self, stage: Stage, state: State, *, above: Entry | None = None) -> Entry:
        """Saves the student of a stage and adds it to the archive.

        Args:
          stage: trained.
          state: its final state.
          above: an entry that met its guards; a student that decide ranks above it meets them as well.
        """
        evaluator, pools = stage.run.distillation.evaluator, stage.run.pools
        _, variables = evaluator.select(pools, state)

        def measure(variables: Variables) -> Measurement:
            evidence = evaluator.evaluate(variables, pools.decide)
            met, risk, _ = evaluator.rank(evidence)
            return Measurement(np.asarray(evidence.promise), met, risk, evaluator.p_value(variables, pools.decide))

        def meets(measurement: Measurement) -> bool:
            return measurement.p_value <= self._met_level or (above is not None and measurement.rank > above.rank)

        if not any(entry.number == stage.number for entry in self.archive.entries):
            students.save(stage.folder / "student", stage.network, variables)
        entry = self.archive.add(
            variables,
            measure,
            number=stage.number,
            network=students.name_of(stage.network.spec),
            spec=dict(stage.network.spec),
            origin=stage.origin,
            cost=int(state.clock.cost) + self.lost,
            meets=meets,
        )
        self.entries.append(entry)
        self.last = state
        return entry

    def stage_of(self, entry: Entry) -> Stage:
        """The stage that trained an entry's student."""
        return next(stage for stage in self.stages if stage.number == entry.number)

    # New stages.

    def first_stage(self, network: Network) -> Stage:
        """The stage with which the search starts."""
        run = self._make_run(network)

        def start() -> State:
            return run.distillation.begin_best(run.pools, self.config.seed, budget=self.total, pipeline=run.pipeline)

        return self._new_stage(network, run, "begun", start, shares=True)

    def larger_stage(self, stage: Stage, state: State, spec: dict[str, Any], move: str) -> Stage:
        """The stage in which a student continues at a larger size; it computes the same function at first."""
        network = students.build(spec, factory=self.factory)
        run = self._make_run(network)

        def start() -> State:
            seed = self._seed()
            try:
                mapping = growth_map(jax.random.key(seed), stage.network.spec, network.spec, factory=self.factory)
            except InputError:  # no growth keeps the function: the larger student starts from scratch
                return self._start_from_scratch(run, state, seed)
            grown = run.distillation.grow(run.pools, state, mapping)
            clock = grown.clock
            clock = clock._replace(tested_cost=jnp.maximum(clock.tested_cost, clock.cost))
            return grown._replace(clock=clock, budget=self.budget)

        return self._new_stage(network, run, f"{move}, from {stage.number}", start, shares=True)

    def longer_stage(
        self, stage: Stage, spent: State, *, shares: bool = False, met_cost: jax.Array | None = None
    ) -> Stage:
        """The stage in which the student of an earlier one trains longer.

        Args:
          stage: the earlier one.
          spent: the state whose cost the search has reached.
          shares: whether it may use only a part of the remaining budget.
          met_cost: replaces the cost of the last test on decide of all goals.
        """
        distillation = stage.run.distillation

        def start() -> State:
            state = distillation.extend(stage.run.pools, stage.latest())
            clock, cost = state.clock, spent.clock.cost
            start_cost = cost - (clock.cost - clock.start_cost)  # the student has used as much as before
            clock = clock._replace(cost=cost, start_cost=start_cost, tested_cost=cost)
            if met_cost is not None:
                clock = clock._replace(met_cost=met_cost)
            return state._replace(clock=clock, budget=self.budget)

        return self._new_stage(stage.network, stage.run, f"longer, from {stage.number}", start, shares=shares)

    def train_new(
        self, run: TrainingRun, like: Entry, origin: str, limit: int, *, part: Variables | None = None
    ) -> Entry:
        """Trains a new student of an entry's size, from a part of a larger student or from scratch.

        A student from a part is abandoned once it will clearly miss its guards.
        """
        network, before, seed = students.build(like.spec, factory=self.factory), self.last, self._seed()

        def start() -> State:
            if part is None:
                return self._start_from_scratch(run, before, seed)
            return self._continue_run(run, before, run.distillation.begin(run.pools, seed, variables=part))

        stage = self._new_stage(network, run, origin, start)
        if part is None:
            return self.add(stage, self.train(stage, limit=limit))
        return self.add(stage, self.train_while_promising(stage, int(before.clock.position), limit=limit))

    def run_with_peer(self, like: Entry, peer: Entry) -> TrainingRun:
        """The run of an entry's size in which another student teaches beside the teacher."""
        network = students.build(like.spec, factory=self.factory)
        peer_student = students.load(self._folder(peer.number), factory=self.factory)
        at_once = eval_batch_size(self.setup.dataset, self.setup.memory, CHUNK)
        targets = PeerTargets(self._targets, forward(*peer_student), batch_size=at_once)
        names = (*self._arm_names, *peer_arm_names(network.spec))
        setup = dataclasses.replace(
            self.setup, teacher_features={**self.setup.teacher_features, PEER: (network.spec["num_classes"],)}
        )
        return self._make_run(network, setup=setup, names=names, targets=targets)

    def part_of(self, larger: Entry, like: Entry) -> Variables | None:
        """A part of a larger student from which one of a smaller size can start; None if no part fits."""
        variables = students.load(self._folder(larger.number), factory=self.factory)[1]
        try:
            return narrow(jax.random.key(self._seed()), larger.spec, variables, like.spec, factory=self.factory)[1]
        except InputError:
            return None

    def _seed(self) -> int:
        """Seed of the next stage."""
        return int(self.config.seed) + len(self.stages)

    def _start_from_scratch(self, run: TrainingRun, before: State, seed: int) -> State:
        """The best of several random initializations, in a search that continues."""
        left = self.limit() - int(before.clock.cost)
        return self._continue_run(
            run, before, run.distillation.begin_best(run.pools, seed, budget=left, pipeline=run.pipeline)
        )

    def _continue_run(self, run: TrainingRun, before: State, new: State) -> State:
        """A new student in a search that continues: cost and position follow those of before."""
        state = run.distillation.extend(
            run.pools, new._replace(clock=new.clock._replace(position=before.clock.position))
        )
        cost = before.clock.cost + new.clock.cost
        return state._replace(clock=state.clock._replace(cost=cost, start_cost=cost), budget=self.budget)

    def _make_run(
        self, network: Network, *, setup: TrainingSetup | None = None, names: Sequence[str] = (), targets: Any = None
    ) -> TrainingRun:
        setup = dataclasses.replace(setup or self.setup, network=network)
        return make_run(
            self.config,
            setup,
            names or self._arm_names,
            targets or self._targets,
            stop_share=self._stop_share,
            continues=True,
        )

    def _folder(self, number: int) -> Path:
        return self.directory / "sizes" / f"{number:02d}"

    def _new_stage(
        self, network: Network, run: TrainingRun, origin: str, start: Callable[[], State], *, shares: bool = False
    ) -> Stage:
        number = len(self.stages) + 1
        folder = self._folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        shares = shares and bool(self.sizes.larger(network.spec))

        def begin() -> State:
            state = first_state(start(), number)
            if not shares or not isinstance(state.plateau, Plateau):
                return state
            until = stage_limit(int(state.clock.cost), self.limit())
            return state._replace(plateau=state.plateau._replace(until=jnp.int32(until)))

        stage = Stage(number, folder, network, run, origin, begin)
        self.stages.append(stage)
        return stage
