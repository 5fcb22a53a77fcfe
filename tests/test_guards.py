"""Guards: read as they are written, certified by the bound and never by the point, and what the command line makes of them."""

import json

import pytest
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st

from ev3_distill.certificate import Claim
from ev3_distill.errors import InputError
from ev3_distill.guards import METRICS, Guard, judge, parse


@pytest.mark.parametrize(
    ("text", "guard"),
    [
        ("accuracy >= 0.88", Guard("accuracy", 0.88)),
        ("  worst_class_accuracy>=.7 ", Guard("worst_class_accuracy", 0.7)),
        ("drop(accuracy) <= -1e-2", Guard("drop(accuracy)", -0.01)),
        ("params <= 50000", Guard("params", 50000)),
    ],
)
def test_parse(text, guard):
    assert parse(text) == guard


@given(st.sampled_from(sorted(METRICS)), st.floats(0.01, 1))
def test_what_is_written_is_read_again(metric, threshold):
    guard = Guard(metric, float(f"{threshold * (1000 if metric == 'params' else 1):.10g}"))
    assert parse(str(guard)) == guard


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("accuracy", "METRIC >= NUMBER"),
        ("accuracy > 0.9", "METRIC >= NUMBER"),
        ("f1 >= 0.9", "about accuracy, agreement, worst_class_accuracy, drop(accuracy), params; got 'f1'"),
        ("accuracy <= 0.9", "write 'accuracy >= 0.9'"),
        ("params >= 10", "write 'params <= 10'"),
        ("accuracy >= 88", "at least 0 and at most 1; got '88'"),
        ("accuracy >= high", "got 'high'"),
        ("accuracy >= nan", "got 'nan'"),
        ("params <= inf", "at least 1; got 'inf'"),
    ],
)
def test_bad_guards(text, told):
    with pytest.raises(InputError) as error:
        parse(text)
    assert told in str(error.value)


def test_the_bound_decides_and_not_the_point():
    claims = [Claim("accuracy", 0.95, 0.93, 100), Claim("drop(accuracy)", 0.01, None, 100, upper_bound=0.03)]
    texts = ["accuracy >= 0.93", "accuracy >= 0.94", "drop(accuracy) <= 0.03", "drop(accuracy) <= 0.02", "params <= 10"]
    outcomes = judge([parse(text) for text in texts], claims, params=11)
    assert [outcome["guard"] for outcome in outcomes] == texts
    assert [outcome["certified"] for outcome in outcomes] == [True, False, True, False, False]
    assert [outcome["bound"] for outcome in outcomes] == [0.93, 0.93, 0.03, 0.03, 11]
    json.dumps(outcomes)
    assert judge([parse("params <= 11")], [], params=11)[0]["certified"]


def test_compress_and_evaluate_exit_by_their_guards(here, cli):
    guards = ("accuracy >= 0.5", "worst_class_accuracy >= 0.999", "drop(accuracy) <= 0.3", "params <= 700")
    options = [word for guard in guards for word in ("--guard", guard)]
    answer = cli("compress", *SMALL, *options, "--out", "run")
    assert answer.code == 3
    assert "Guard accuracy >= 0.5: certified, proven is at least" in answer.out
    assert "Guard worst_class_accuracy >= 0.999: NOT CERTIFIED, proven is at least" in answer.out
    assert "Guard params <= 700: certified, 610 parameters" in answer.out
    told = json.loads((here / "run" / "report.json").read_text())
    assert [guard["certified"] for guard in told["guards"]] == [True, False, True, True]
    assert [claim["metric"] for claim in told["certificate"]["claims"]] == [
        "accuracy", "agreement", "worst_class_accuracy", "drop(accuracy)",
    ]  # fmt: skip
    page = (here / "run" / "report.html").read_text()
    assert "NOT CERTIFIED" in page and "accuracy on its worst class" in page
    assert cli("compress", "--resume", "run").code == 3  # finished; it says so again
    assert cli("evaluate", "run", "--guard", "accuracy >= 0.5").code == 0
    assert cli("evaluate", "run", "--guard", "accuracy >= 0.5", "--guard", "worst_class_accuracy >= 0.999").code == 3


@pytest.mark.parametrize(
    ("guard", "told"),
    [("params <= 100", "610 parameters: name a smaller --student"), ("accuracy >= 2", "at most 1; got '2'")],
)
def test_a_guard_out_of_reach_is_refused_before_anything_is_written(here, cli, guard, told):
    answer = cli("compress", *SMALL, "--guard", guard, "--out", "run")
    assert answer.code == 2
    assert told in answer.err
    assert not (here / "run").exists()
