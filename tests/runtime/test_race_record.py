"""The record of a race comes from ledger rows alone."""

import json

import pytest

from ev3_distill.runtime.race import race_news, race_of, race_rows

ARMS = ("kd4", "ce", "dist")


def row(iteration, behind, *, racing=(), left=(), asked=None, arm=None, verdict="keep", steps=20, **changes):
    """A row of an iteration in which the arms of `behind` trained: (difference from the best, its standard error)."""
    fields = {
        "iteration": iteration,
        "cost": 100 * iteration,
        "steps": {name: steps * (name in behind) for name in ARMS},
        "proposed_accuracy": {name: None if gap is None else 0.9 + gap for name, (gap, _) in behind.items()},
        "behind": {name: gap for name, (gap, _) in behind.items()},
        "behind_se": {name: se for name, (_, se) in behind.items()},
        "racing": list(racing),
        "left": list(left),
        "asked": asked,
        "arm": arm,
        "verdict": verdict,
        "objective": "promise",
    }
    return fields | changes


def make_race():
    """ce leaves after two iterations and dist after three, then ce is asked twice and helps once."""
    return [
        row(1, {"kd4": (0.0, 0.0), "ce": (-0.03, 0.01), "dist": (-0.01, 0.01)}, racing=ARMS),
        row(
            2, {"kd4": (0.0, 0.0), "ce": (-0.058, 0.00637), "dist": (-0.01, 0.01)}, racing=("kd4", "dist"), left=("ce",)
        ),
        row(3, {"kd4": (0.0, 0.0), "dist": (-0.004, 0.005)}, left=("dist",)),
        row(4, {"kd4": (0.0, 0.0)}),
        row(5, {"kd4": (0.0, 0.0), "ce": (-0.01, 0.01)}, asked="ce"),
        row(6, {"kd4": (-0.02, 0.01), "ce": (0.0, 0.0)}, asked="ce", arm="ce", verdict="adopt"),
        row(7, {}),
    ]


def test_record_says_how_far_each_arm_came_and_why_it_left():
    record = race_of(make_race())
    assert record == {
        "over": True,
        "leader": "kd4",
        "arms": [
            {"name": "kd4", "steps": 60, "score": 0.9, "left": None},
            {
                "name": "ce",
                "steps": 40,
                "score": pytest.approx(0.842),
                "left": {"iteration": 2, "cost": 200, "objective": "promise",
                         "best": "kd4", "behind": -0.058, "behind_se": 0.00637},
            },
            {
                "name": "dist",
                "steps": 60,
                "score": pytest.approx(0.896),
                "left": {"iteration": 3, "cost": 300, "objective": "promise",
                         "best": "kd4", "behind": -0.004, "behind_se": 0.005},
            },
        ],
        "asked": [{"name": "ce", "times": 2, "steps": 40, "helped": 1}],
    }  # fmt: skip
    assert json.loads(json.dumps(record)) == record


def test_race_that_goes_on_has_no_leader():
    record = race_of(make_race()[:2])
    assert (record["over"], record["leader"]) == (False, None)
    assert [arm["left"] is None for arm in record["arms"]] == [True, False, True]


def test_race_ends_where_only_the_leader_trained():
    """A wall time shrinks the budget: the race is over before its next iteration."""
    record = race_of([*make_race()[:2], row(3, {"kd4": (0.0, 0.0)}), *make_race()[3:]])
    assert (record["over"], record["leader"]) == (True, "kd4")
    left = record["arms"][2]["left"]
    assert (left["iteration"], left["best"], left["behind"]) == (3, None, None)
    assert record["arms"][1]["left"]["iteration"] == 2
    assert record["arms"][0]["left"] is None


def test_only_iterations_of_the_race_are_its_rows():
    rows = make_race()
    assert race_rows(rows) == rows[:3]
    assert race_rows([]) == []
    assert race_rows(rows[3:]) == []  # one arm trains from the start
    assert race_of(rows[3:])["arms"] == [] and race_of(rows[3:])["asked"][0]["times"] == 2
    assert race_of(rows[3:4]) is None
    sizes = [{**one, "size": 1} for one in rows[:2]] + [{**one, "size": 2} for one in rows]
    assert race_rows(sizes) == sizes[:2]  # of a search, the first size


def test_ledgers_of_older_versions_have_no_race():
    old = [{"iteration": 1, "cost": 10, "steps": {"ce": 10}, "scores": {"ce": 0.5, "average": None}, "verdict": "keep"}]
    assert race_rows(old) == [] and race_of(old) is None and race_news(old[0]) == ""


def test_news_say_how_far_behind_arms_left_and_who_leads():
    rows = make_race()
    assert [race_news(one) for one in rows] == [
        "",
        "ce left the race, 5.8 points (9.1 standard errors) behind kd4",
        "dist left the race, 0.4 points (0.8 standard errors) behind kd4; kd4 leads",
        *[""] * 4,
    ]
    level = row(3, {"kd4": (-0.001, 0.01), "dist": (0.0, 0.0)}, left=("dist",))
    assert race_news(level) == "dist left the race, level with the best; kd4 leads"
    broken = row(3, {"kd4": (0.0, 0.0), "dist": (None, None)}, left=("dist",))
    assert race_news(broken) == "dist left the race, as its student was not finite; kd4 leads"
    assert race_of([broken])["arms"][1]["left"]["behind"] is None
