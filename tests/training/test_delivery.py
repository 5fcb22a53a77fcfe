"""Which student a run with guards delivers: the current one, unless decide shows another to be clearly better."""

import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill import goal
from ev3_distill.tasks.classification.task import classification
from ev3_distill.training.devices import ONE
from ev3_distill.training.evaluate_students import StudentEvaluator
from ev3_distill.types import Batch, Champion, CurrentStudent, Network, Pools, SafestStudent, State, Variables

COMMON, RARE = 100, 10  # examples of class 0 and of class 1
N = COMMON + RARE
LABELS = np.repeat([0, 1], [COMMON, RARE]).astype(np.int32)
GOALS = [goal("worst_class_accuracy", 0.8)]


def apply(variables, inputs, *, train, key=None):
    """A student that is right on the examples that its parameters mark."""
    row, label = inputs.astype(jnp.int32).T
    answer = jnp.where(variables.params["right"][row] > 0, label, 1 - label)
    return 4.0 * (answer[:, None] == jnp.arange(2)), variables


def student(common, rare):
    """A student that is right on the first `common` and `rare` examples of the classes."""
    right = np.concatenate([np.arange(COMMON) < common, np.arange(RARE) < rare])
    return Variables({"right": jnp.array(right, jnp.float32)}, {})


SPLIT = Batch(
    jnp.array(np.stack([np.arange(N), LABELS], 1), jnp.float32),
    jnp.array(LABELS),
    {"logits": jnp.zeros((N, 2))},
    jnp.arange(N),
    jnp.ones(N),
)
POOLS = Pools((), SPLIT, SPLIT)


def delivered(champion, current, safest, *, goals=GOALS, policy="best", met=False):
    """Which of three students is delivered, each given by its right answers of class 0 and of class 1 on decide."""
    network = Network(lambda key: student(0, 0), apply, {})
    evaluator = StudentEvaluator(network, classification().objectives(goals), batch_size=N, devices=ONE)
    proven, last, safe = (student(*counts) for counts in (champion, current, safest))
    on_decide = evaluator.evaluate(proven, SPLIT).promise
    blank = dict.fromkeys(State._fields, ())
    state = State(**blank)._replace(
        champion=Champion(proven, (), on_decide, ()),
        current=CurrentStudent(last, (), 0),
        safest=SafestStudent(safe if goals else (), 0.0),
        met=met,
        final=False,
    )
    name, variables = evaluator.select(POOLS, state, policy)
    wanted = {"champion": proven, "current": last, "safest": safe}[name]
    np.testing.assert_array_equal(variables.params["right"], wanted.params["right"])
    return name


def test_one_rare_example_does_not_bring_back_an_early_champion():
    """The champion is right on one rare example more, and on 60 of 100 common ones instead of 95."""
    assert delivered((60, 5), (95, 4), (60, 5)) == "current"
    assert delivered((60, 5), (95, 5), (60, 5)) == "current"  # level on the worst class, where rounding would decide
    assert delivered((60, 5), (95, 4), (60, 5), policy="champion") == "champion"


@pytest.mark.parametrize(("champion", "safest", "name"), [((95, 9), (60, 5), "champion"), ((60, 5), (95, 9), "safest")])
def test_clearly_better_student_by_the_guard_is_delivered(champion, safest, name):
    """Seven of ten rare examples more: a gain of 0.7 with a standard error of 0.5."""
    assert delivered(champion, (95, 2), safest) == name
    assert delivered(champion, (95, 2), safest, met=True) == "current"  # decide has proved all goals of the current one


def test_best_of_two_clearly_better_students_needs_to_be_clearly_better_than_the_other():
    assert delivered((95, 8), (95, 1), (95, 9)) == "champion"
    assert delivered((95, 4), (95, 0), (95, 10)) == "safest"


def test_champion_that_is_the_current_student_is_delivered_as_proven():
    assert delivered((95, 7), (95, 7), (60, 5)) == "champion"


def test_student_that_breaks_another_guard_of_the_current_one_is_not_delivered():
    goals = [*GOALS, goal("accuracy", 0.85)]
    assert delivered((75, 10), (95, 0), (75, 10), goals=GOALS) == "champion"
    assert delivered((75, 10), (95, 0), (75, 10), goals=goals) == "current"


def test_where_no_guard_is_at_risk_accuracy_compares():
    goals = [goal("worst_class_accuracy", 0.01)]
    assert delivered((99, 10), (60, 8), (60, 8), goals=goals) == "champion"
    assert delivered((61, 8), (60, 8), (60, 8), goals=goals) == "current"


def test_without_guards_the_champion_is_delivered_unless_the_current_student_scores_higher():
    assert delivered((60, 5), (61, 5), (0, 0), goals=[]) == "current"
    assert delivered((60, 5), (60, 5), (0, 0), goals=[]) == "champion"
