"""What the page and the terminal say of a report in words: claims, guards, numbers, each in its own unit."""

import pytest
from report_examples import ARMS, HOSTILE, Page, changed, make_report, make_rows, said
from rich.console import Console

from ev3_distill.monitor import report as report_page


@pytest.fixture
def report():
    return make_report(make_rows())


def test_summary_fits_a_terminal(report):
    def shown(report):
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        with console.file:
            console.print(report_page.summary(report))
            return console.export_text()

    text = shown(report)
    assert len(text.splitlines()) < 12
    flat = " ".join(text.split())
    assert "onnx:resnet18-cifar10.onnx mlp width=512 depth=2" in flat
    assert report_page.promise(report) in flat
    assert "12.3\u00d7" in flat
    assert "5 min 12 s" in flat
    assert "[bold]x" in shown(changed(report, "teacher.source", "[bold]x"))
    assert "\u2013" in shown(changed(report, "teacher.params", None))


def test_every_kind_of_claim_is_told_by_its_own_unit(report):
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
    text = said(mixed)
    assert (
        "This student has at least 98.7 % top-5 accuracy, at most 2.2 % less top-5 accuracy than its teacher, at most 0.0613 "
        "Brier score, at most \u22121.23 cost per example, at most 3.4 % expected calibration error, at most 0.522 ms median "
        "latency on that machine and at least 65.0 % own:score, with 95 % confidence" in text
    )
    assert "0.0412 Brier score (n = 100)" in text and "0.51 ms median latency on that machine (n = 301)" in text
    assert "Those of shares of examples are exact" in text
    assert "They are exact" in said(report)
    lines = [report_page.claim_line(claim, 0.975) for claim in claims]
    assert lines[0] == "top5_accuracy: 99.00% of 100 examples; at least 98.78% with 97.5% confidence"
    assert lines[2] == "brier: 0.04123 of 100 examples; at most 0.0613 with 97.5% confidence"
    assert lines[5] == "latency_ms: 0.51 ms of 301 passes; at most 0.522 ms with 97.5% confidence"


@pytest.mark.parametrize(
    ("guard", "shown"),
    [
        (
            {"guard": "ece <= 0.1", "metric": "ece", "bound": 0.0311, "certified": True},
            "certified, proven is at most 3.2 %",
        ),
        ({"guard": "brier <= 0.1", "metric": "brier", "bound": 0.2, "certified": False}, "proven is at most 0.200"),
        ({"guard": "own:s >= 0.1", "metric": "own:s", "bound": 0.2, "certified": True}, "proven is at least 20.0 %"),
        ({"guard": "bytes <= 9", "metric": "bytes", "point": 2440, "bound": 2440, "certified": False}, ", 2,440 bytes"),
    ],
)
def test_verdicts(guard, shown):
    assert report_page.verdict(guard).endswith(shown)


@pytest.mark.parametrize("number", [3, 40])
def test_the_table_of_classes(report, number):
    rows = [{"name": HOSTILE, "point": 0.9, "lower_bound": 0.8777, "n": 1234}]
    rows += [{"name": f"c{i}", "point": None, "lower_bound": 0.0, "n": 0} for i in range(number - 1)]
    tables = [{"of": "class", "metric": "accuracy", "confidence": 0.95, "rows": rows}]
    html = report_page.render(changed(report, "certificate", {**report["certificate"], "tables": tables}), [])
    page = Page(html)
    assert "script" not in page.tags
    assert (
        f"These bounds hold for all {number} classes at once, with 95 % confidence. That is a statement of its own"
        in page.text
    )
    assert f"{HOSTILE} 1,234 90.0 % 87.7 %" in page.text
    assert "c0 0 \u2013 0.0 %" in page.text
    assert ("<details open>" in html) == (number == 3)
    assert "Accuracy by class" not in said(report)


def test_a_reopened_split_is_told(report):
    again = changed(report, "certificate", {**report["certificate"], "reopened": 2})
    assert "The sealed split had been opened 2 times before; the bounds are corrected for it." in said(again)
    assert "had been opened" not in said(report)
    both = changed(report, "certificate", {**report["certificate"], "reopened": 1, "among": 2})
    assert (
        "The sealed split was opened for 2 students, any of which could have been delivered and had been opened once before; "
        "the bounds are corrected for it."
    ) in said(both)


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
def test_numbers(function, value, shown):
    assert getattr(report_page, function)(value) == shown


def test_what_an_arm_tuned_came_to_is_told():
    """By the last row that has it; of an arm that tunes nothing nothing is said."""
    rows = make_rows()
    rows[10]["tuned"] = {HOSTILE: {"temperature": 9.0, "mix": [0.9, 0.1]}}
    rows[20]["tuned"] = {HOSTILE: {"temperature": 2.7182, "mix": [0.6543, 0.3457]}}
    assert report_page.tuned(HOSTILE, rows) == "temperature 2.72, mix 0.654 : 0.346"
    assert report_page.tuned(ARMS[0], rows) == ""
    page = Page(report_page.render(make_report(rows), rows))
    words = " ".join(" ".join(page.words).split())
    assert words.count("came to") == 1 and "came to temperature 2.72, mix 0.654 : 0.346" in words
