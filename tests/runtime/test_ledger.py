"""The ledger has complete rows in order and is truncated to those that the checkpoint includes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binomtest

from ev3_distill.errors import InputError
from ev3_distill.runtime.ledger import Ledger, read_rows, row_of
from ev3_distill.tasks.classification.steering import goal
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.types import ADOPT, FINAL, KEEP, PROMOTE, ROLL_BACK, Decision, PromotionTest

ARMS = ("ce", "kd")


def decision(*, tuned=({}, {}), test_changes=None, **changes):
    """Arm kd's proposal was tested on 100 examples, won 12, lost 3, and was promoted."""
    fields = {
        "iteration": 4,
        "cost": 150,
        "position": 90,
        "steps": jnp.array([0, 50]),
        "scores": jnp.array([jnp.nan, 0.75]),
        "promise_scores": jnp.array([jnp.nan, 0.875]),
        "behind": jnp.array([jnp.nan, 0.0]),
        "behind_se": jnp.array([jnp.nan, 0.0]),
        "racing": jnp.array([False, True]),
        "asked": -1,
        "selected": 1,
        "discarded": 0,
        "gain": 0.25,
        "gain_se": 0.125,
        "verdict": PROMOTE,
        "promoted_arm": 1,
        "champion_score": 0.5,
        "current_score": 0.75,
        "length": 50.0,
        "ruling": -1,
        "risks": jnp.zeros(0),
    }
    test = {
        "tested": True,
        "goal": -1,
        "focus": 0,
        "wins": 12,
        "losses": 3,
        "n": 100,
        "counts": True,
        "alpha": 0.0625,
        "p_value": 0.0176,
    }
    test = PromotionTest(**{**test, "promoted": True, "breaks": False, "lowers": False, **(test_changes or {})})
    unused = dict.fromkeys(Decision._fields, 0)
    arrays = {name: jnp.asarray(value) for name, value in (unused | fields | changes).items()}
    return Decision(**{**arrays, "tuned": tuned, "promotion": test})


def test_row_contains_tuned_hyperparameters():
    tuned = ({}, {"temperature": jnp.float32(2.5), "mix": jnp.array([0.75, 0.25])})
    assert row_of(decision(tuned=tuned), ARMS, ACCURACY, wall_s=0)["tuned"] == {
        "kd": {"temperature": 2.5, "mix": [0.75, 0.25]}
    }
    assert "tuned" not in row_of(decision(), ARMS, ACCURACY, wall_s=0)


def test_row_equals_one_written_by_hand():
    row = row_of(decision(), ARMS, ACCURACY, wall_s=1.23456)
    test = row.pop("test")
    assert row == {
        "iteration": 4,
        "cost": 150,
        "position": 90,
        "steps": {"ce": 0, "kd": 50},
        "scores": {"ce": None, "kd": 0.75},
        "proposed_accuracy": {"kd": 0.875},
        "behind": {"kd": 0.0},
        "behind_se": {"kd": 0.0},
        "racing": [],
        "left": [],
        "asked": None,
        "selected": "kd",
        "discarded": 0,
        "objective": "promise",
        "risks": {},
        "gain": 0.25,
        "gain_se": 0.125,
        "verdict": "promote",
        "arm": "kd",
        "champion_accuracy": 0.5,
        "current_accuracy": 0.75,
        "length": 50.0,
        "stuck": False,
        "met": False,
        "final": False,
        "wall_s": 1.235,
    }
    theta = binomtest(12, 15, alternative="greater").proportion_ci(1 - 0.0625, method="exact").low
    assert test["bound"] == pytest.approx((2 * theta - 1) * 15 / 100, rel=1e-6)
    assert test["gain"] == pytest.approx(0.09)
    assert (test["wins"], test["losses"], test["n"], test["alpha"]) == (12, 3, 100, 0.0625)
    assert (test["hypothesis"], test["reason"]) == ("the accuracy is higher than the champion's", None)
    assert json.loads(json.dumps(row)) == row


def test_row_names_the_objective_that_steered():
    goals = [goal("worst_class_accuracy", 0.7), goal("ece", 0.02)]
    ruled = decision(
        ruling=0, risks=jnp.array([-1.5, jnp.inf]), test_changes={"goal": 1, "breaks": True, "counts": False}
    )
    row = row_of(ruled, ARMS, ACCURACY, goals, wall_s=0)
    assert (row["objective"], row["risks"]) == ("worst_class_accuracy", {"worst_class_accuracy": -1.5, "ece": None})
    assert (row["test"]["objective"], row["test"]["kept"], row["test"]["bound"]) == ("ece", True, None)
    assert row["test"]["reason"] == "would break a guard"


def test_row_names_the_hypothesis_of_the_test_and_why_it_did_not_suffice():
    changes = {"goal": 0, "focus": 3, "lowers": True}
    goals, lowered = [goal("worst_class_accuracy", 0.7)], decision(risks=jnp.zeros(1), test_changes=changes)
    test = row_of(lowered, ARMS, ACCURACY, goals, wall_s=0)["test"]
    assert test["hypothesis"] == "the accuracy on every class is higher than the champion's on class 3"
    assert (test["kept"], test["reason"]) == (True, "the guard's own metric fell on decide")


def test_row_of_a_test_without_pairs():
    """The champion's worst class has no examples on decide."""
    changes = {"wins": 0, "losses": 0, "n": 0, "p_value": 1.0, "promoted": False}
    test = row_of(decision(test_changes=changes), ARMS, ACCURACY, wall_s=0)["test"]
    assert (test["gain"], test["bound"]) == (0, 0)


def test_row_names_the_verdict_and_its_arm():
    # A promotion names the arm that made the champion, even if another arm's proposal was selected in this iteration.
    late = row_of(decision(selected=0, promoted_arm=1), ARMS, ACCURACY, wall_s=0)
    assert (late["selected"], late["arm"]) == ("ce", "kd")
    for verdict, name in ((KEEP, "keep"), (ADOPT, "adopt"), (ROLL_BACK, "roll back"), (FINAL, "final phase")):
        row = row_of(
            decision(verdict=verdict, promoted_arm=-1, test_changes={"tested": False}), ARMS, ACCURACY, wall_s=0
        )
        assert (row["verdict"], row["arm"], row["test"]) == (name, "kd", None)
    none = row_of(decision(selected=-1, verdict=KEEP, promoted_arm=-1, discarded=2), ARMS, ACCURACY, wall_s=0)
    assert (none["selected"], none["arm"], none["gain"], none["discarded"]) == (None, None, None, 2)


def race_fields(**changes):
    """The fields about the race, of arms a, b and c."""
    three = {"steps": jnp.array([10, 10, 10]), "scores": jnp.zeros(3), "promise_scores": jnp.array([0.5, 0.75, 0.25])}
    three |= {"behind": jnp.array([-0.25, 0.0, -0.5]), "behind_se": jnp.array([0.125, 0.0, 0.0625])}
    three |= {"racing": jnp.array([True, True, False]), "tuned": ({}, {}, {})}
    row = row_of(decision(**(three | changes)), ("a", "b", "c"), ACCURACY, wall_s=0)
    return {name: row[name] for name in ("behind", "behind_se", "racing", "left", "asked", "final")}


def test_row_names_the_arms_that_race_and_those_that_left():
    assert race_fields() == {
        "behind": {"a": -0.25, "b": 0.0, "c": -0.5},
        "behind_se": {"a": 0.125, "b": 0.0, "c": 0.0625},
        "racing": ["a", "b"],
        "left": ["c"],
        "asked": None,
        "final": False,
    }
    broken = race_fields(behind=jnp.array([-0.25, 0.0, jnp.nan]), behind_se=jnp.array([0.125, 0.0, jnp.nan]))
    assert (broken["behind"]["c"], broken["behind_se"]["c"], broken["left"]) == (None, None, ["c"])
    last = race_fields(steps=jnp.array([10, 10, 0]), racing=jnp.array([False, True, False]))
    assert (last["racing"], last["left"]) == ([], ["a"])  # the race is over: c had left before
    assert set(last["behind"]) == {"a", "b"}  # c did not train


def test_row_names_the_arm_that_was_asked():
    after = {"steps": jnp.array([0, 10, 10]), "racing": jnp.array([False, True, False])}
    asked = race_fields(asked=2, **after)
    assert (asked["asked"], asked["racing"], asked["left"]) == ("c", [], [])
    idle = race_fields(asked=2, **(after | {"steps": jnp.array([0, 0, 0])}))
    assert idle["asked"] is None  # the budget was spent before it trained
    assert race_fields(final=True)["final"]


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 5), (1, 0), (5, 5), (11, 3), (12, 3), (30, 0)])
def test_bound_is_positive_exactly_if_the_test_promotes(wins, losses):
    alpha = 0.0287  # close to the p-value of 11 wins to 3
    p_value = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0
    changes = {"wins": wins, "losses": losses, "alpha": alpha, "p_value": p_value}
    test = row_of(decision(test_changes=changes), ARMS, ACCURACY, wall_s=0)["test"]
    assert (test["bound"] > 0) == (p_value <= np.float32(alpha))
    assert test["bound"] <= test["gain"]


def test_rows_are_read_back_and_truncated(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert list(read_rows(path)) == []
    ledger = Ledger(path)
    ledger.truncate(0)
    ledger.sync()
    for i in range(5):
        ledger.append([{"iteration": i, "name": "Grün\n"}])
    ledger.sync()
    assert [row["iteration"] for row in read_rows(path)] == list(range(5))
    Ledger(path).truncate(5)
    assert len(list(read_rows(path))) == 5
    Ledger(path).truncate(3)
    assert [row["iteration"] for row in read_rows(path)] == [0, 1, 2]
    ledger.append([{"iteration": 3}])
    assert [row["iteration"] for row in read_rows(path)] == [0, 1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_torn_row_is_removed(tmp_path, cut):
    path = tmp_path / "ledger.jsonl"
    for i in range(3):
        Ledger(path).append([{"iteration": i, "name": "x"}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    Ledger(path).truncate(2)
    assert [row["iteration"] for row in read_rows(path)] == [0, 1]


@pytest.mark.parametrize("cut", [1, 40])
def test_missing_rows_are_an_error(tmp_path, cut):
    path = tmp_path / "ledger.jsonl"
    for i in range(3):
        Ledger(path).append([{"iteration": i, "name": "x"}])
    content = path.read_bytes()[:-cut]
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"row of every iteration that the checkpoint includes, 3 rows; .*start a new run"
    ):
        Ledger(path).truncate(3)
    assert path.read_bytes() == content
