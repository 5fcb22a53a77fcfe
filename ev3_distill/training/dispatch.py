"""What the host calls of a run: programs that are compiled once, and EV3 steps, several in one call.

Several, for a call costs the device a wait, and where steps are short that is most of their time.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.core.flatten_state import Packed, Packing
from ev3_distill.training.devices import Devices
from ev3_distill.types import Decision, Pools, State

AT_ONCE = 64  # iterations that one call may hold

Step = Callable[
    [Pools, State, Any], tuple[State, Decision]
]  # (pools, state, the cost it may reach) -> (state, decision)


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
        """What work returns; its time is of compiling."""
        began = time.perf_counter()
        result = work()
        self.compile_s += time.perf_counter() - began
        return result

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """What the function of that name makes of the arguments, whose shapes are always the same."""
        if name not in self._compiled:
            self._compiled[name] = self.timed(lambda: self._devices.jit(function).lower(*args).compile())
        return self._compiled[name](*args)

    def text(self, name: str) -> str:
        """The compiled program, as XLA tells it."""
        return str(self._compiled[name].as_text())


class Block(NamedTuple):
    """What one call of `Several` makes, on the device."""

    packed: Packed  # the state after the last iteration
    decisions: Packed  # [AT_ONCE, ...] of the iterations
    made: jax.Array  # int32, their number


class _Carry(NamedTuple):
    block: Block
    ends: jax.Array  # bool, whether the run is closed or pauses


class Several:
    """A step, several times on a packed state."""

    def __init__(self, step: Step, programs: Programs, pools: Pools, state: State):
        self._step, self._programs = step, programs
        self._decision = jax.eval_shape(step, pools, state, np.int32(0))[1]
        self._states, self._decisions = Packing(state), Packing(self._decision)

    def __call__(self, pools: Pools, packed: Packed, limit: np.int32, most: int, pause: int) -> Block:
        """At most `most` and AT_ONCE iterations, none after the closing one or the one that reaches `pause`; does not wait."""
        args = pools, packed, limit, np.int32(most), np.int32(pause)
        block: Block = self._programs.call("several", self._steps, *args)
        return block

    def told(self, block: Block) -> list[Decision]:
        """Its decisions, on the host; waits for the device."""
        decisions = jax.device_get(block.decisions)
        return [self._decisions.unpack(tuple(rows[i] for rows in decisions)) for i in range(int(block.made))]

    def _steps(self, pools: Pools, packed: Packed, limit: jax.Array, most: jax.Array, pause: jax.Array) -> Block:
        before = self._states.unpack(packed)
        blank = self._decisions.pack(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._decision))
        rows = tuple(jnp.zeros((AT_ONCE, *vector.shape), vector.dtype) for vector in blank)
        carry = jax.lax.while_loop(
            lambda carry: (carry.block.made < jnp.minimum(most, AT_ONCE)) & ~carry.ends,
            functools.partial(self._advance, pools, limit, pause),
            _Carry(Block(packed, rows, jnp.int32(0)), before.closed | (before.position >= pause)),
        )
        return carry.block

    def _advance(self, pools: Pools, limit: jax.Array, pause: jax.Array, carry: _Carry) -> _Carry:
        block = carry.block
        state, decision = self._step(pools, self._states.unpack(block.packed), limit)
        made = zip(block.decisions, self._decisions.pack(decision), strict=True)
        told = tuple(rows.at[block.made].set(row) for rows, row in made)
        return _Carry(Block(self._states.pack(state), told, block.made + 1), state.closed | (state.position >= pause))
