"""Sentences and numbers of the page and the terminal: claims, guards and units."""

import pytest
from report_examples import ARMS, HOSTILE, Page, changed, make_report, make_rows, page_text
from rich.console import Console

from ev3_distill.monitor import certificate_sentence, claim_line, guard_line, number_format, terminal_summary
from ev3_distill.monitor import report as report_page
from ev3_distill.monitor.sentences import asked_sentence, race_outcome, tuned_values
from ev3_distill.runtime.glossary import TERMS


@pytest.fixture
def report():
    return make_report(make_rows())


def test_summary_fits_a_terminal(report):
    def shown(report):
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        with console.file:
            console.print(terminal_summary(report))
            return console.export_text()

    text = shown(report)
    assert len(text.splitlines()) < 12
    flat = " ".join(text.split())
    assert "onnx:resnet18-cifar10.onnx mlp width=512 depth=2" in flat
    assert certificate_sentence(report) in flat
    assert "12.3\u00d7" in flat
    assert "5 min 12 s" in flat
    assert "[bold]x" in shown(changed(report, "teacher.source", "[bold]x"))
    assert "\u2013" in shown(changed(report, "teacher.params", None))


def test_summary_prints_the_diagnosis(report):
    sentences = ["Labels alone (ce) ended 9.7 points ahead.", "Your teacher confuses '3' and '5'."]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(terminal_summary({**report, "diagnosis": {"sentences": sentences}}))
        assert " ".join(sentences) in console.export_text().splitlines()


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "left 5.8 points (9.1 standard errors) behind kd4"),
        ({"objective": "ece"}, "left 5.8 points (9.1 standard errors) behind kd4, in ece"),
        ({"behind": None, "behind_se": None}, "left: its student was not finite"),
        ({"best": None, "behind": None, "behind_se": None}, "left at the end of the race"),
        ({"best": "ce", "behind": 0.0, "behind_se": 0.0}, "left at the end of the race, level with the best"),
    ],
)
def test_outcome_of_a_race_is_said_in_numbers(changes, shown):
    left = {"behind": -0.058, "behind_se": 0.00637, "best": "kd4", "objective": "promise"}
    race = {"leader": "kd4"}
    assert race_outcome({"name": "ce", "left": left | changes}, race) == shown
    assert race_outcome({"name": "kd4", "left": None}, race) == "led after the race"
    assert race_outcome({"name": "ce", "left": None}, {"leader": None}) == "still in the race at the end of the run"


def test_sentence_about_asked_arms():
    asked = [
        {"name": "ce", "times": 1, "steps": 1250, "helped": 0},
        {"name": "dist", "times": 3, "steps": 60, "helped": 2},
    ]
    assert asked_sentence({"asked": asked}) == (
        "Asked later, when nothing had moved: ce once (1,250 steps, did not help); dist 3 times (60 steps, helped twice)"
    )
    assert asked_sentence({"asked": []}) == ""


def test_each_claim_is_shown_in_its_unit(report):
    claims = [
        {"metric": "top5_accuracy", "point": 0.99, "lower_bound": 0.98789, "n": 100},
        {"metric": "drop(top5_accuracy)", "point": 0.01, "upper_bound": 0.0211, "n": 100},
        {"metric": "brier", "point": 0.0412345, "upper_bound": 0.061234, "n": 100},
        {"metric": "cost", "point": -1.5, "upper_bound": -1.23456, "n": 100},
        {"metric": "ece", "point": 0.01, "upper_bound": 0.0333, "n": 100},
        {"metric": "latency_ms", "point": 0.51, "upper_bound": 0.5212, "n": 301},
        {"metric": "own:score", "point": 0.7, "lower_bound": 0.65, "n": 100},
    ]
    mixed = changed(report, "certificate.claims", claims)
    text = page_text(mixed)
    assert (
        "This student has at least 98.7 % top-5 accuracy, at most 2.2 % less top-5 accuracy than its teacher, at most 0.0613 "
        "Brier score, at most \u22121.23 cost per example, at most 3.4 % expected calibration error, at most 0.522 ms median "
        "latency on that machine and at least 65.0 % own:score, with 95 % confidence" in text
    )
    assert "0.0412 Brier score (n = 100)" in text and "0.51 ms median latency on that machine (n = 301)" in text
    assert "Bounds on fractions of examples are exact" in text
    assert "They are exact" in page_text(report)
    lines = [claim_line(claim, {"confidence": 0.975}) for claim in claims]
    assert lines[0] == "top5_accuracy: 99.00% of 100 examples; at least 98.78% with 97.5% confidence"
    assert lines[2] == "brier: 0.04123 of 100 examples; at most 0.0613 with 97.5% confidence"
    assert lines[5] == "latency_ms: 0.51 ms of 301 passes; at most 0.522 ms with 97.5% confidence"


@pytest.mark.parametrize(
    ("guard", "shown"),
    [
        (
            {"guard": "ece <= 0.1", "metric": "ece", "bound": 0.0311, "certified": True},
            "certified, proven: at most 3.2 %",
        ),
        ({"guard": "brier <= 0.1", "metric": "brier", "bound": 0.2, "certified": False}, "proven: at most 0.200"),
        ({"guard": "own:s >= 0.1", "metric": "own:s", "bound": 0.2, "certified": True}, "proven: at least 20.0 %"),
        ({"guard": "bytes <= 9", "metric": "bytes", "point": 2440, "bound": 2440, "certified": False}, ", 2,440 bytes"),
    ],
)
def test_guard_line_ends_with_its_proven_bound(guard, shown):
    assert guard_line(guard).endswith(shown)


@pytest.mark.parametrize("number", [3, 40])
def test_class_table_states_its_simultaneous_bounds(report, number):
    rows = [{"name": HOSTILE, "point": 0.9, "lower_bound": 0.8777, "n": 1234}]
    rows += [{"name": f"c{i}", "point": None, "lower_bound": 0.0, "n": 0} for i in range(number - 1)]
    tables = [{"of": "class", "metric": "accuracy", "confidence": 0.95, "rows": rows}]
    html = report_page.render(changed(report, "certificate", {**report["certificate"], "tables": tables}), [])
    page = Page(html)
    assert "script" not in page.tags
    assert (
        f"These bounds hold for all {number} classes at once, with 95 % confidence. This is a separate statement"
        in page.text
    )
    assert f"{HOSTILE} 1,234 90.0 % 87.7 %" in page.text
    assert "c0 0 \u2013 0.0 %" in page.text
    assert ("<details open>" in html) == (number == 3)
    assert "Accuracy by class" not in page_text(report)


def test_correction_for_a_reopened_split_is_stated(report):
    reopened = changed(report, "certificate", {**report["certificate"], "reopened": 2})
    assert "The sealed split had been opened 2 times before; the bounds are corrected for it." in page_text(reopened)
    assert "had been opened" not in page_text(report)
    both = changed(report, "certificate", {**report["certificate"], "reopened": 1, "among": 2})
    assert (
        "The sealed split was opened for 2 students, any of which could have been delivered and had been opened once before; "
        "the bounds are corrected for it."
    ) in page_text(both)


@pytest.mark.parametrize(
    ("function", "value", "shown"),
    [
        ("percent", 0.9415, "94.2 %"),
        ("percent", 0.0, "0.0 %"),
        ("percent", 1.0, "100.0 %"),
        ("percent", float("nan"), "\u2013"),
        ("floor_percent", 0.289, "28.9 %"),
        ("floor_percent", 0.99999, "99.9 %"),
        ("floor_percent", 1e-9, "0.0 %"),
        ("exact_percent", 0.95, "95 %"),
        ("exact_percent", 0.9, "90 %"),
        ("exact_percent", 0.999, "99.9 %"),
        ("exact_percent", 1 - 0.95, "5 %"),
        ("points", 0.01234, "+1.23"),
        ("points", -0.0005, "\u22120.05"),
        ("floor_points", 0.01239, "+1.23"),
        ("floor_points", -0.00001, "\u22120.01"),
        ("ratio", 1234.56, "1,234.6\u00d7"),
        ("duration", 7.31, "7.3 s"),
        ("duration", 59.99, "60.0 s"),
        ("duration", 119.7, "2 min 0 s"),
        ("duration", 7384, "2 h 3 min"),
        ("scientific", 0.0123, "0.012"),
        ("scientific", 2.34e-7, "2.3e\u22127"),
        ("scientific", 0.0, "0"),
        ("count", 1234567, "1,234,567"),
        ("count", None, "\u2013"),
    ],
)
def test_numbers_are_formatted_and_rounded_safely(function, value, shown):
    assert getattr(number_format, function)(value) == shown


def test_tuned_values_come_from_the_last_row_that_has_them():
    rows = make_rows()
    rows[10]["tuned"] = {HOSTILE: {"temperature": 9.0, "mix": [0.9, 0.1]}}
    rows[20]["tuned"] = {HOSTILE: {"temperature": 2.7182, "mix": [0.6543, 0.3457]}}
    assert tuned_values(HOSTILE, rows) == "temperature 2.72, mix 0.654 : 0.346"
    assert tuned_values(ARMS[0], rows) == ""
    page = Page(report_page.render(make_report(rows), rows))
    words = " ".join(" ".join(page.words).split())
    assert words.count("tuned to") == 1 and "tuned to temperature 2.72, mix 0.654 : 0.346" in words


def test_page_explains_each_term_once(report):
    text = page_text(report)
    assert all(text.count(f"{term}{meaning}") + text.count(f"{term} {meaning}") == 1 for term, meaning in TERMS.items())
    assert {"adopt", "keep", "promote", "roll back", "assess", "decide", "arm", "error budget"} <= set(TERMS)
    assert {"race", "leader", "asked", "final phase"} <= set(TERMS)
