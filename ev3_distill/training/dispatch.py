"""Dispatch: programs that are compiled once, and several EV3 iterations in one call of the device.

A call costs the host and the device a wait. For short iterations that wait would dominate, so one call makes several.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.core import Step
from ev3_distill.runtime.phases import phase
from ev3_distill.training.devices import Devices
from ev3_distill.training.flatten import Flat, Flattening
from ev3_distill.types import Decision, Pools, State

AT_ONCE = 64  # largest number of iterations in one call


class Programs:
    """Functions of arrays, each compiled once for a run's devices.

    Attributes:
      compile_s: seconds spent compiling so far.
    """

    def __init__(self, devices: Devices):
        self.compile_s = 0.0
        self._devices = devices
        self._compiled: dict[str, jax.stages.Compiled] = {}

    def timed(self, work: Callable[[], Any]) -> Any:
        """Calls `work`, and counts its time as compile time."""
        start = time.perf_counter()
        with phase("compiling"):
            result = work()
        self.compile_s += time.perf_counter() - start
        return result

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function, compiled at its first call under this name; shapes of the arguments must not change."""
        if name not in self._compiled:
            self._compiled[name] = self.timed(lambda: self._devices.jit(function).lower(*args).compile())
        return self._compiled[name](*args)

    def text(self, name: str) -> str:
        """The compiled program as text."""
        return str(self._compiled[name].as_text())


class Block(NamedTuple):
    """The results of one call of `RepeatedStep`, on the device."""

    state: State  # after the last iteration
    decisions: Flat  # [AT_ONCE, ...] of the iterations
    made: jax.Array  # int32, number of iterations


class _Carry(NamedTuple):
    block: Block
    ends: jax.Array  # bool, whether the run is closed or pauses


class RepeatedStep:
    """A step, repeated."""

    def __init__(self, step: Step, programs: Programs, pools: Pools, state: State):
        self._step, self._programs = step, programs
        self._decision = jax.eval_shape(step, pools, state, np.int32(0))[1]
        self._decisions = Flattening(self._decision)

    def __call__(self, pools: Pools, state: State, limit: np.int32, most: int, pause: int) -> Block:
        """Makes at most `most` and AT_ONCE iterations; stops after the closing one or the one that reaches step `pause`.

        Does not wait for the device.
        """
        args = pools, state, limit, np.int32(most), np.int32(pause)
        block: Block = self._programs.call("several", self._iterate, *args)
        return block

    def decisions_of(self, block: Block) -> list[Decision]:
        """The decisions of a block, on the host; waits for the device."""
        rows = jax.device_get(block.decisions)
        return [self._decisions.unflatten(tuple(vector[i] for vector in rows)) for i in range(int(block.made))]

    def _iterate(self, pools: Pools, state: State, limit: jax.Array, most: jax.Array, pause: jax.Array) -> Block:
        blank = self._decisions.flatten(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._decision))
        rows = tuple(jnp.zeros((AT_ONCE, *vector.shape), vector.dtype) for vector in blank)
        carry = jax.lax.while_loop(
            lambda carry: (carry.block.made < jnp.minimum(most, AT_ONCE)) & ~carry.ends,
            functools.partial(self._advance, pools, limit, pause),
            _Carry(Block(state, rows, jnp.int32(0)), _ends(state, pause)),
        )
        return carry.block

    def _advance(self, pools: Pools, limit: jax.Array, pause: jax.Array, carry: _Carry) -> _Carry:
        block = carry.block
        state, decision = self._step(pools, block.state, limit)
        pairs = zip(block.decisions, self._decisions.flatten(decision), strict=True)
        decisions = tuple(rows.at[block.made].set(row) for rows, row in pairs)
        return _Carry(Block(state, decisions, block.made + 1), _ends(state, pause))


def _ends(state: State, pause: jax.Array) -> jax.Array:
    return state.closed | (state.clock.position >= pause)
