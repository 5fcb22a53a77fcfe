"""EV3 iterations under a budget: many in one call where they are short, in parts where the host brings the examples."""

import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ev3_distill.core import Parts
from ev3_distill.core.flatten_state import Packed, Packing
from ev3_distill.runtime.distributed import agreed
from ev3_distill.training.devices import Devices
from ev3_distill.training.dispatch import AT_ONCE, Programs, Several, Step
from ev3_distill.types import Decision, Pools, PyTree, State

Supply = Callable[[int, int], Iterator[tuple[PyTree, int, int]]]
# (first, last) -> (explore pool, first, last) of consecutive parts of the global steps [first, last)

UNLIMITED = 2**30  # steps, where wall time is the budget
IDLE_S = 0.1  # within about this a dispatch of several iterations ends: a checkpoint, a row and Ctrl-C wait for it


class Stream:
    """A step, iterated on any pools of one size."""

    def __init__(self, step: Step, parts: Parts, programs: Programs, devices: Devices):
        """Takes one iteration, the same one in parts, what it compiles them in, and the devices that it is spread over."""
        self._step, self._parts, self._programs, self._devices = step, parts, programs, devices
        self._several: Several | None = None
        self._pack: Callable[[State], Packed]
        self._unpack: Callable[[Packed], State]

    def __call__(
        self,
        pools: Pools,
        state: State,
        *,
        budget: int = UNLIMITED,
        seconds: float | None = None,
        supply: Supply | None = None,
        pause: int = UNLIMITED,
        at_once: int = AT_ONCE,
    ) -> Iterator[tuple[Packed, list[Decision]]]:
        """Decisions, several at a time, on the host, and the state after the last of them; nothing for a state that is closed.

        Short iterations are dispatched up to `at_once` at a time, and the next ones before the host looks at these, so that
        the device does not wait; but where several processes talk, which must not do so about two things at once. How many at
        a time follows the clock, and changes no result. Where the host supplies the examples or the budget is a wall time,
        iterations go one by one.

        Args:
          pools: the data.
          state: to go on from.
          budget: training steps summed over all arms, those in `state` included.
          seconds: wall time from now; the run is then not reproducible bit by bit.
          supply: brings the explore pool part by part, in place of `pools.explore`.
          pause: it ends, not closed, after the iteration that reaches this global step.
          at_once: iterations that one call may hold.
        """
        if bool(state.closed) or int(state.position) >= pause:
            return
        pools, state = self._devices.place((pools, state))
        self._pack_as(state)
        if supply is not None:
            limit_at = _limits(budget, seconds, int(state.cost))
            for packed, decisions in self._supplied(pools._replace(explore=()), state, supply, limit_at):
                yield packed, decisions
                if int(decisions[-1].position) >= pause:
                    return
            return
        several = self._several = self._several or Several(self._step, self._programs, pools, state)
        packed = self._pack(state)
        if seconds is not None:
            cost = int(state.cost)
            limit_at, closed = _limits(budget, seconds, cost), False
            while not closed:
                block = several(pools, packed, limit_at(cost), 1, pause)
                packed, decisions = block.packed, several.told(block)
                yield packed, decisions
                cost = int(decisions[-1].cost)
                closed = bool(decisions[-1].closed) or int(decisions[-1].position) >= pause
            return
        limit, most, began = np.int32(budget), 1, time.perf_counter()
        looks_ahead = jax.process_count() == 1
        ahead = several(pools, packed, limit, most, pause)
        while True:
            block = ahead
            if looks_ahead:
                ahead = several(pools, block.packed, limit, most, pause)
            decisions = several.told(block)
            yield block.packed, decisions
            if decisions[-1].closed or int(decisions[-1].position) >= pause:
                return
            took, began = agreed(time.perf_counter() - began), time.perf_counter()
            most = int(np.clip(len(decisions) * IDLE_S / took, 1, at_once))
            if not looks_ahead:
                ahead = several(pools, block.packed, limit, most, pause)

    def _supplied(
        self, pools: Pools, state: State, supply: Supply, limit_at: Callable[[int], np.int32]
    ) -> Iterator[tuple[Packed, list[Decision]]]:
        """Iterations in parts, each with the examples that the host brings for it."""
        closed = False
        state = self.unpack(self._pack(state))
        while not closed:
            plan = self._programs.call("plan", self._parts.plan, state, limit_at(int(state.cost)))
            first = int(state.position)
            arm_states, students = state.arm_states, (state.current,) * len(state.arm_states)
            for pool, begin, end in supply(first, first + int(plan.steps.max())):
                arm_states, students = self._programs.call(
                    "roll",
                    self._parts.roll,
                    (self._devices.place(pool), pools.assess),
                    state,
                    arm_states,
                    plan,
                    (np.int32(begin), np.int32(end)),
                )
            state, decision = self._programs.call(
                "settle", self._parts.settle, pools, state, arm_states, students, plan
            )
            decision = jax.device_get(decision)
            closed = bool(decision.closed)
            yield self._pack(state), [decision]

    def _pack_as(self, state: State) -> None:
        """How states travel."""
        if hasattr(self, "_pack"):
            return
        states = Packing(state)
        self._pack, self._unpack = self._devices.jit(states.pack), self._devices.jit(states.unpack)

    def unpack(self, packed: Packed) -> State:
        """The state that came with decisions."""
        return self._unpack(packed)


def _limits(budget: int, seconds: float | None, first: int) -> Callable[[int], np.int32]:
    """The cost that a run may reach, by its cost so far: with a wall time, what the pace so far lets it reach in time."""
    began = time.perf_counter()

    def limit_at(cost: int) -> np.int32:
        if seconds is None:
            return np.int32(budget)
        spent = agreed(time.perf_counter() - began)
        pace = (cost - first) / spent
        ahead = pace * (seconds - spent) if pace else float(seconds > spent) * UNLIMITED
        return np.int32(min(budget, cost + max(ahead, 0)))

    return limit_at
