"""The archive of a search: scores of each entry, selection, Pareto front and picks."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ev3_distill.errors import InputError
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.search.archive import Archive, Entry, Measurement, best, pareto_front, pick, select
from ev3_distill.types import Variables

DIFFICULTY = np.random.default_rng(0).random(40)


def student(size, value):
    return Variables({"w": jnp.full(size, value, jnp.float32)}, {})


def measure(variables):
    """Scores that depend on the student alone."""
    fraction = float(jnp.tanh(variables.params["w"].sum()) ** 2)
    return Measurement((fraction > DIFFICULTY).astype(np.float32), int(fraction > 0.5), fraction, 1 - fraction)


def entry(number, params, accuracy, bound, met=False, goals_met=0):
    return Entry(number, f"net {number}", {}, params, "", "", 0, 100, accuracy, bound, goals_met, 0.0, met)


events = st.lists(
    st.tuples(
        st.sampled_from(["train", "grow", "roll back", "add", "reload"]),
        st.floats(-1, 1, width=32),
        st.integers(1, 4),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events)
def test_each_entry_has_the_scores_of_its_own_student(tmp_path, history):
    """Even if the current student trains, grows or rolls back in between."""
    (tmp_path / "archive.json").unlink(missing_ok=True)
    archive, added = Archive(tmp_path, confidence=0.95), {}
    current = before = student(1, 0.5)
    for number, (event, value, size) in enumerate(history):
        if event == "train":
            before, current = current, student(current.params["w"].size, value)
        elif event == "grow":
            current = Variables({"w": jnp.concatenate([current.params["w"], jnp.zeros(size)])}, {})
        elif event == "roll back":
            current = before
        elif event == "reload":
            archive = Archive(tmp_path, confidence=0.95)
        else:
            archive.add(
                current,
                measure,
                number=number,
                network="net",
                spec={},
                origin="trained",
                cost=number,
                meets=lambda _: False,
            )
            added[number] = current
    again = Archive(tmp_path, confidence=0.95)
    assert again.entries == archive.entries
    assert [one.number for one in again.entries] == list(added)
    for one in again.entries:
        variables = added[one.number]
        scores = measure(variables)
        assert one.digest == tree_digest(variables)
        assert one.params == variables.params["w"].size
        assert one.accuracy == scores.correct.mean()
        low = (
            binomtest(int(scores.correct.sum()), len(DIFFICULTY), alternative="greater")
            .proportion_ci(0.95, method="exact")
            .low
        )
        assert one.bound == pytest.approx(low, abs=1e-9)
        assert (one.goals_met, one.least_risk, one.p_value) == scores[1:]


def test_adding_a_stage_again_keeps_its_entry(tmp_path):
    """A resumed search adds its stages again."""
    fields = {"number": 3, "network": "net", "spec": {}, "origin": "trained", "meets": lambda _: False}
    first = Archive(tmp_path, confidence=0.9).add(student(2, 0.5), measure, cost=10, **fields)
    archive = Archive(tmp_path, confidence=0.9)
    assert archive.add(student(2, 0.7), measure, cost=20, **fields) == first
    assert archive.entries == [first]
    assert json.loads((tmp_path / "archive.json").read_text())["entries"] == [first.as_dict()]
    assert first.as_dict()["how"] == "trained"  # the key in files


ENTRIES = [
    entry(1, 100, 0.7, 0.6),
    entry(2, 200, 0.9, 0.8, met=True, goals_met=1),
    entry(3, 150, 0.65, 0.55),
    entry(4, 300, 0.85, 0.75, met=True, goals_met=1),
    entry(5, 200, 0.8, 0.7),
]


def test_pareto_front_has_no_dominated_entry():
    assert [one.number for one in pareto_front(ENTRIES)] == [1, 2]
    assert pareto_front([]) == []


def test_select_takes_the_smallest_student_that_met_its_goals():
    assert select(ENTRIES).number == 2
    assert select([dataclasses.replace(one, met=False) for one in ENTRIES]).number == best(ENTRIES).number == 2
    assert select([entry(1, 100, 0.7, 0.6), entry(2, 90, 0.7, 0.6)]).number == 2


@pytest.mark.parametrize(
    ("conditions", "number"),
    [
        ("params<=150", 1),
        ("params <= 250", 2),
        ("bound>=0.75,params>=250", 4),
        ("accuracy>=0.85", 2),
        ("params<=2e2", 2),
    ],
)
def test_pick_takes_the_highest_bound_that_meets_the_conditions(conditions, number):
    assert pick(ENTRIES, conditions).number == number


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ("size<=3", "a pick is conditions on params, accuracy, bound, joined by commas; got 'size<=3': try"),
        ("params=3", "got 'params=3'"),
        ("", "got ''"),
        ("params<=99", "got 'params<=99', and students of 100 parameters with 70.0%, 200 parameters with 90.0%: ask"),
    ],
)
def test_invalid_picks_are_rejected(conditions, message):
    with pytest.raises(InputError) as error:
        pick(ENTRIES, conditions)
    assert message in str(error.value)


def test_a_score_above_one_half_counts_as_correct():
    assert Measurement(np.array([0.0, 0.3, 0.4, 0.6, 0.9]), 0, 0.0, 1.0).rank[-1] == pytest.approx(2 / 5)
