"""The HTML report: correct numbers, no network access, escaped names, valid markup."""

import copy
import importlib.resources
import json
import re

import jinja2
import pytest
from report_examples import ARMS, HOSTILE, Page, changed, make_report, make_rows, page_text, race_rows

from ev3_distill.errors import InputError
from ev3_distill.monitor import report as report_page
from ev3_distill.runtime.race import race_of


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def report(rows):
    return make_report(rows)


@pytest.fixture(scope="module")
def html(report, rows):
    return report_page.render(report, rows)


def test_page_is_well_formed_and_loads_nothing(html):
    page = Page(html)
    assert page.tags.count("svg") == 3
    assert page.tags.count("h1") == 1
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value[0] == "#"
            assert value[1:] in ids


def test_page_is_deterministic(report, rows, html):
    assert report_page.render(report, rows) == html


def test_user_strings_are_escaped(report, rows):
    def hostile(value, path=()):
        if isinstance(value, dict):
            return {key: hostile(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [hostile(item, path) for item in value]
        names = ("metric", "delivered", "verdict")
        return HOSTILE if isinstance(value, str) and not {*path} & {*names} else value

    report, rows = hostile(report), hostile(rows)
    report["versions"] = {HOSTILE: HOSTILE}
    report["certificate"]["claims"][0]["metric"] = HOSTILE
    html = report_page.render(report, rows)
    assert "script" not in Page(html).tags
    assert "<script" not in html
    # source, network (title, lead, table), arms of two tables, data, classes, budget, device, versions, command
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 20


def test_page_shows_the_numbers_of_the_report(report, rows, html):
    text = Page(html).text
    assert (
        "This student has at least 94.0 % accuracy and at least 96.4 % agreement with its teacher, "
        "with 95 % confidence." in text  # 0.94098 is rounded down
    )
    for shown in (
        "mlp width=512 depth=2 has 908,421 parameters, 12.3 times fewer than its teacher",
        "distilled in 5 min 12 s",
        "examples drawn like the test split: 10,000 examples",
        "94.4 % accuracy (n = 10,000) and 96.8 % agreement with its teacher (n = 10,000).",
        "of certificates made this way, at most 5 % promise too much",
        "onnx:resnet18-cifar10.onnx",
        "11,173,962",
        "12.3\u00d7",
        "95.3 %",
        "96.8 %",
        "proven: at least 94.0 %",
        "proven: at least 96.4 %",
        "40,000",
        "5,001",
        "11.2 s",
        f"{report['cost']['examples']:,}",
        f"60 iterations: {report['promotions']} promoted a new champion, 1 rolled back",
        f"{report['error_budget']['tests']} tests left 0.031 of 0.05",
        "with probability 95 % or more, every promotion",
        "ev3-distill 0.1.0, jax 0.10.2, numpy 2.4.6",
        "3: airplane, cat & dog, <script>",
        "Delivered: the champion",
        report["command"],
    ):
        assert shown in text
    for arm in report["arms"]:
        assert f"{arm['name']} {100 * arm['share']:.1f} % {arm['steps']:,}" in text


def test_table_of_tests_has_one_line_per_test(rows, html):
    ledger = re.search(r'<table class="ledger">.*?</table>', html, re.S)[0]
    body = re.findall(r"<tr.*?</tr>", ledger.split("</thead>")[1], re.S)
    tests = [row for row in rows if row["test"]]
    assert len(body) == len(tests) > 2
    promoted = [row["verdict"] == "promote" for row in tests]
    assert ["promoted" in line for line in body] == promoted
    assert True in promoted
    assert False in promoted
    for line, row in zip(body, tests, strict=True):
        cells = [" ".join(re.sub("<.*?>", "", cell).split()) for cell in re.findall(r"<td.*?</td>", line, re.S)]
        test = row["test"]
        shown = [f"{number:,}" for number in (row["iteration"], row["cost"], test["wins"], test["losses"], 5000)]
        assert [cells[i] for i in (0, 1, 4, 5, 6)] == shown
        assert (float(cells[8].replace("\u2212", "-")) <= float(cells[7])) == (row["verdict"] == "promote")
        gain, bound = (float(cell.replace("\u2212", "-")) for cell in cells[9:])
        assert gain == pytest.approx(100 * test["gain"], abs=0.005)
        assert 100 * test["bound"] - 0.01 <= bound <= 100 * test["bound"]


def test_chart_marks_each_kind_of_verdict(report, rows):
    def legend(rows):
        svg = re.search(r'<div class="wide">(.*?)</div>', report_page.render(report, rows), re.S)[1]
        return [re.sub("<.*?>", "", text) for text in re.findall(r"<text.*?</text>", svg, re.S)]

    labels = {"teacher, on test", "current, on assess", "champion, on decide", "adopted", "promoted", "rolled back"}
    assert labels <= set(legend(rows))
    quiet = [{**row, "verdict": "keep"} for row in rows]
    assert not {"adopted", "promoted", "rolled back"} & set(legend(quiet))


def raced_report(rows):
    diagnosis = {
        "sentences": ["Labels alone (ce) ended 9.7 points ahead.", f"Your teacher confuses '3' and '{HOSTILE}'."]
    }
    final = {"steps": 100, "rows": 540, "delivered": True, "before": "current", "before_accuracy": 0.9412}
    return make_report(rows) | {"race": race_of(rows), "diagnosis": diagnosis, "final": final}


def test_page_shows_the_race_and_what_it_says():
    rows = race_rows()
    report = changed(raced_report(rows), "student.delivered", "final")
    html = report_page.render(report, rows)
    page = Page(html)
    assert "script" not in page.tags and page.tags.count("svg") == 4
    for shown in (
        "The race Labels alone (ce) ended 9.7 points ahead. Your teacher confuses '3' and '<script>alert(1)</script>'.",
        f"Arms clearly behind on assess left the race before its end; {ARMS[0]} led after it.",
        f"{ARMS[0]} led after the race 200 76.0 %",
        f"{ARMS[1]} left 4.0 points (10.0 standard errors) behind {ARMS[0]} 200 72.0 %",
        f"{ARMS[3]} left 6.0 points (15.0 standard errors) behind {ARMS[0]} 100 66.0 %",
        f"Asked later, when nothing had moved: {ARMS[1]} once (50 steps, helped once).",
        "Delivered: the student at the end of the final phase.",
        "In the final phase the student trains on assess, so the curve there says nothing about new examples.",
        "In the final phase, the last 100 steps, the leader also trained on the 540 examples of assess and decide, and nothing "
        "was decided. So decide proves nothing about the delivered student; the current student before it had 94.1 % on it.",
    ):
        assert shown in page.text
    chart = re.search(r'<svg role="img" aria-label="The race.*?</svg>', html, re.S)[0]
    assert all(color in chart for color in report_page.PALETTE[:4]) and report_page.PALETTE[4] not in chart
    assert "left the race" in chart and "steps of each arm" in chart
    assert ">final phase<" in re.search(r'<div class="wide">(.*?)</div>', html, re.S)[1]
    assert (
        ">final phase<"
        not in re.search(r'<div class="wide">(.*?)</div>', report_page.render(report, rows[:10]), re.S)[1]
    )


def test_page_of_a_run_without_a_race():
    rows = race_rows()
    assert "The race" not in page_text(make_report(rows), rows)
    for empty in ({"race": None, "diagnosis": None, "final": None}, {}):
        text = page_text(make_report(rows) | empty, rows)
        assert "The race" not in text and "In the final phase, the last" not in text
    later = changed(raced_report(rows), "race.arms", [])  # one arm led from the start
    assert "Asked later" in page_text(later, rows) and "led after it" not in page_text(later, rows)
    restored = page_text(changed(raced_report(rows), "final.delivered", False), rows)
    assert "Its student was worse on these examples than the current student before it, which is delivered." in restored


@pytest.mark.parametrize("number", [0, 1, 2])
def test_page_renders_with_zero_to_two_iterations(report, number):
    page = Page(report_page.render(report, make_rows(number)))
    assert page.tags.count("svg") == (3 if number else 0)
    assert ("There was no iteration." in page.text) == (number == 0)
    assert ("There was no test." in page.text) == (number < 2)


def test_one_arm_has_no_spending_chart():
    rows = make_rows(5, arms=("kd", "unused"))
    rows = [{**row, "steps": {"kd": row["steps"]["kd"]}} for row in rows]
    page = Page(report_page.render(make_report(rows, arms=("kd",)), rows))
    assert page.tags.count("svg") == 2


def test_steps_that_selected_initial_parameters_are_shown(report, rows):
    assert "initial parameters" not in page_text(report, rows)  # a report of an earlier version
    assert "initial parameters" not in page_text(changed(report, "cost.drawing", 0), rows)
    assert "of which to select initial parameters 400" in page_text(changed(report, "cost.drawing", 400), rows)


def test_page_renders_without_optional_values(report, rows):
    text = page_text(changed(report, "teacher.params", None), rows)
    assert "times fewer" not in text
    assert "Compression \u2013" in text
    assert "The teacher\u2019s size is unknown" in text

    unlabelled = changed(changed(report, "teacher.accuracy", None), "student.accuracy", None)
    unlabelled["certificate"]["claims"] = unlabelled["certificate"]["claims"][1:]
    blank = [{**row, "champion_accuracy": None, "current_accuracy": None} for row in rows]
    text = page_text(unlabelled, blank)
    assert "This student has at least 96.4 % agreement with its teacher, with 95 % confidence." in text
    assert "Accuracy on test \u2013 \u2013" in text
    assert "Agreement over cost" in text
    assert "This bound holds for examples" in text

    assert "Nothing is promised" in page_text(changed(report, "certificate.claims", []))
    assert "Classes 0 " in page_text(changed(report, "data.classes", []))
    assert "Classes 25: 0, 1, " in page_text(changed(report, "data.classes", [str(i) for i in range(25)]))
    assert "19 and 5 more" in page_text(changed(report, "data.classes", [str(i) for i in range(25)]))
    assert "the student that the run began with" in page_text(changed(report, "promotions", 0))
    assert "Delivered: the current student" in page_text(changed(report, "student.delivered", "current"))


def test_missing_field_is_an_error(report):
    broken = copy.deepcopy(report)
    del broken["device"]
    with pytest.raises(jinja2.UndefinedError, match="device"):
        report_page.render(broken, [])


def test_write_html_is_atomic(tmp_path, report, rows, html, monkeypatch):
    with pytest.raises(InputError, match=r"report\.json"):
        report_page.write_html(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(InputError, match=r"ledger\.jsonl"):
        report_page.write_html(tmp_path)
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = report_page.write_html(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == html
    files = {"report.json", "ledger.jsonl", "report.html"}
    assert {file.name for file in tmp_path.iterdir()} == files

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report_page.write_html(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == files
    assert path.read_text(encoding="utf-8") == html


def test_template_is_package_data():
    source = importlib.resources.files("ev3_distill.monitor").joinpath("report.html.j2").read_text(encoding="utf-8")
    assert source.count("|safe") + source.count("| safe") == 7  # five plots and two constants
    assert {"report.html.j2", "page.css"} <= {*jinja2.PackageLoader("ev3_distill.monitor", ".").list_templates()}
