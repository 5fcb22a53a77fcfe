"""The final phase: it trains on all three splits, decides nothing, and its student is delivered unless the phase went wrong."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_trainer import ARMS, CONFIG, POOLS, RUN, STUDENT, N, assert_same, make_split

from ev3_distill import goal
from ev3_distill.config import EV3, Compress, Teach
from ev3_distill.core import Ending
from ev3_distill.core.explore import draw_from
from ev3_distill.data.batches import resident, sampler
from ev3_distill.runtime.ledger import read_rows
from ev3_distill.tasks.classification.task import classification
from ev3_distill.training import setup as run_setup
from ev3_distill.training.evaluate_students import final_steps
from ev3_distill.training.trainer import Distillation, distill
from ev3_distill.types import FINAL, Stretch

BUDGET, TURN = 200, 160  # the last fifth is the final phase
SEED = 1


def pools_with_rows(seeds=(0, 1, 2)):
    """The pools of other tests; explore also holds the rows of assess and decide, or others in their place."""
    splits = [make_split(seed, N) for seed in seeds]
    inputs, targets, logits = (
        np.concatenate(leaves)
        for leaves in zip(*((one.inputs, one.targets, one.teacher["logits"]) for one in splits), strict=True)
    )
    explore = resident(inputs, targets, np.arange(3 * N), {"logits": logits[None]}, seed=0, explored=N)
    return POOLS._replace(explore=explore)


PHASED = Distillation(STUDENT, ARMS, config=CONFIG, ending=Ending(has_final=True))
WITH_ROWS = pools_with_rows()


@functools.cache
def phased(seeds=(0, 1, 2)):
    pools = pools_with_rows(seeds)
    return list(PHASED.run(pools, PHASED.begin(pools, SEED), budget=BUDGET))


def parts_of(outcome):
    """(before the turn, the turn, the final phase), each a list of (state, decision)."""
    turn = next(i for i, (state, _) in enumerate(outcome) if bool(state.final))
    return outcome[:turn], outcome[turn], outcome[turn + 1 :]


def test_run_before_its_final_phase_is_the_run_without_one():
    before, _, _ = parts_of(phased())
    without = list(RUN.run(POOLS, RUN.begin(POOLS, SEED), budget=BUDGET))
    same = [i for i, (_, decision) in enumerate(before) if int(decision.cost) < TURN]
    assert len(same) > 5
    for i in same:
        assert_same(before[i][0]._replace(before=()), without[i][0])
        assert_same(before[i][1], without[i][1])


def test_turn_makes_the_closing_test_and_the_leader_alone_follows():
    before, (state, decision), after = parts_of(phased())
    assert int(before[-1][0].clock.cost) == int(state.clock.cost) == int(state.before.cost) == TURN
    assert int(decision.steps.sum()) == 0 and not bool(decision.final) and not bool(state.closed)
    assert float(state.budget.left) == 0  # the closing test was the last
    assert_same(state.before.variables, state.current.variables)
    assert [bool(one.closed) for one, _ in after] == [False] * (len(after) - 1) + [True]
    assert int(after[-1][0].clock.cost) == BUDGET == TURN + final_steps(after[-1][0])
    leader = int(state.arms.leader)
    for _, row in after[:-1]:
        assert bool(row.final) and int(row.verdict) == FINAL and int(row.steps[leader]) == int(row.steps.sum()) > 0
    for one, row in after:
        assert not bool(row.promotion.tested)
        assert_same((one.champion, one.budget, one.before), (state.champion, state.budget, state.before))


def test_final_phase_trains_on_the_batches_of_all_rows():
    """The next student is what the leader's arm makes of these batches; other held-out rows change it, but nothing before."""
    before, (state, turn), after = parts_of(phased())
    one, row = after[0]
    leader, steps = int(state.arms.leader), int(row.steps.max())
    pool = WITH_ROWS.explore._replace(final=jnp.bool_(True))
    sample = sampler(batch_size=CONFIG.batch_size)
    draw = draw_from(pool, sample, jax.random.wrap_key_data(state.key))
    rows = {int(i) for step in range(steps) for i in draw(state.clock.position + step)[0].index}
    assert max(rows) >= N
    stretch = Stretch(state.clock.position, jnp.int32(steps), jnp.float32(TURN / BUDGET), jnp.float32(1 / BUDGET))
    wanted = ARMS[leader].propose(state.arms.states[leader], draw, stretch)[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), one.current.variables, wanted)
    other, (other_state, other_turn), other_after = parts_of(phased((0, 7, 8)))
    assert_same([*before, (state, turn)], [*other, (other_state, other_turn)])
    assert any(
        (a != b).any()
        for a, b in zip(*(jax.tree.leaves(x[0][0].current.variables) for x in (after, other_after)), strict=True)
    )


def streamed(first, last, final):
    middle = first + (last - first) // 2
    pool = WITH_ROWS.explore._replace(final=jnp.bool_(final))
    return iter([(pool, *part) for part in ((first, middle), (middle, last)) if part[0] < part[1]])


@pytest.mark.parametrize("pipeline", [None, streamed])
def test_run_resumes_bit_by_bit_from_any_state_of_the_final_phase(pipeline):
    start = PHASED.begin(WITH_ROWS, SEED)
    outcome = list(PHASED.run(WITH_ROWS, start, budget=BUDGET, pipeline=pipeline))
    before, _, after = parts_of(outcome)
    for i in range(len(before) - 1, len(outcome), 2):
        restored = jax.tree.map(np.array, outcome[i][0])  # as restored from a file
        assert_same(list(PHASED.run(WITH_ROWS, restored, budget=BUDGET, pipeline=pipeline)), outcome[i + 1 :])
    assert len(after) > 2
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        outcome[-1][0].current.variables,
        phased()[-1][0].current.variables,
    )


def accuracy(variables, split):
    return float(PHASED.evaluator.evaluate(variables, split).promise.mean())


def test_student_of_the_final_phase_is_delivered_unless_it_went_wrong():
    state, select = phased()[-1][0], PHASED.evaluator.select
    name, variables = select(WITH_ROWS, state)
    assert name == "final"
    assert_same(variables, state.current.variables)
    before_name, before = PHASED.evaluator.select_before_final(WITH_ROWS, state)
    assert before_name in ("champion", "current")
    assert_same(before, getattr(state._replace(current=state.before), before_name).variables)

    def ending_with(student):
        return state._replace(current=state.current._replace(variables=student))

    wrong = jax.tree.map(lambda leaf: -leaf, state.current.variables)
    broken = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), state.current.variables)
    for student in (wrong, broken):
        name, variables = select(WITH_ROWS, ending_with(student))
        assert name == before_name
        assert_same(variables, before)
    assert select(WITH_ROWS, ending_with(before))[0] == "final"  # level is no harm
    _, (turn, _), _ = parts_of(phased())
    assert select(WITH_ROWS, turn) == PHASED.evaluator.select_before_final(WITH_ROWS, turn)  # no step of the phase
    assert select(WITH_ROWS, turn)[0] == before_name


def test_student_before_the_phase_is_selected_by_decide_as_it_was_at_the_turn():
    state, (_, (turn, _), _) = phased()[-1][0], parts_of(phased())
    for decide, name in ((jnp.zeros(N), "current"), (jnp.ones(N) * 2, "champion")):
        champion = state.champion._replace(decide=decide)
        found, variables = PHASED.evaluator.select_before_final(WITH_ROWS, state._replace(champion=champion))
        assert found == name
        assert_same(variables, (turn.current if name == "current" else state.champion).variables)


def test_distill_has_a_final_phase_where_the_pool_can_and_no_goal_decides():
    def finals(pools, **options):
        outcome = distill(STUDENT, pools, ARMS, budget=100, **options)
        return [bool(row.final) for _, row in outcome]

    assert any(finals(WITH_ROWS, config=CONFIG))
    assert not any(finals(POOLS, config=CONFIG))
    assert not any(finals(WITH_ROWS, config=dataclasses.replace(CONFIG, final=0.0)))
    guarded = classification().objectives([goal("worst_class_accuracy", 0.7)])
    assert not any(finals(WITH_ROWS, config=CONFIG, objectives=guarded))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ((), True),
        (("--augment", "none", "--memory", "1M"), True),
        (("--guard", "accuracy >= 0.5"), False),
        (("--guard", "latency_ms <= 100"), False),
        (("--control",), False),
        (("--deliver", "champion"), False),
        (("--final", "0"), False),
        (("--patience", "3"), False),
        (("--start", "tiny", "--guard", "accuracy >= 0.5"), False),
    ],
)
def test_only_runs_that_decide_nothing_at_their_end_have_a_final_phase(
    monkeypatch, cli, here, random_logits, options, wanted
):
    found = []

    def stop(*args, **options):
        found.append(options["ending"].has_final)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_setup, "Distillation", stop)
    student = ("--student", "mlp:hidden=8", "--budget", "400", "--teacher", f"logits:{random_logits}")
    assert cli("compress", *student, *options, "--out", "run").code == 130
    assert found == [wanted]


def test_decide_still_holds_out_for_students_that_are_compared_there():
    """Teachers and controls have no final phase by default."""
    config = Compress(ev3=EV3(final=0.3))
    assert config.teacher_config().ev3.final == config.control_config().ev3.final == 0
    assert Teach().ev3.final == 0 < EV3().final


def test_report_says_what_the_final_phase_added_and_what_decide_proved(finished):
    report = json.loads((finished / "report.json").read_text())
    rows, state = list(read_rows(finished / "ledger.jsonl")), report["final"]
    turn = next(row for row in rows if row["cost"] == 1200 and not sum(row["steps"].values()))
    assert state["steps"] == 300 == report["cost"]["steps"] - turn["cost"]
    assert state["rows"] == report["splits"]["assess"] + report["splits"]["decide"]
    assert state["delivered"] == (report["student"]["delivered"] == "final")
    assert state["before"] in ("champion", "current")
    if state["before"] == "champion":
        assert state["before_accuracy"] == pytest.approx(turn["champion_accuracy"])
    else:
        assert state["before_accuracy"] > turn["champion_accuracy"]
    assert json.loads((finished / "teacher" / "report.json").read_text())["final"] is None
