"""Trains a student by EV3 iterations under a budget. Only here does a student grow or get replaced."""

import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, Ending, Objectives, initial_state, make_parts, make_step
from ev3_distill.core.explore import fitting
from ev3_distill.core.plateau import start_plateau
from ev3_distill.core.promote import seen_scores
from ev3_distill.data.batches import Resident, sampler
from ev3_distill.data.shuffle import Order
from ev3_distill.runtime.distributed import broadcast_number
from ev3_distill.students.quantization import has_batch_stats
from ev3_distill.tasks.classification.task import classification
from ev3_distill.training.devices import ONE, Devices
from ev3_distill.training.dispatch import Programs
from ev3_distill.training.evaluate_students import StudentEvaluator
from ev3_distill.training.iterate import UNLIMITED, IterationLoop, Pipeline
from ev3_distill.types import Arm, Decision, Growth, Network, Plateau, Pools, Sample, State, Variables

AT_BUDGET = Ending()  # decisions are made until the budget is spent
DRAWS = 8  # largest number of draws of initial parameters that compete
DRAWING_SHARE = 20  # they may cost this part of the budget: budget // DRAWING_SHARE


class Distillation:
    """A student with its arms and objectives, compiled once and run on any pools of one size.

    Attributes:
      devices: of the run.
      programs: compiled so far.
      loop: iterates from a state.
      evaluator: scores and ranks students.
    """

    def __init__(
        self,
        student: Network,
        arms: Sequence[Arm],
        *,
        config: EV3 | None = None,
        sample: Sample | None = None,
        objectives: Objectives | None = None,
        ending: Ending = AT_BUDGET,
        devices: Devices = ONE,
    ):
        """Builds the run.

        Args:
          student: the network to train; of `devices.network`.
          arms: the ways to improve the student.
          config: hyperparameters of the core.
          sample: makes batches of the explore pool; by default one view of each example without augmentation.
          objectives: that score students; by default those of classification.
          ending: how the run ends; for a final phase the explore pool must hold all three splits.
          devices: of the run.
        """
        config = config or EV3()
        arms = tuple(arms if student.fit is None else (fitting(arm, student.fit) for arm in arms))
        algorithm = Algorithm(
            student.apply,
            arms,
            sample or sampler(batch_size=config.batch_size),
            objectives or classification().objectives(),
            config,
            distribute=devices.distribute,
            **ending._asdict(),
        )
        self.devices, self._algorithm = devices, algorithm
        self.programs = Programs(devices)
        self.loop = IterationLoop(
            devices.whole_step(make_step(algorithm)), make_parts(algorithm), self.programs, devices
        )
        self.evaluator = StudentEvaluator(
            student, algorithm.objectives, batch_size=config.eval_batch_size, devices=devices
        )

        @devices.jit
        def begin(pools: Pools, seed: jax.Array, draw: jax.Array) -> State:
            init_key, run_key = jax.random.split(jax.random.key(seed))
            init_key = jnp.where(draw > 0, jax.random.fold_in(init_key, draw), init_key)
            return initial_state(jax.random.key_data(run_key), student.init(init_key), pools, algorithm)

        @devices.jit
        def begin_with(pools: Pools, seed: jax.Array, variables: Variables) -> State:
            _, run_key = jax.random.split(jax.random.key(seed))
            return initial_state(jax.random.key_data(run_key), variables, pools, algorithm)

        @devices.jit
        def seen(variables: Variables, pools: Pools) -> jax.Array:
            return seen_scores(algorithm, variables, pools)

        self._begin, self._begin_with, self._seen = begin, begin_with, seen

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling so far."""
        return self.programs.compile_s

    def begin(self, pools: Pools, seed: int, *, draw: int = 0, variables: Variables | None = None) -> State:
        """The state before the first iteration.

        Args:
          pools: the data.
          seed: of the initial parameters and of everything random in the run.
          draw: each number gives other initial parameters, and everything else is the same.
          variables: to start from, instead of initial parameters.
        """
        pools = self.devices.place(pools)
        placed = self.devices.place(variables) if variables is not None else None

        def compute() -> State:
            if placed is not None:
                return self._begin_with(pools, np.int32(seed), placed)
            return self._begin(pools, np.int32(seed), np.int32(draw))

        return self.programs.timed(lambda: jax.block_until_ready(compute()))

    def begin_best(
        self,
        pools: Pools,
        seed: int,
        *,
        budget: int = UNLIMITED,
        seconds: float | None = None,
        pipeline: Pipeline | None = None,
    ) -> State:
        """The state before the first iteration, with the best of several draws of initial parameters.

        Small ReLU networks depend on their initial parameters: a unit that the first steps shut for all inputs gets no
        gradient any more, and of three units one or two often are. So every draw trains for one iteration. The draw
        with the highest promise score on assess after it starts the run, from its initial parameters; the cost of all
        draws counts as cost of the run. Networks with BatchNorm are initialized once.

        Args:
          pools: the data.
          seed: of parameters, batches and keys.
          budget: of the run; draws take a twentieth of it at most. If that is less than two draws, there is one.
          seconds: of the run, if wall time is its budget.
          pipeline: as for `loop`.
        """
        first = self.begin(pools, seed)
        best = self._alone(first)
        most, start = budget // DRAWING_SHARE, time.perf_counter()
        if has_batch_stats(best.current.variables) or most < 2 * self._algorithm.config.length:
            return first
        compiled, cost, highest = self.compile_s, 0, (-np.inf, -np.inf)
        for draw in range(DRAWS):
            initial = self._alone(self.begin(pools, seed, draw=draw))
            *_, (after, decisions) = self.loop(pools, initial, budget=budget, pipeline=pipeline, pause=1, at_once=1)
            evidence = after.current.evidence
            score = float(np.asarray(evidence.promise).mean()), float(np.asarray(evidence.select).mean())
            if score > highest:
                best, highest = initial, score
            one = int(decisions[-1].cost)
            cost += one
            spent = time.perf_counter() - start - (self.compile_s - compiled)
            late = seconds is not None and broadcast_number(spent) > seconds / DRAWING_SHARE
            if cost + one > most or late:
                break
        drawn = jax.device_put(np.int32(cost))
        best = best._replace(clock=best.clock._replace(cost=drawn, start_cost=drawn))
        return best._replace(arms=best.arms._replace(racing=first.arms.racing))

    def _alone(self, state: State) -> State:
        """The state with the race over: the leader trains alone."""
        racing = jax.device_put(np.arange(len(self._algorithm.arms)) == int(state.arms.leader))
        return state._replace(arms=state.arms._replace(racing=racing))

    def shapes(self, pools: Pools) -> State:
        """A state's shapes and types; compiles nothing."""
        shapes: State = jax.eval_shape(self._begin, pools, np.int32(0), np.int32(0))
        return shapes

    def grow(self, pools: Pools, state: State, growth: Growth) -> State:
        """The state of a run with a smaller student, mapped to this larger student, which computes the same.

        Proofs and the remaining error budget stay valid. Every arm starts from the grown student, and the same arm leads. (With
        the optimizer state of its long trajectory, 6 of 12 grown students of digits were stuck at once.)
        """
        state = self.devices.gather(state)
        current, champion, old = state.current, state.champion, state.arms
        variables = growth.variables(current.variables)
        safest = state.safest.variables
        grown = state._replace(
            current=current._replace(variables=variables),
            champion=champion._replace(variables=growth.variables(champion.variables)),
            safest=state.safest._replace(variables=growth.variables(safest) if isinstance(safest, Variables) else ()),
            arms=old._replace(
                states=tuple(arm.init(variables) for arm in self._algorithm.arms),
                length=jnp.float32(self._algorithm.config.length),
                racing=jnp.arange(len(old.value)) == old.leader,
                asked=jnp.int32(-1),
                lag=jnp.zeros_like(old.lag),
                value=jnp.zeros_like(old.value),
            ),
            clock=state.clock._replace(start_cost=state.clock.cost, stale=jnp.int32(0)),
            met=jnp.bool_(False),
            closed=jnp.bool_(False),
        )
        return grown._replace(plateau=self._fresh_plateau(pools, grown))

    def extend(self, pools: Pools, state: State) -> State:
        """The state of a run that was stuck or met its goals, to continue at the same size with a fresh patience."""
        if not isinstance(state.plateau, Plateau):
            return state
        plateau = self._fresh_plateau(pools, state)
        return state._replace(plateau=plateau, met=jnp.bool_(False), closed=jnp.bool_(False))

    def _fresh_plateau(self, pools: Pools, state: State) -> Plateau | tuple[()]:
        if not isinstance(state.plateau, Plateau):
            return ()
        seen = self._seen(*self.devices.place((state.current.variables, pools)))
        return start_plateau(state.current.evidence, seen, state.clock.position)

    def run(
        self,
        pools: Pools,
        state: State,
        *,
        budget: int = UNLIMITED,
        seconds: float | None = None,
        pipeline: Pipeline | None = None,
    ) -> Iterator[tuple[State, Decision]]:
        """Yields (state, decision) after each iteration, the closing one last; nothing for a closed state.

        Args:
          pools: the data.
          state: to continue from.
          budget: training steps summed over all arms, those in `state` included.
          seconds: wall time from now; the run is then not reproducible bit by bit.
          pipeline: streams the explore pool in parts, instead of `pools.explore`.
        """
        for after, (decision,) in self.loop(pools, state, budget=budget, seconds=seconds, pipeline=pipeline, at_once=1):
            yield after, decision

    def complete(self, pools: Pools, seed: int, *, budget: int) -> State:
        """The final state of a whole run from a fresh start."""
        *_, (state, _) = self.loop(pools, self.begin_best(pools, seed, budget=budget), budget=budget)
        return state


def distill(
    student: Network,
    pools: Pools,
    arms: Sequence[Arm],
    *,
    seed: int = 0,
    budget: int = 2000,
    config: EV3 | None = None,
    objectives: Objectives | None = None,
    state: State | None = None,
) -> Iterator[tuple[State, Decision]]:
    """Distills a teacher into a student; a generator of (state, decision), one per EV3 iteration.

    The last part of the budget, `config.final`, trains on the rows of assess and decide as well if the pool of explore has
    them, as that of `split` does, and the objectives have no goals.

    Args:
      student: the network to train.
      pools: the explore, assess and decide splits, with the teacher's outputs.
      arms: the ways to improve the student, e.g. `default_arms(student.apply)`.
      seed: of initial parameters, batches and keys.
      budget: training steps summed over all arms.
      config: hyperparameters of the core.
      objectives: the scores that select and promote students; by default those of classification. With goals:
        `classification().objectives([goal("worst_class_accuracy", 0.7)])`.
      state: to continue from, as yielded before.

    Yields: The state after each iteration and the decision that led to it. `state.champion.variables` is the proven
      best student, `state.current.variables` the one from which exploration continues. After a final phase the current
      student has learned from decide, so nothing that it scores there is proven, and the champion has not.
    """
    config, explore = config or EV3(), pools.explore
    can = isinstance(explore, Resident) and isinstance(explore.final_order, Order)
    decides = config.patience > 0 or bool(objectives and objectives.goals)
    has_final = can and config.final > 0 and not decides
    run = Distillation(student, arms, config=config, objectives=objectives, ending=Ending(has_final=has_final))
    yield from run.run(pools, run.begin_best(pools, seed, budget=budget) if state is None else state, budget=budget)
