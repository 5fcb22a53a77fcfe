"""EV3 iterations under a budget: many in one call if they are short, in parts if the host streams the examples."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ev3_distill.core import Parts, Step
from ev3_distill.runtime.distributed import broadcast_number
from ev3_distill.training.devices import Devices
from ev3_distill.training.dispatch import AT_ONCE, Programs, RepeatedStep
from ev3_distill.types import Decision, Pools, PyTree, State

Pipeline = Callable[[int, int, bool], Iterator[tuple[PyTree, int, int]]]
# (first, last, whether in the final phase) -> (pool, first, last) of consecutive parts of the global steps [first, last)

UNLIMITED = 2**30  # steps, if the budget is a wall time
DISPATCH_S = 0.1  # target duration of one dispatch; bounds the latency of checkpoints, ledger rows and Ctrl-C

Results = Iterator[tuple[State, list[Decision]]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a run ends or pauses."""

    budget: int = UNLIMITED  # training steps of all arms, those before included
    seconds: float | None = None  # wall time from now; the run is then not reproducible bit by bit
    pause: int = UNLIMITED  # global step; the iteration that reaches it is the last for now, and the run is not closed


class IterationLoop:
    """Repeats a step on pools of one size."""

    def __init__(self, step: Step, parts: Parts, programs: Programs, devices: Devices):
        """Takes the iteration, the same iteration in parts, the compiler of both, and the devices of the run."""
        self._step, self._parts, self._programs, self._devices = step, parts, programs, devices
        self._repeated: RepeatedStep | None = None

    def __call__(
        self,
        pools: Pools,
        state: State,
        *,
        budget: int = UNLIMITED,
        seconds: float | None = None,
        pipeline: Pipeline | None = None,
        pause: int = UNLIMITED,
        at_once: int = AT_ONCE,
    ) -> Results:
        """Yields decisions on the host, several at a time, with the state after the last of them.

        Short iterations are dispatched up to `at_once` at a time, and the next ones before the host reads these, so
        that the device does not wait. (In a multi-process run the host reads first, because processes must not
        communicate about two things at once.) The number at a time follows the clock and changes no result. If the host
        streams the examples or the budget is a wall time, iterations are dispatched one by one. A closed state yields
        nothing.

        Args:
          pools: the data.
          state: to continue from.
          budget: training steps summed over all arms, those in `state` included.
          seconds: wall time from now; the run is then not reproducible bit by bit.
          pipeline: streams the explore pool in parts, instead of `pools.explore`.
          pause: the loop ends, not closed, after the iteration that reaches this global step.
          at_once: largest number of iterations in one call.
        """
        if bool(state.closed) or int(state.clock.position) >= pause:
            return
        pools, state = self._devices.place((pools, state))
        limits = Limits(budget, seconds, pause)
        if pipeline is not None:
            yield from self._with_pipeline(pools._replace(explore=()), state, pipeline, limits)
            return
        repeated = self._repeated = self._repeated or RepeatedStep(self._step, self._programs, pools, state)
        if seconds is not None:
            yield from self._timed(repeated, pools, state, limits)
        else:
            yield from self._dispatched(repeated, pools, state, limits, at_once)

    def _dispatched(self, repeated: RepeatedStep, pools: Pools, state: State, limits: Limits, at_once: int) -> Results:
        """Several iterations a call, under a budget in steps."""
        limit, most, start = np.int32(limits.budget), 1, time.perf_counter()
        looks_ahead = jax.process_count() == 1
        ahead = repeated(pools, state, limit, most, limits.pause)
        while True:
            block = ahead
            if looks_ahead:
                ahead = repeated(pools, block.state, limit, most, limits.pause)
            decisions = repeated.decisions_of(block)
            yield block.state, decisions
            if _ends(decisions[-1], limits.pause):
                return
            took, start = broadcast_number(time.perf_counter() - start), time.perf_counter()
            most = int(np.clip(len(decisions) * DISPATCH_S / took, 1, at_once))
            if not looks_ahead:
                ahead = repeated(pools, block.state, limit, most, limits.pause)

    def _timed(self, repeated: RepeatedStep, pools: Pools, state: State, limits: Limits) -> Results:
        """One iteration a call, under a wall time."""
        cost, closed = int(state.clock.cost), False
        limit_at = _limit_by_cost(limits, cost)
        while not closed:
            block = repeated(pools, state, limit_at(cost), 1, limits.pause)
            state, decisions = block.state, repeated.decisions_of(block)
            yield state, decisions
            cost = int(decisions[-1].cost)
            closed = _ends(decisions[-1], limits.pause)

    def _with_pipeline(self, pools: Pools, state: State, pipeline: Pipeline, limits: Limits) -> Results:
        """Iterations in parts, each with the examples that the pipeline brings for it."""
        limit_at, closed = _limit_by_cost(limits, int(state.clock.cost)), False
        while not closed:
            plan = self._programs.call("plan", self._parts.plan, state, limit_at(int(state.clock.cost)))
            first, final = int(state.clock.position), bool(state.final)
            rollout = state.arms.states, (state.current.variables,) * len(state.arms.states)
            for pool, begin, end in pipeline(first, first + int(plan.steps.max()), final):
                rollout = self._programs.call(
                    "roll",
                    self._parts.roll,
                    (self._devices.place(pool), pools.assess),
                    state,
                    rollout[0],
                    (plan, (np.int32(begin), np.int32(end))),
                )
            state, decision = self._programs.call("settle", self._parts.settle, pools, state, rollout, plan)
            decision = jax.device_get(decision)
            closed = _ends(decision, limits.pause)
            yield state, [decision]


def _ends(decision: Decision, pause: int) -> bool:
    return bool(decision.closed) or int(decision.position) >= pause


def _limit_by_cost(limits: Limits, first: int) -> Callable[[int], np.int32]:
    """Cost so far -> the cost that the run may reach: the budget, or what the pace so far lets it reach in the wall time."""
    start = time.perf_counter()

    def limit_at(cost: int) -> np.int32:
        if limits.seconds is None:
            return np.int32(limits.budget)
        spent = broadcast_number(time.perf_counter() - start)
        pace = (cost - first) / spent
        ahead = pace * (limits.seconds - spent) if pace else float(limits.seconds > spent) * UNLIMITED
        return np.int32(min(limits.budget, cost + max(ahead, 0)))

    return limit_at
