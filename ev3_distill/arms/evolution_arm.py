"""Evolution arms: an evolution strategy improves a student on any objective, differentiable or not.

The cost of a run counts training steps, each one gradient of one batch, which costs about three forward passes. A generation
is 2 n forward passes, so the arm runs one generation in every 2 n / 3 steps. Arms in one iteration then cost the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ev3_distill.evolution import EvolutionConfig, EvolutionState, Subspace, all_parameters, evolution
from ev3_distill.runtime.distributed import LANES, Spread, on_all_devices, spread_over
from ev3_distill.types import Apply, Arm, Batch, Draw, Objective, PyTree, Stretch, Variables

FORWARD_PASSES = 3  # cost of one training step, in forward passes


class EvolutionArmState(NamedTuple):
    """State of an arm's trajectory."""

    evolution: EvolutionState  # of the selected parameters
    student: Variables  # with the mean in place
    unspent: jax.Array  # int32, training steps granted and not yet spent on a generation


def evolution_arm(
    name: str,
    apply: Apply,
    objective: Objective | Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: EvolutionConfig,
    *,
    subspace: Callable[[PyTree], Subspace] = all_parameters,
    mesh: Mesh | None = None,
    length: float = 1.0,
) -> Arm:
    """An arm that follows the estimated gradient of any objective on the explore split.

    Members are scored in evaluation mode, with the student's BatchNorm statistics, which do not change. All members of a
    generation see the same batch.

    Args:
      name: unique within a run.
      apply: the student's forward pass, or one derived from it, for example with quantized weights.
      objective: (student outputs, batch) -> scores [B] or a scalar, higher is better; a member's fitness is their mean.
      optimizer: any optax transformation, applied to the selected parameters.
      config: hyperparameters of the evolution strategy.
      subspace: selects the parameters to perturb; see `evolution.subspace`.
      mesh: one axis of devices over which each population is spread, with sums in fixed order if the number of devices divides
        LANES.
      length: of the trajectory, relative to the run's.
    """
    spread = Spread() if mesh is None else spread_over(mesh, fixed_order=LANES % mesh.size == 0)
    strategy = evolution(optimizer, config, spread=spread)
    cost = max(1, round(2 * config.pairs / FORWARD_PASSES))  # training steps per generation

    def init(student: Variables) -> EvolutionArmState:
        return EvolutionArmState(strategy.init(subspace(student.params).selected), student, jnp.int32(0))

    def generation(key: jax.Array, state: EvolutionState, student: Variables, batch: Batch) -> EvolutionState:
        join = subspace(student.params).join

        def fitness(selected: PyTree, _: jax.Array) -> jax.Array:
            outputs = apply(Variables(join(selected), student.stats), batch.inputs, train=False)[0]
            return jnp.mean(objective(outputs, batch))

        return strategy.step(key, state, fitness)[0]

    run_generation = generation if mesh is None else on_all_devices(generation, mesh)

    def propose(state: EvolutionArmState, draw: Draw, stretch: Stretch) -> tuple[EvolutionArmState, Variables]:
        def advance(i: jax.Array, current: EvolutionState) -> EvolutionState:
            batch, key = draw(stretch.start + jnp.minimum(i * cost, stretch.steps - 1))
            following: EvolutionState = run_generation(key, current, state.student, batch)
            return following

        granted = state.unspent + stretch.steps
        evolved = jax.lax.fori_loop(0, granted // cost, advance, state.evolution)
        student = Variables(subspace(state.student.params).join(evolved.mean), state.student.stats)
        return EvolutionArmState(evolved, student, granted % cost), student

    return Arm(name, init, propose, length)
