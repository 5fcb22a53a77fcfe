"""One EV3 iteration, pure and jitted: explore, assess, adapt. One compiled program per network shape.

Trajectory lengths, the active arms and the budget are data, not shapes: nothing recompiles while a run continues.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.core import adapt, allocate, explore, prioritise, promote
from ev3_distill.core.algorithm import Algorithm
from ev3_distill.core.assess import assess
from ev3_distill.core.paired_tests import proves
from ev3_distill.core.plateau import SHORT, stuck, update_plateau
from ev3_distill.core.promote import where
from ev3_distill.types import (
    ADOPT,
    FINAL,
    KEEP,
    PROMOTE,
    ROLL_BACK,
    ArmsState,
    Batch,
    BeforeFinal,
    CurrentStudent,
    Decision,
    Evidence,
    Plateau,
    Pools,
    PromotionTest,
    Proposals,
    PyTree,
    SafestStudent,
    State,
    Stretch,
    Variables,
)

HARMED = 2.0  # standard errors below the current student, at which the leader's own trajectory seems to have gone wrong

Step = Callable[[Pools, State, Any], tuple[State, Decision]]
# (pools, state, limit) -> (state, decision); the limit is an int32 scalar, of NumPy if it comes from the host


class Plan(NamedTuple):
    """The steps of each arm in an iteration, and their place in the student's budget."""

    steps: jax.Array  # [A] int32
    spent: jax.Array  # float32, fraction of the student's budget (since it started or grew) spent before the iteration
    per_step: jax.Array  # [A] float32, fraction that one step of each arm adds, parallel arms included
    budget: jax.Array  # int32, the student's
    length: jax.Array  # float32, of a trajectory
    racing: jax.Array  # bool, whether the arms race
    turns: jax.Array  # bool, whether the final phase follows this iteration, in which no arm trains
    remaining: jax.Array  # int32, steps left of the budget, or left until the final phase


Rollout = tuple[tuple[PyTree, ...], tuple[Variables, ...]]  # (arm states, proposed students), each of length A


class Parts(NamedTuple):
    """One iteration in three parts, for a host that brings the examples of a long trajectory piece by piece."""

    plan: Callable[[State, Any], Plan]  # (state, limit)
    roll: Callable[..., Rollout]
    # ((pool, assess), state, arm states so far, (plan, (first, last))) -> the rollout after the global steps [first, last)
    settle: Callable[..., tuple[State, Decision]]  # (pools, state, rollout, plan)


def make_parts(algorithm: Algorithm) -> Parts:
    """Builds the three parts of an iteration, not yet jitted; see `make_step`, which composes them."""
    partial = functools.partial
    return Parts(partial(_plan, algorithm), partial(_roll, algorithm), partial(_settle, algorithm))


def make_step(algorithm: Algorithm) -> Step:
    """Builds the iteration.

    Returns:
      (pools, state, limit) -> (state, decision); `limit` is the cost that the run may reach. Once the budget is spent, no
      arm trains: that is the closing iteration, in which the current student may still be promoted.
    """
    parts = make_parts(algorithm)

    def step(pools: Pools, state: State, limit: Any) -> tuple[State, Decision]:
        plan = parts.plan(state, limit)
        first = state.clock.position
        span = first, first + plan.steps.max()
        explored = pools.explore_in(final=state.final)
        rollout = parts.roll((explored, pools.assess), state, state.arms.states, (plan, span))
        return parts.settle(pools, state, rollout, plan)

    return jax.jit(step)


def _plan(algorithm: Algorithm, state: State, limit: Any) -> Plan:
    """Decides which arms train, and for how long."""
    clock, config = state.clock, algorithm.config
    end, turns = _end_of_phase(algorithm, state, limit)
    remaining = jnp.where(state.met | stuck(state), 0, jnp.maximum(end - clock.cost, 0))
    until = jnp.minimum(limit, state.plateau.until) if isinstance(state.plateau, Plateau) else jnp.asarray(limit)
    budget, cost = jnp.maximum(until - clock.start_cost, 1), clock.cost - clock.start_cost
    arms, in_race = _enter(algorithm, state.arms, budget)
    racing = allocate.is_racing(arms, in_race)
    length = allocate.next_length(racing, in_race - arms.raced, budget, cost, config=config)
    lengths = jnp.array([arm.length for arm in algorithm.arms], jnp.float32)
    steps = allocate.steps_of(allocate.active_arms(arms, racing), arms.leader, lengths, length, remaining)
    per_step = steps.sum() / jnp.maximum(steps, 1) / budget
    return Plan(steps, cost / budget, per_step, budget, length, racing, turns, remaining)


def _enter(algorithm: Algorithm, arms: ArmsState, budget: jax.Array) -> tuple[ArmsState, jax.Array]:
    """The arms with those alone in the race that this budget allows, and the steps of each in the whole race."""
    entered = allocate.entrants(algorithm.racers, algorithm.fast_racers, budget, algorithm.config)
    return allocate.enter(arms, entered), allocate.race_steps(entered, budget, algorithm.config)


def _end_of_phase(algorithm: Algorithm, state: State, limit: Any) -> tuple[jax.Array, jax.Array]:
    """The cost that the run may reach before its final phase, or in it, and whether that phase follows now."""
    if not algorithm.has_final:
        return jnp.asarray(limit), jnp.bool_(False)
    before = limit - jnp.floor(limit * algorithm.config.final).astype(jnp.int32)
    return jnp.where(state.final, limit, before), ~state.final & (state.clock.cost >= before)


def _roll(
    algorithm: Algorithm,
    data: tuple[PyTree, Batch],
    state: State,
    arm_states: Sequence[PyTree],
    schedule: tuple[Plan, tuple[Any, Any]],
) -> Rollout:
    """Rolls out the arms over the global steps [first, last) of the schedule (plan, (first, last))."""
    arms, (plan, span) = algorithm.arms, schedule

    def work(own: jax.Array, inputs: Any) -> tuple[tuple[PyTree, Variables], ...]:
        (pool, held_out), state, arm_states, plan, (first, last) = inputs
        done = first - state.clock.position
        stretches = [
            Stretch(
                first,
                jnp.where(own[i], jnp.clip(plan.steps[i] - done, 0, last - first), 0),
                plan.spent + done * plan.per_step[i],
                plan.per_step[i],
            )
            for i in range(len(arms))
        ]
        key = jax.random.wrap_key_data(state.key)
        held = explore.held_from(held_out, key, batch_size=algorithm.config.batch_size)
        draw = explore.draw_from(pool, algorithm.sample, key)
        return tuple(zip(*explore.roll(arms, arm_states, draw, stretches, held), strict=True))

    rows = algorithm.distribute(work, plan.steps > 0, (data, state, tuple(arm_states), plan, span))
    return tuple(arm_state for arm_state, _ in rows), tuple(student for _, student in rows)


def _settle(
    algorithm: Algorithm,
    pools: Pools,
    state: State,
    rollout: Rollout,
    plan: Plan,
) -> tuple[State, Decision]:
    """Scores the proposals and applies what follows from the scores."""
    objectives, config, steps = algorithm.objectives, algorithm.config, plan.steps
    state = state._replace(arms=_enter(algorithm, state.arms, plan.budget)[0])
    closing, thresholds, before = plan.remaining <= 0, objectives.thresholds, state.current.evidence
    trained = steps[state.arms.asked] > 0
    asked = jnp.where(trained, state.arms.asked, -1)
    proposals = explore.proposals_of(*rollout, steps)
    evidence = assess(
        algorithm.apply,
        proposals,
        pools.assess,
        objectives,
        batch_size=config.eval_batch_size,
        distribute=algorithm.distribute,
    )
    ruling = prioritise.ruling_of(prioritise.risks_of(before, thresholds))
    state, choice, rolled_back = _move(algorithm, state, proposals, evidence, plan=plan, ruling=ruling)
    state = _count(state, steps)._replace(closed=closing & ~plan.turns)
    prevented = prioritise.breaks(evidence, before, thresholds) & proposals.active
    state = _ask(algorithm, state, prevented.any() | (ruling >= 0))
    state, promotion = promote.promote(state, pools, algorithm, closing=closing)
    risks = prioritise.risks_of(state.current.evidence, thresholds)
    state = _track_plateau(algorithm, pools, state, ruling, promotion.promoted)
    state = _track_safest(algorithm, state, risks)
    state = promote.check_goals(state, pools, algorithm, risks, closing=closing)
    verdict = jnp.where(choice.moves, jnp.where(state.final, FINAL, ADOPT), KEEP)
    verdict = jnp.where(rolled_back, ROLL_BACK, jnp.where(promotion.promoted, PROMOTE, verdict)).astype(jnp.int32)
    outcome = _Outcome(proposals, evidence, ruling, choice, promotion, risks, verdict, asked, state.final)
    state = _begin_final(algorithm, state, plan.turns)
    return state, _decision(algorithm, state, steps, outcome)


def _begin_final(algorithm: Algorithm, state: State, turns: jax.Array) -> State:
    """The state after an iteration; if it `turns`, the leader alone trains from now on, in the final phase.

    It continues its trajectory. If its newest proposals lie clearly below the current student, it has trained too long, for
    example on wrong labels: then it starts anew from the current student.
    """
    if not isinstance(state.before, BeforeFinal):
        return state
    arms, now = state.arms, BeforeFinal(state.current.variables, state.clock.cost)
    leads = jnp.arange(len(arms.value)) == arms.leader
    anew = leads & (arms.lag < -HARMED)
    states = tuple(
        where(anew[i], arm.init(state.current.variables), arms.states[i]) for i, arm in enumerate(algorithm.arms)
    )
    alone = arms._replace(states=states, racing=leads, asked=jnp.int32(-1))
    return state._replace(
        arms=where(turns, alone, arms), final=state.final | turns, before=where(turns, now, state.before)
    )


def _ask(algorithm: Algorithm, state: State, pressing: jax.Array) -> State:
    """Selects the arm that trains beside the leader in the next iteration, if any, and starts it from the current student."""
    asked = jnp.where(state.final, -1, allocate.to_ask(state.arms, state.clock, pressing))
    states = tuple(
        where(asked == i, arm.init(state.current.variables), state.arms.states[i])
        for i, arm in enumerate(algorithm.arms)
    )
    return state._replace(arms=allocate.with_asked(state.arms._replace(states=states), asked))


def _count(state: State, steps: jax.Array) -> State:
    """Advances the counters by an iteration of these steps."""
    clock, arms = state.clock, state.arms
    return state._replace(
        clock=clock._replace(
            iteration=clock.iteration + 1, cost=clock.cost + steps.sum(), position=clock.position + steps.max()
        ),
        arms=arms._replace(cost=arms.cost + steps),
    )


def _track_plateau(algorithm: Algorithm, pools: Pools, state: State, ruling: jax.Array, promoted: jax.Array) -> State:
    """Updates whether the student still improves, in a run with a patience."""
    if not isinstance(state.plateau, Plateau):
        return state
    config = algorithm.config
    plateau = update_plateau(
        state.plateau,
        state.current.evidence,
        functools.partial(promote.seen_scores, algorithm, state.current.variables, pools),
        ruling=ruling,
        position=state.clock.position,
        cost=state.clock.cost,
        promoted=promoted,
        patience=config.patience * jnp.maximum(state.arms.length, SHORT * config.length),
    )
    return state._replace(plateau=plateau)


def _track_safest(algorithm: Algorithm, state: State, risks: jax.Array) -> State:
    """Keeps the student with the least risk so far, in a run with goals."""
    if not algorithm.objectives.goals:
        return state
    safer = risks.min() > state.safest.risk
    return state._replace(
        safest=SafestStudent(
            where(safer, state.current.variables, state.safest.variables),
            jnp.where(safer, risks.min(), state.safest.risk),
        )
    )


class _Outcome(NamedTuple):
    """What an iteration found and decided."""

    proposals: Proposals
    evidence: Evidence
    ruling: jax.Array
    choice: adapt.Choice
    promotion: PromotionTest
    risks: jax.Array
    verdict: jax.Array
    asked: jax.Array
    final: jax.Array


def _decision(algorithm: Algorithm, state: State, steps: jax.Array, outcome: _Outcome) -> Decision:
    """The record of an iteration after which the run has this state."""
    choice, promotion, arms = outcome.choice, outcome.promotion, algorithm.arms
    behind, behind_se = allocate.behind_best(prioritise.ruled(outcome.evidence, outcome.ruling).promise)
    return Decision(
        iteration=state.clock.iteration,
        cost=state.clock.cost,
        position=state.clock.position,
        steps=steps,
        scores=outcome.evidence.select.mean(axis=1),
        promise_scores=outcome.evidence.promise.mean(axis=1),
        behind=behind,
        behind_se=behind_se,
        racing=state.arms.racing,
        asked=outcome.asked,
        selected=jnp.where(choice.any_active, choice.row, -1),
        discarded=(steps > 0).sum() - outcome.proposals.active[: len(arms)].sum(),
        ruling=outcome.ruling,
        risks=outcome.risks,
        gain=choice.gain,
        gain_se=choice.gain_se,
        promotion=promotion,
        verdict=outcome.verdict,
        promoted_arm=jnp.where(promotion.promoted, state.current.arm, -1),
        champion_score=state.champion.decide.mean(),
        current_score=state.current.evidence.promise.mean(),
        length=state.arms.length,
        tuned=tuple(
            arm.hyperparameters(arm_state) if arm.hyperparameters else {}
            for arm, arm_state in zip(arms, state.arms.states, strict=True)
        ),
        stuck=stuck(state),
        met=state.met,
        final=outcome.final,
        closed=state.closed,
    )


def _move(
    algorithm: Algorithm,
    state: State,
    proposals: Proposals,
    evidence: Evidence,
    *,
    plan: Plan,
    ruling: jax.Array,
) -> tuple[State, adapt.Choice, jax.Array]:
    """Moves the current student to the proposal that assess prefers, or back to the champion, and updates the arms.

    Each arm continues from its own proposal, whether it was preferred or not. An arm whose proposal is not finite starts afresh
    from the current student, and after a roll-back all arms do. In the final phase the student moves to the leader's proposal,
    because assess cannot compare students that learn from it.

    Returns:
      The state, the choice, and whether the run rolled back. It does if assess shows the student to be worse than the
      champion, and the champion lies no further below any goal.
    """
    arms, clock, thresholds = state.arms, state.clock, algorithm.objectives.thresholds
    sound = proposals.active & ~prioritise.breaks(evidence, state.current.evidence, thresholds)
    scores, reference = (prioritise.ruled(x, ruling) for x in (evidence, state.current.evidence))
    choice = adapt.choose(scores, reference, sound, arms.leader)
    if algorithm.has_final:
        trains = proposals.active[arms.leader]
        followed = choice._replace(row=arms.leader, any_active=trains, moves=trains)
        choice = where(state.final, followed, choice)
    current, rolled_back = _next_current(algorithm, state, proposals, evidence, choice)
    trained = plan.steps > 0
    arm_states = tuple(
        where(
            rolled_back | (trained[i] & ~proposals.active[i]),
            arm.init(current.variables),
            proposals.arm_states[i],
        )
        for i, arm in enumerate(algorithm.arms)
    )
    won = (jnp.arange(len(algorithm.arms)) == choice.row) & choice.moves
    behind = jnp.where(trained, allocate.standardized(*allocate.behind_best(scores.promise)), 0.0)
    arms = arms._replace(
        states=arm_states,
        value=allocate.next_values(arms.value, trained, behind),
        lag=allocate.next_lag(arms, trained, scores.promise, prioritise.ruled(current.evidence, ruling)),
        wins=arms.wins + won,
        leader=jnp.where(choice.moves, choice.row, arms.leader),
        length=plan.length,
        raced=arms.raced + jnp.where(plan.racing, plan.steps.max(), 0),
    )
    _, in_race = _enter(algorithm, arms, plan.budget)
    broken = trained & ~proposals.active
    arms = allocate.race_on(arms, behind, broken, in_race, budget=plan.budget, config=algorithm.config)
    clock = clock._replace(stale=jnp.where(choice.moves | rolled_back, 0, clock.stale + 1))
    return state._replace(clock=clock, current=current, arms=arms), choice, rolled_back


def _next_current(
    algorithm: Algorithm, state: State, proposals: Proposals, evidence: Evidence, choice: adapt.Choice
) -> tuple[CurrentStudent, jax.Array]:
    """The next current student, and whether it is the champion after a roll-back."""
    thresholds = algorithm.objectives.thresholds
    variables, shown = where(
        choice.moves,
        (_row(proposals.variables, choice.row), _row(evidence, choice.row)),
        (state.current.variables, state.current.evidence),
    )
    champion, binary = state.champion, algorithm.objectives.promise.binary
    rolled_back = proves(champion.evidence.promise, shown.promise, algorithm.config.roll_back, binary=binary)
    rolled_back &= ~prioritise.falls_shorter(champion.evidence, shown, thresholds) & ~state.final
    variables, shown = where(rolled_back, (champion.variables, champion.evidence), (variables, shown))
    arm = jnp.where(rolled_back, -1, jnp.where(choice.moves, choice.row, state.current.arm))
    return CurrentStudent(variables, shown, arm), rolled_back


def _row(tree: PyTree, row: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[row], tree)
