"""The host loop: iterates the core's step under a budget. The only place where a student grows or is swapped."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.config import EV3
from ev3_distill.core import adapt, allocate, initial_state, make_parts, make_step
from ev3_distill.core.assess import Measures
from ev3_distill.core.explore import fitting
from ev3_distill.core.promote import on_seen
from ev3_distill.data.batches import sampler
from ev3_distill.runtime.distributed import agreed
from ev3_distill.students.quantization import has_batch_stats
from ev3_distill.tasks.classification import example_scores
from ev3_distill.training.devices import ONE, Devices
from ev3_distill.training.dispatch import Programs
from ev3_distill.training.evaluate_students import Judge
from ev3_distill.training.iterate import UNLIMITED, Stream, Supply
from ev3_distill.types import Arm, Decision, Goal, Growth, Network, Objective, Pools, Progress, Sample, State, Variables

DRAWS = 8  # of initial parameters, at most,
DRAWING = 20  # as long as they cost no more than this part of the budget


class Distillation:
    """A student, its arms and objectives, compiled once and run on any pools of one size.

    Attributes:
      devices: that the run is spread over.
      programs: that it has compiled so far.
      stream: the iterations from a state on.
      judge: what it asks of students.
    """

    def __init__(
        self,
        student: Network,
        arms: Sequence[Arm],
        *,
        config: EV3 | None = None,
        sample: Sample | None = None,
        select: Objective = example_scores.DEFAULT_SELECT,
        promise: Objective = example_scores.accuracy,
        goals: Sequence[Goal] = (),
        stop_level: float | None = None,
        devices: Devices = ONE,
    ):
        """Takes what `distill` takes, and the `sample` of the pools, by default one view of each example as it is.

        The run is spread over `devices`; student and arms must then be of `devices.network`.
        """
        config = config or EV3()
        arms = tuple(arms if student.fit is None else (fitting(arm, student.fit) for arm in arms))
        sample = sample or sampler(batch_size=config.batch_size)
        rules: dict[str, Any] = {"select": select, "promise": promise, "goals": tuple(goals)}
        core: dict[str, Any] = {**rules, "stop_level": stop_level, "config": config, "share": devices.share}
        step = make_step(student.apply, arms, sample, **core)
        parts = make_parts(student.apply, arms, sample, **core)
        self.devices = devices
        self.programs = Programs(devices)
        self.stream = Stream(step, parts, self.programs, devices)
        self.judge = Judge(student, Measures(**rules), goals, config=config, devices=devices)

        @devices.jit
        def begin(pools: Pools, seed: jax.Array, draw: jax.Array) -> State:
            init_key, run_key = jax.random.split(jax.random.key(seed))
            init_key = jnp.where(draw > 0, jax.random.fold_in(init_key, draw), init_key)
            return initial_state(
                jax.random.key_data(run_key),
                student.init(init_key),
                pools,
                apply=student.apply,
                arms=arms,
                **rules,
                config=config,
            )

        @devices.jit
        def begin_with(pools: Pools, seed: jax.Array, variables: Variables) -> State:
            _, run_key = jax.random.split(jax.random.key(seed))
            key = jax.random.key_data(run_key)
            return initial_state(key, variables, pools, apply=student.apply, arms=arms, **rules, config=config)

        @devices.jit
        def seen(variables: Variables, pools: Pools) -> jax.Array:
            return on_seen(student.apply, variables, pools, promise, config=config)

        self._begin, self._begin_with, self._seen = begin, begin_with, seen
        self._arms, self._length = arms, config.length
        self._first = allocate.racers_of(arms).index(True)  # who leads a fresh student's first race

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling so far."""
        return self.programs.compile_s

    def begin(self, pools: Pools, seed: int, *, draw: int = 0, variables: Variables | None = None) -> State:
        """The state before the first iteration.

        Args:
          pools: the data.
          seed: of initial parameters, and of what the run draws.
          draw: other initial parameters for each, and all else the same.
          variables: to begin with in their place.
        """
        pools = self.devices.place(pools)
        given = self.devices.place(variables) if variables is not None else None

        def begun() -> State:
            if given is not None:
                return self._begin_with(pools, np.int32(seed), given)
            return self._begin(pools, np.int32(seed), np.int32(draw))

        return self.programs.timed(lambda: jax.block_until_ready(begun()))

    def drawn(
        self,
        pools: Pools,
        seed: int,
        *,
        budget: int = UNLIMITED,
        seconds: float | None = None,
        supply: Supply | None = None,
    ) -> State:
        """The state before the first iteration, with the best of several draws of initial parameters.

        Small networks of ReLUs depend on luck: a unit that its first steps shut for all inputs gets no gradient any more, and
        of three units one or two often are (README has figures). So every draw trains for one iteration; the one that has
        then the most promise on assess begins, from its initial parameters, and what all cost is part of the run's cost.
        A network that normalises, one that has statistics of its inputs, has no such luck and is drawn once.

        Args:
          pools: the data.
          seed: of parameters, batches and keys.
          budget: of the run, of which draws take a twentieth at most; with less than two draws there is nothing to compare.
          seconds: of the run, where wall time is its budget.
          supply: as in `stream`.
        """
        best = self.begin(pools, seed)
        most, began = budget // DRAWING, time.perf_counter()
        if has_batch_stats(best.current) or most < 2 * self._length:
            return best
        compiled, cost, highest = self.compile_s, 0, (-np.inf, -np.inf)
        for draw in range(DRAWS):
            begun = self.begin(pools, seed, draw=draw)
            *_, (packed, decisions) = self.stream(pools, begun, budget=budget, supply=supply, pause=1, at_once=1)
            evidence = self.stream.unpack(packed).current_evidence
            score = float(evidence.promise.mean()), float(evidence.select.mean())
            if score > highest:
                best, highest = begun, score
            one = int(decisions[-1].cost)
            cost += one
            spent = time.perf_counter() - began - (self.compile_s - compiled)
            late = seconds is not None and agreed(spent) > seconds / DRAWING
            if cost + one > most or late:
                break
        return best._replace(cost=jnp.int32(cost), begun=jnp.int32(cost))

    def shapes(self, pools: Pools) -> State:
        """A state's shapes and types; compiles nothing."""
        shapes: State = jax.eval_shape(self._begin, pools, np.int32(0), np.int32(0))
        return shapes

    def grown(self, pools: Pools, state: State, growth: Growth) -> State:
        """The state of a run with a smaller student, to go on from with this one, which computes the same.

        What was proven stays so, and what is left of the error budget; arms of the same names go on from what they had, on
        short trajectories again. The arm that leads is the first again, and where several race they race anew: who won for the
        smaller student may be the wrong one for the larger.
        """
        state = self.devices.taken(state)
        current, champion = growth.variables(state.current), growth.variables(state.champion)
        begun = (arm.init(current) for arm in self._arms)
        arm_states = tuple(
            arm.grow(old, growth) if arm.grow is not None else fresh
            for arm, old, fresh in zip(self._arms, state.arm_states, begun, strict=True)
        )
        progress = state.progress
        if isinstance(progress, Progress):
            progress = adapt.from_here(
                state.current_evidence, self._seen(*self.devices.place((current, pools))), state.position
            )
        return state._replace(
            begun=state.cost,
            current=current,
            champion=champion,
            safest=growth.variables(state.safest) if isinstance(state.safest, Variables) else (),
            arm_states=arm_states,
            length=jnp.float32(self._length),
            stale=jnp.int32(0),
            leader=jnp.int32(self._first),
            round=jnp.int32(0),
            arm_value=jnp.zeros_like(state.arm_value),
            progress=progress,
            met=jnp.bool_(False),
            closed=jnp.bool_(False),
        )

    def again(self, pools: Pools, state: State) -> State:
        """The state of a run that was stuck or met its goals, to go on from at the same size for as long again."""
        if not isinstance(state.progress, Progress):
            return state
        progress = adapt.from_here(
            state.current_evidence, self._seen(*self.devices.place((state.current, pools))), state.position
        )
        return state._replace(progress=progress, met=jnp.bool_(False), closed=jnp.bool_(False))

    def run(
        self,
        pools: Pools,
        state: State,
        *,
        budget: int = UNLIMITED,
        seconds: float | None = None,
        supply: Supply | None = None,
    ) -> Iterator[tuple[State, Decision]]:
        """Yields (state, decision) after each iteration, the closing one last; nothing for a state that is closed.

        Args:
          pools: the data.
          state: to go on from.
          budget: training steps summed over all arms, those in `state` included.
          seconds: wall time from now; the run is then not reproducible bit by bit.
          supply: brings the explore pool part by part, in place of `pools.explore`.
        """
        for packed, (decision,) in self.stream(pools, state, budget=budget, seconds=seconds, supply=supply, at_once=1):
            yield self.stream.unpack(packed), decision

    def complete(self, pools: Pools, seed: int, *, budget: int) -> State:
        """The final state of a whole run from a fresh start, where nobody looks at its decisions."""
        *_, (packed, _) = self.stream(pools, self.drawn(pools, seed, budget=budget), budget=budget)
        return self.stream.unpack(packed)


def distill(
    student: Network,
    pools: Pools,
    arms: Sequence[Arm],
    *,
    seed: int = 0,
    budget: int = 2000,
    config: EV3 | None = None,
    select: Objective = example_scores.DEFAULT_SELECT,
    promise: Objective = example_scores.accuracy,
    goals: Sequence[Goal] = (),
    state: State | None = None,
) -> Iterator[tuple[State, Decision]]:
    """Distils a teacher's logits into a student; a generator of (state, decision), one per EV3 iteration.

    Args:
      student: the network to train.
      pools: the explore, assess and decide splits, with the teacher's logits.
      arms: the ways to improve the student, e.g. `default_arms(student.apply)`.
      seed: of initial parameters, batches and keys.
      budget: training steps summed over all arms.
      config: the core's hyperparameters.
      select: the smooth objective that sees the small steps of one trajectory on assess.
      promise: the {0, 1} objective that compares arms on assess, and by which decide proves promotions.
      goals: what must hold, such as `goal("worst_class_accuracy", 0.7)`; the one at the greatest risk goes before the promise.
      state: to go on from, as yielded before.

    Yields:
      The state after each iteration (`state.champion` is the proven best, `state.current` where exploration stands) and
      the decision that led to it.
    """
    run = Distillation(student, arms, config=config, select=select, promise=promise, goals=goals)
    yield from run.run(pools, run.drawn(pools, seed, budget=budget) if state is None else state, budget=budget)
