"""One EV3 iteration, pure and jitted: explore, assess, adapt. One compiled program per network shape.

Trajectory lengths, the active arms and the budget are data, not shapes, so nothing recompiles while a run goes on.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.config import EV3
from ev3_distill.core import adapt, allocate, assess, explore, prioritise, promote
from ev3_distill.core.assess import Measures
from ev3_distill.core.promote import stuck, where
from ev3_distill.types import (
    ADOPT,
    KEEP,
    PROMOTE,
    ROLL_BACK,
    Apply,
    Arm,
    Batch,
    Decision,
    Evidence,
    Goal,
    Objective,
    Pools,
    Progress,
    Proposals,
    PyTree,
    Sample,
    Share,
    State,
    Stretch,
    Variables,
)

SHORT = 5  # first trajectories; a shorter one than that many is no measure of patience: early plateaus last as long

Step = Callable[
    [Pools, State, Any], tuple[State, Decision]
]  # the last an int32 scalar, of NumPy where it comes from the host


def initial_state(
    key: jax.Array,
    variables: Variables,
    pools: Pools,
    *,
    apply: Apply,
    arms: Sequence[Arm],
    select: Objective,
    promise: Objective,
    goals: Sequence[Goal] = (),
    config: EV3,
) -> State:
    """The state before the first iteration: the given student is both current and champion."""
    measures = Measures(select, promise, tuple(goals))

    def logits_of(split: Batch) -> jax.Array:
        return assess.logits_of(apply, variables, split.inputs, batch_size=config.eval_batch_size)

    evidence, zero = measures.of(logits_of(pools.assess), pools.assess), jnp.int32(0)
    on_decide = logits_of(pools.decide)
    progress: Progress | tuple[()] = ()
    if config.patience:
        seen = promote.on_seen(apply, variables, pools, promise, config=config)
        progress = adapt.from_here(evidence, seen, zero)
    a = len(arms)
    return State(
        key=key,
        iteration=zero,
        cost=zero,
        begun=zero,
        position=zero,
        current=variables,
        current_evidence=evidence,
        champion=variables,
        champion_evidence=evidence,
        champion_decide=promise(on_decide, pools.decide),
        champion_goals=measures.standing(on_decide, pools.decide, evidence),
        safest=variables if goals else (),
        safest_risk=jnp.float32(jnp.finfo(jnp.float32).min),
        arm_states=tuple(arm.init(variables) for arm in arms),
        arm_value=jnp.zeros(a),
        arm_cost=jnp.zeros(a, jnp.int32),
        arm_wins=jnp.zeros(a, jnp.int32),
        arm_promotions=jnp.zeros(a, jnp.int32),
        leader=jnp.int32(allocate.racers_of(arms).index(True)),
        round=zero,
        current_arm=jnp.int32(-1),
        length=jnp.float32(config.length),
        stale=zero,
        tested_cost=zero,
        budget=adapt.unspent(config.delta),
        progress=progress,
        met_cost=zero,
        met=jnp.bool_(False),
        closed=jnp.bool_(False),
    )


class Plan(NamedTuple):
    """Which arms train in an iteration, how far, and where in the budget of the student at its size that is."""

    steps: jax.Array  # [A] int32
    spent: jax.Array  # float32, before the iteration: the share of what the student may cost since it began or grew
    each: jax.Array  # [A] float32, share that one step of each arm adds, those of the arms beside it included
    remaining: jax.Array  # int32, steps left of the budget


class Parts(NamedTuple):
    """One iteration in parts, for a host that brings the examples of a long trajectory piece by piece."""

    plan: Callable[[State, Any], Plan]  # (state, limit)
    roll: Callable[..., tuple[tuple[PyTree, ...], tuple[Variables, ...]]]
    # ((pool, assess), state, arm states so far, plan, (first, last)) -> (arm states, students) after the steps [first, last)
    settle: Callable[..., tuple[State, Decision]]  # (pools, state, arm states, students, plan)


def make_parts(
    apply: Apply,
    arms: Sequence[Arm],
    sample: Sample,
    *,
    select: Objective,
    promise: Objective,
    goals: Sequence[Goal] = (),
    stop_level: float | None = None,
    config: EV3,
    share: Share = explore.alone,
) -> Parts:
    """Builds the three parts of an iteration, not yet jitted; see `make_step`, which composes them."""
    measures = Measures(select, promise, tuple(goals))
    lengths = jnp.array([arm.length for arm in arms], jnp.float32)
    racers = allocate.racers_of(arms)

    def plan(state: State, limit: Any) -> Plan:
        remaining = jnp.where(state.met | stuck(state), 0, jnp.maximum(limit - state.cost, 0))
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.iteration)
        end = jnp.minimum(limit, state.progress.until) if isinstance(state.progress, Progress) else limit
        share = jnp.maximum(end - state.begun, 1)
        spent_here = (state.cost - state.begun) / share
        active = allocate.active_arms(
            key,
            state.round,
            state.arm_value,
            state.leader,
            racers=racers,
            spent=state.cost / limit,
            spent_here=spent_here,
            exploration=config.exploration,
            pressed=_in_doubt(state, goals),
        )
        steps = allocate.steps_of(active, state.leader, lengths, state.length, remaining)
        each = steps.sum() / jnp.maximum(steps, 1) / share
        return Plan(steps, spent_here, each, remaining)

    def roll(
        data: tuple[PyTree, Batch],
        state: State,
        arm_states: Sequence[PyTree],
        plan: Plan,
        span: tuple[Any, Any],
    ) -> tuple[tuple[PyTree, ...], tuple[Variables, ...]]:
        def work(mine: jax.Array, given: Any) -> tuple[tuple[PyTree, Variables], ...]:
            (pool, held_out), state, arm_states, plan, (first, last) = given
            done = first - state.position
            stretches = [
                Stretch(
                    first,
                    jnp.where(mine[i], jnp.clip(plan.steps[i] - done, 0, last - first), 0),
                    plan.spent + done * plan.each[i],
                    plan.each[i],
                )
                for i in range(len(arms))
            ]
            key = jax.random.wrap_key_data(state.key)
            held = explore.held_from(held_out, key, batch_size=config.batch_size)
            made = explore.roll(arms, arm_states, explore.draw_from(pool, sample, key), stretches, held)
            return tuple(zip(*made, strict=True))

        made = share(work, plan.steps > 0, (data, state, tuple(arm_states), plan, span))
        return tuple(arm_state for arm_state, _ in made), tuple(student for _, student in made)

    def settle(
        pools: Pools, state: State, arm_states: tuple[PyTree, ...], students: Sequence[Variables], plan: Plan
    ) -> tuple[State, Decision]:
        steps, closing = plan.steps, plan.remaining <= 0
        proposals = explore.proposals_of(arm_states, students, steps)
        evidence = assess.assess(
            apply, proposals, pools.assess, measures, batch_size=config.eval_batch_size, share=share
        )
        least = prioritise.least_of(goals)
        before = state.current_evidence
        ruling = prioritise.ruling_of(prioritise.risks_of(before, least))
        state, choice, rolled = _move(
            state, arms, proposals, evidence, steps, ruling=ruling, least=least, config=config
        )
        state = state._replace(
            iteration=state.iteration + 1,
            cost=state.cost + steps.sum(),
            position=state.position + steps.max(),
            arm_cost=state.arm_cost + steps,
            closed=closing,
        )
        if goals:
            refused = prioritise.breaks(evidence, before, least) & proposals.active
            state = allocate.race_again(state, refused.any() | (ruling >= 0), racers=racers, config=config)
        state, made = promote.promote(state, pools, closing=closing, apply=apply, measures=measures, config=config)
        risks = prioritise.risks_of(state.current_evidence, least)
        if isinstance(state.progress, Progress):
            progress = adapt.progressed(
                state.progress,
                state.current_evidence,
                functools.partial(promote.on_seen, apply, state.current, pools, promise, config=config),
                ruling=ruling,
                position=state.position,
                cost=state.cost,
                promoted=made.promoted,
                patience=config.patience * jnp.maximum(state.length, SHORT * config.length),
            )
            state = state._replace(progress=progress)
        if goals:
            safer = risks.min() > state.safest_risk
            state = state._replace(
                safest=where(safer, state.current, state.safest),
                safest_risk=jnp.where(safer, risks.min(), state.safest_risk),
            )
        if stop_level is not None and goals:
            state = promote.met(
                state, pools, risks, closing=closing, apply=apply, goals=goals, level=stop_level, config=config
            )
        verdict = jnp.where(choice.moves, ADOPT, KEEP)
        verdict = jnp.where(rolled, ROLL_BACK, jnp.where(made.promoted, PROMOTE, verdict))
        return state, Decision(
            iteration=state.iteration,
            cost=state.cost,
            position=state.position,
            steps=steps,
            scores=evidence.select.mean(axis=1),
            selected=jnp.where(choice.any_active, choice.row, -1),
            discarded=(steps > 0).sum() - proposals.active[: len(arms)].sum(),
            ruling=ruling,
            risks=risks,
            gain=choice.gain,
            gain_se=choice.gain_se,
            tested=made.tested,
            tested_for=made.ruling,
            wins=made.wins,
            losses=made.losses,
            decide_n=jnp.int32(pools.decide.index.shape[0]),
            alpha=made.alpha,
            p_value=made.p_value,
            verdict=verdict.astype(jnp.int32),
            promoted_arm=jnp.where(made.promoted, state.current_arm, -1),
            kept=made.kept,
            champion_accuracy=state.champion_decide.mean(),
            current_accuracy=state.current_evidence.promise.mean(),
            length=state.length,
            tuned=tuple(
                arm.shows(after) if arm.shows else {} for arm, after in zip(arms, state.arm_states, strict=True)
            ),
            stuck=stuck(state),
            met=state.met,
            closed=state.closed,
        )

    return Parts(plan, roll, settle)


def make_step(
    apply: Apply,
    arms: Sequence[Arm],
    sample: Sample,
    *,
    select: Objective,
    promise: Objective,
    goals: Sequence[Goal] = (),
    stop_level: float | None = None,
    config: EV3,
    share: Share = explore.alone,
) -> Step:
    """Builds the iteration.

    Args:
      apply: the student's forward pass.
      arms: A of them.
      sample: (pool, global step) -> the batch of that step of the explore split.
      select: the smooth objective that sees the small steps of one trajectory on assess.
      promise: the {0, 1} objective that compares arms on assess, and by which decide proves promotions.
      goals: G of them, which must hold; the one at the greatest risk goes before the promise, see core/prioritise.py.
      stop_level: where given, the run ends once decide refutes, each at this level, that any goal is not met.
      config: the core's hyperparameters.
      share: who rolls out and scores which proposal.

    Returns:
      (pools, state, limit) -> (state, decision), `limit` being the cost that the run may reach. With nothing left to
      spend no arm trains: that is the closing iteration, in which the current student may still be promoted.
    """
    objectives: dict[str, Any] = {"select": select, "promise": promise, "goals": goals, "stop_level": stop_level}
    parts = make_parts(apply, arms, sample, **objectives, config=config, share=share)

    def step(pools: Pools, state: State, limit: Any) -> tuple[State, Decision]:
        plan = parts.plan(state, limit)
        last = state.position + plan.steps.max()
        made = parts.roll((pools.explore, pools.assess), state, state.arm_states, plan, (state.position, last))
        return parts.settle(pools, state, *made, plan)

    return jax.jit(step)


def _in_doubt(state: State, goals: Sequence[Goal]) -> bool | jax.Array:
    """Whether assess leaves open that the goals are met, in a run that ends when the student gets nowhere.

    There a better arm decides whether the student is large enough: small ones often learn from labels what they do not from a
    teacher, and the other way round.
    """
    if not (goals and isinstance(state.progress, Progress)):
        return False
    risk = prioritise.risks_of(state.current_evidence, prioritise.least_of(goals)).min()
    return risk < prioritise.AT_RISK


def _row(tree: PyTree, row: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[row], tree)


def _move(
    state: State,
    arms: Sequence[Arm],
    proposals: Proposals,
    evidence: Evidence,
    steps: jax.Array,
    *,
    ruling: jax.Array,
    least: jax.Array,
    config: EV3,
) -> tuple[State, adapt.Choice, jax.Array]:
    """Moves `current` to the proposal that assess favours, or back to the champion; arms and their shares learn from it.

    The winning arm goes on from the state it proposed; the others start afresh from the new current student, and after a
    roll-back all do. Without a move every arm keeps the state it had: nothing of a rejected proposal is left.

    Returns:
      The state, the choice, and whether it was undone since assess shows the student to be worse than the champion, which
      lies no further below any goal.
    """
    a = len(arms)
    racing = state.round < allocate.rounds_of(allocate.racers_of(arms))
    takeover = jnp.where(racing, 0.0, config.takeover)
    sound = proposals.active & ~prioritise.breaks(evidence, state.current_evidence, least)
    scores, reference = (prioritise.ruled(x, ruling) for x in (evidence, state.current_evidence))
    choice = adapt.choose(scores, reference, sound, state.leader, takeover=takeover)
    row, moved = choice.row, choice.moves
    reached, shown = where(
        moved,
        (_row(proposals.variables, row), _row(evidence, row)),
        (state.current, state.current_evidence),
    )
    rolled = adapt.proves(state.champion_evidence.promise, shown.promise, config.roll_back)
    rolled &= ~prioritise.falls_shorter(state.champion_evidence, shown, least)
    current, current_evidence = where(rolled, (state.champion, state.champion_evidence), (reached, shown))
    arm_states = tuple(
        where(
            moved | rolled,
            where((row == i) & ~rolled, proposals.arm_states[i], arm.init(current)),
            state.arm_states[i],
        )
        for i, arm in enumerate(arms)
    )
    arm_moved = moved & (row < a)
    trained = steps > 0
    length = allocate.next_length(
        state.length, choice.gain, choice.gain_se, moved, state.cost - state.begun, config=config
    )
    return (
        state._replace(
            current=current,
            current_evidence=current_evidence,
            arm_states=arm_states,
            arm_value=allocate.standing(state.arm_value, trained, scores.promise[:a]),
            arm_wins=state.arm_wins + (jnp.arange(a) == row) * arm_moved,
            leader=jnp.where(arm_moved, row, state.leader),
            current_arm=jnp.where(rolled, -1, jnp.where(moved, row, state.current_arm)),
            length=jnp.where(trained.any(), length, state.length),
            stale=jnp.where(moved | rolled, 0, state.stale + 1),
            round=state.round + 1,
        ),
        choice,
        rolled,
    )
