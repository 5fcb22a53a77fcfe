"""The host loop: exact budgets, bitwise resumption, a single compilation, and selection of the delivered student."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ev3_distill as ev3
from ev3_distill.arms import arms_named
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.data.batches import Resident
from ev3_distill.data.shuffle import make_order
from ev3_distill.students.families.mlp import mlp
from ev3_distill.students.families.resnet import resnet
from ev3_distill.tasks.classification import example_scores
from ev3_distill.training.trainer import Distillation, distill
from ev3_distill.types import PROMOTE, Batch, Pools

F, K, N = 6, 3, 80
CONFIG = ev3.EV3(batch_size=8, length=4, max_length=16)
STUDENT = mlp((F,), K, hidden=(8,))


def make_split(seed, n):
    """Examples of a noisy linear rule, with the logits of a teacher that follows the rule exactly."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, F))
    logits = 3 * inputs @ np.random.default_rng(99).normal(size=(F, K))
    labels = np.where(rng.random(n) < 0.1, rng.integers(0, K, n), logits.argmax(1))
    return Batch(
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        {"logits": jnp.asarray(logits, jnp.float32)},
        jnp.arange(n, dtype=jnp.int32),
        jnp.ones(n),
    )


def views(batch):
    """The layout of a resident split, with one view."""
    return batch._replace(teacher={"logits": batch.teacher["logits"][None]})


POOLS = Pools(Resident(views(make_split(0, N)), make_order(N, 0)), make_split(1, N), make_split(2, N))


def squared(logits, batch):
    return jnp.square(logits - batch.teacher["logits"]).mean()


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean()


ARMS = (
    gradient_arm("mse", STUDENT.apply, squared, optax.adam(0.02)),
    gradient_arm("ce", STUDENT.apply, cross_entropy, optax.sgd(0.05), length=0.5),
)
RUN = Distillation(STUDENT, ARMS, config=CONFIG)


SEED = 1  # of a run with a promotion; with 80 examples and so few steps, not every seed has one


@functools.cache
def finished(seed=SEED, budget=200):
    return list(RUN.run(POOLS, RUN.begin(POOLS, seed), budget=budget))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 7, 50, 200])
def test_budget_is_spent_exactly(budget):
    outcome = finished(budget=budget)
    for state, decision in outcome:
        assert int(state.clock.cost) == int(decision.cost) <= budget
    last, closing = outcome[-1]
    assert int(last.clock.cost) == budget
    assert [bool(state.closed) for state, _ in outcome] == [False] * (len(outcome) - 1) + [True]
    assert int(closing.steps.sum()) == 0  # the closing iteration trains no arm
    assert all(int(decision.steps.sum()) > 0 for _, decision in outcome[:-1])
    assert list(RUN.run(POOLS, last, budget=budget)) == []
    assert list(RUN.run(POOLS, last, budget=budget + 100)) == []


def test_run_improves_its_champion():
    start, (last, _) = RUN.begin(POOLS, SEED), finished()[-1]
    assert float(last.champion.decide.mean()) > float(start.champion.decide.mean()) + 0.1
    assert int(last.budget.promotions) >= 1


def test_decisions_agree_with_states():
    before, spent, promoted = RUN.begin(POOLS, SEED), 0, 0
    for state, decision in finished():
        spent += int(decision.steps.sum())
        promoted += int(decision.verdict) == PROMOTE
        assert int(state.clock.iteration) == int(decision.iteration) == int(before.clock.iteration) + 1
        assert int(state.clock.cost) == int(decision.cost) == int(state.arms.cost.sum()) == spent
        assert (
            int(state.clock.position)
            == int(decision.position)
            == int(before.clock.position) + int(decision.steps.max())
        )
        assert int(state.budget.promotions) == promoted
        assert int(state.arms.promotions.sum()) <= promoted  # the others promoted averages
        assert int(state.budget.tests) == int(before.budget.tests) + int(decision.promotion.tested)
        assert float(decision.champion_score) == pytest.approx(float(state.champion.decide.mean()))
        assert CONFIG.length <= float(decision.length) == float(state.arms.length) <= CONFIG.max_length
        scores = RUN.evaluator.evaluate(state.champion.variables, POOLS.decide).promise
        np.testing.assert_array_equal(scores, state.champion.decide)  # recorded scores are those of the champion
        assert_same(
            RUN.evaluator.evaluate(state.champion.variables, POOLS.assess).promise, state.champion.evidence.promise
        )
        assert_same(
            RUN.evaluator.evaluate(state.current.variables, POOLS.assess).promise, state.current.evidence.promise
        )
        before = state


def test_run_resumes_bit_by_bit_from_any_state():
    outcome = finished()
    for i in range(0, len(outcome), 2):
        restored = jax.tree.map(np.array, outcome[i][0])  # as restored from a file
        assert_same(list(RUN.run(POOLS, restored, budget=200)), outcome[i + 1 :])


def test_new_trainer_continues_identically_from_a_state():
    """A new Distillation, compiled again, continues identically from the state alone."""
    outcome = finished()
    state, rest = outcome[2][0], outcome[3:]
    again = list(distill(STUDENT, POOLS, ARMS, budget=200, config=CONFIG, state=state))
    assert_same(again, rest)


BUDGET = 440  # a twentieth is enough for five draws of four steps


def test_fastest_learning_initialization_starts_the_run():
    """At most a twentieth of the budget is spent on initializations; the cost counts, and only the parameters differ."""
    starts, scores = [RUN.begin(POOLS, 1, draw=draw) for draw in range(5)], []
    leads = jnp.array([True, False])
    for state in starts:
        alone = state._replace(arms=state.arms._replace(racing=leads))
        after, decision = next(RUN.run(POOLS, alone, budget=BUDGET))
        scores.append((float(after.current.evidence.promise.mean()), float(after.current.evidence.select.mean())))
    one = int(decision.cost)
    assert one == 4 == int(decision.steps[0]) and len(set(scores)) == 5  # the first arm alone
    best = starts[scores.index(max(scores))]
    best_start = RUN.begin_best(POOLS, 1, budget=BUDGET)
    assert int(best_start.clock.cost) == int(best_start.clock.start_cost) == 5 * one <= BUDGET // 20 < 6 * one
    assert_same(best_start._replace(clock=best.clock), best)
    assert_same(
        RUN.begin_best(POOLS, 1, budget=2 * 20 * CONFIG.length - 1), RUN.begin(POOLS, 1)
    )  # too small for a second initialization
    assert int(RUN.begin_best(POOLS, 1, budget=10**6).clock.cost) == 8 * one
    last, _ = list(RUN.run(POOLS, best_start, budget=BUDGET))[-1]
    assert int(last.clock.cost) == BUDGET == int(last.arms.cost.sum()) + 5 * one


def test_network_with_batch_norm_is_initialized_once():
    network = resnet((8, 8, 1), K, depth=8, width=2)
    inputs = jnp.zeros((N, 8, 8, 1))
    explore, assess, decide = (split._replace(inputs=inputs) for split in (views(make_split(0, N)), *POOLS[1:3]))
    run = Distillation(network, arms_named(network.apply, ("ce",)), config=CONFIG)
    pools = Pools(Resident(explore, make_order(N, 0)), assess, decide)
    assert int(run.begin_best(pools, 0, budget=10**4).clock.cost) == 0


def test_seed_determines_the_initialization():
    assert_same(RUN.begin(POOLS, 3), RUN.begin(POOLS, 3))
    one, other = (jax.tree.leaves(RUN.begin(POOLS, seed).current.variables.params) for seed in (3, 4))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


def test_only_the_first_iteration_compiles(caplog):
    """Lengths, active arms and the budget are data: only the first iteration of the first run compiles."""
    fresh = Distillation(STUDENT, ARMS[:1], config=CONFIG)
    running = fresh.run(POOLS, fresh.begin(POOLS, 0), budget=150)
    first = next(running)
    spent = fresh.compile_s
    with caplog.at_level(logging.DEBUG), jax.log_compiles():
        lengths = {int(decision.steps.sum()) for _, decision in running}
        other = list(fresh.run(POOLS, first[0], budget=77))
    assert len(lengths) > 2  # several lengths, including 0 of the closing iteration
    assert len(other) > 1
    assert [record.getMessage() for record in caplog.records if "ompiling" in record.getMessage()] == []
    assert fresh.compile_s == spent > 0
    with caplog.at_level(logging.DEBUG), jax.log_compiles():
        jax.jit(lambda x: x + 41)(np.arange(7))
    assert any("ompiling" in record.getMessage() for record in caplog.records)  # the log would have shown a compilation


def test_run_ends_at_its_wall_time_limit():
    (last, decision), *more = RUN.run(POOLS, RUN.begin(POOLS, 0), seconds=0.0)
    assert more == []
    assert (int(last.clock.cost), int(decision.steps.sum()), bool(last.closed)) == (0, 0, True)
    outcome = list(RUN.run(POOLS, RUN.begin(POOLS, 0), budget=40, seconds=600))
    assert int(outcome[-1][0].clock.cost) == 40  # the first limit reached ends the run


def test_better_student_on_decide_is_delivered():
    state = finished()[-1][0]
    assert RUN.evaluator.select(POOLS, state, "champion")[0] == "champion"
    champion = state.champion.variables
    worse, same = (
        state._replace(current=state.current._replace(variables=variables))
        for variables in (jax.tree.map(lambda leaf: -leaf, champion), champion)
    )
    for current in (worse, same):  # the champion wins ties
        name, variables = RUN.evaluator.select(POOLS, current)
        assert name == "champion"
        assert_same(variables, champion)
    weak_champion = worse._replace(champion=state.champion._replace(decide=jnp.zeros(N)))
    name, variables = RUN.evaluator.select(POOLS, weak_champion)
    assert name == "current"
    assert_same(variables, worse.current.variables)
    assert RUN.evaluator.select(POOLS, weak_champion, "champion")[0] == "champion"


class CustomStudent(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(64, 12, rngs=rngs), nnx.BatchNorm(12, rngs=rngs)
        self.drop, self.out = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(nnx.relu(self.norm(self.hidden(x.reshape(len(x), -1))))))


def test_custom_student_and_logits_are_distilled():
    dataset = ev3.load_data("digits")
    own_logits = 8 * np.eye(10, dtype=np.float32)[dataset.labels]
    pools, test = ev3.split(dataset, own_logits, seed=0)
    student = ev3.from_nnx(CustomStudent)
    arms = [ev3.gradient_arm("own", student.apply, cross_entropy, optax.adam(0.01))]
    for state, decision in ev3.distill(student, pools, arms, budget=150, config=ev3.EV3(batch_size=64, length=25)):
        last, verdict = state, decision
    logits, _ = student.apply(last.champion.variables, test.inputs, train=False)
    assert bool(last.closed)
    assert int(verdict.cost) == 150
    assert float(example_scores.accuracy(logits, test).mean()) > 0.5
