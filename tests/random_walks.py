"""Random-walk arms whose students are thresholds, so that every result of a step can be computed by hand."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, Objectives, explore, initial_state, make_step
from ev3_distill.tasks.classification import example_scores
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.types import Arm, Batch, Pools, Stretch, Variables

NAN = float("nan")


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.array_equal(x, y) for x, y in pairs)


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if np.issubdtype(leaf.dtype, np.floating))


def row(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf[i]), tree)


def parts_kept_by_rejection(state):
    """The parts of a state that must stay bit-identical in an iteration without adoption, promotion or rollback."""
    arms = state.arms
    return state.key, state.current, state.champion, (arms.wins, arms.promotions, arms.leader)


def replace_fields(state, **groups):
    """A copy of the state with fields of its groups replaced, for example clock={"cost": 3}."""
    return state._replace(**{name: getattr(state, name)._replace(**fields) for name, fields in groups.items()})


def scored(state, score):
    """The state, with a current student whose scores on assess are all `score`: 0 lets any proposal win, 1 none."""
    evidence = jax.tree.map(lambda leaf: jnp.full_like(leaf, score), state.current.evidence)
    return replace_fields(state, current={"evidence": evidence})


# A student is a threshold t. It is right on examples of label 0 whose input is below t, and on examples of label 1 whose
# input is above t. Inputs are n + 1/2, so t = 7 is right on 7 examples of label 0. The speed and the health of each arm are
# stored in the student's statistics, so that one compiled step serves all tests with the same number of arms.

B, N = 4, 64
RUN_KEY = jax.random.key(5)
SOUND, NAN_STUDENT, NAN_STATE, INF_STATE = range(4)


def make_split(inputs, labels=None):
    inputs = jnp.asarray(inputs, jnp.float32)[:, None]
    n = inputs.shape[0]
    labels = jnp.zeros(n, jnp.int32) if labels is None else jnp.asarray(labels, jnp.int32)
    return Batch(inputs, labels, {"logits": jnp.zeros((n, 2))}, jnp.arange(n, dtype=jnp.int32), jnp.ones(n))


def ladder(n=N):
    return make_split(np.arange(n) + 0.5)


def apply_threshold(variables, inputs, *, train, key=None):
    lead = variables.params["t"] - inputs[:, 0]
    return jnp.stack([lead, jnp.zeros_like(lead)], axis=1), variables


def threshold(t, speeds=(0,), health=None):
    health = [SOUND] * len(speeds) if health is None else health
    return Variables({"t": jnp.float32(t)}, {"speed": jnp.float32(speeds), "health": jnp.int32(health)})


def rows(step):
    return (step * B + jnp.arange(B)) % N


def sample(examples, step):
    return jax.tree.map(lambda leaf: leaf[rows(step)], examples)


def run_arms(arms, state, pools, steps):
    """Proposals of the arms after `steps` steps each."""
    draw = explore.draw_from(pools.explore, sample, RUN_KEY)
    stretches = [Stretch(state.clock.position, n, jnp.float32(0), jnp.float32(0)) for n in steps]
    held = explore.held_from(pools.assess, RUN_KEY, batch_size=B)
    return explore.proposals_of(*explore.roll(arms, state.arms.states, draw, stretches, held), steps)


POOLS = Pools(ladder(), ladder(), ladder())
LOG = 64


class Walk(NamedTuple):
    student: Variables
    age: jax.Array  # steps since the arm was last initialized
    log: jax.Array  # [LOG, B] indices of the examples used at each global step, -1 if none
    keys: jax.Array  # [LOG, 2] the keys used at each global step
    poison: jax.Array  # NaN or infinite for a broken state, else 0


def walker(i):
    """The i-th arm. Each step moves its threshold by speed[i] and logs the indices and the key of the batch."""

    def init(variables):
        log, keys = jnp.full((LOG, B), -1, jnp.int32), jnp.zeros((LOG, 2), jnp.uint32)
        return Walk(variables, jnp.int32(0), log, keys, jnp.float32(0))

    def propose(state, draw, stretch):
        start, steps = stretch.start, stretch.steps
        health = state.student.stats["health"][i]

        def advance(step, state):
            batch, key = draw(start + step)
            student = state.student._replace(params={"t": state.student.params["t"] + state.student.stats["speed"][i]})
            return Walk(
                student,
                state.age + 1,
                state.log.at[start + step].set(batch.index),
                state.keys.at[start + step].set(jax.random.key_data(key)),
                jnp.array([0, 0, jnp.nan, jnp.inf])[health],
            )

        state = jax.lax.fori_loop(0, steps, advance, state)
        t = jnp.where((health == NAN_STUDENT) & (steps > 0), jnp.nan, state.student.params["t"])
        return state, state.student._replace(params={"t": t})

    return Arm(str(i), init, propose)


WALKERS = tuple(walker(i) for i in range(4))
CONFIG = EV3(batch_size=B, length=2, max_length=2)


OBJECTIVES = Objectives(example_scores.accuracy, ACCURACY)


@functools.cache
def compiled(arms, config=CONFIG, **options):
    """Jitted functions for a run with this number of arms: the initial state and the step."""
    algorithm = Algorithm(apply_threshold, WALKERS[:arms], sample, OBJECTIVES, config, **options)

    def start(variables, pools):
        return initial_state(jax.random.key_data(RUN_KEY), variables, pools, algorithm)

    return jax.jit(start), make_step(algorithm)


def begin(speeds, pools=POOLS, *, t=8, health=None, config=CONFIG):
    return compiled(len(speeds), config)[0](threshold(t, speeds, health), pools)


def steps_from(state, remaining, pools=POOLS, **options):
    """Runs one iteration for each remaining budget in `remaining`; returns the states and the decisions."""
    states, decisions = [], []
    step = compiled(len(state.arms.states), **options)[1]
    for left in remaining:
        state, decision = step(pools, state, np.int32(int(state.clock.cost) + left))
        states.append(state)
        decisions.append(jax.device_get(decision))
    return states, decisions


def whole_run(state, limit, pools=POOLS, **options):
    """Runs to the end with this limit, or with the limit that a function of the state returns; see `steps_from`."""
    states, decisions = [], []
    while not bool(state.closed):
        left = (limit(state) if callable(limit) else limit) - int(state.clock.cost)
        (state,), (decision,) = steps_from(state, [left], pools, **options)
        states.append(state)
        decisions.append(decision)
        assert len(states) < 1000
    return states, decisions


def t_of(state):
    return float(state.current.variables.params["t"])


@jax.jit
def proposals_at(state, steps):
    """Proposals of all four walkers; `steps` [4] lists the steps of each."""
    return run_arms(WALKERS, state, POOLS, steps)


MANY = 10**6
