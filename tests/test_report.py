"""The page says what the report says, to anyone: on paper, offline, whatever the names are."""

import copy
import importlib.resources
import json
import math
import random
import re
from html.parser import HTMLParser

import jinja2
import pytest
from rich.console import Console
from scipy.stats import beta, binom

from ev3_distill import report as report_page
from ev3_distill.errors import InputError

HOSTILE = "<script>alert(1)</script>"
ARMS = ("kd t=4 adamw", "dkd sgd", HOSTILE, "logit mse")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def make_rows(iterations=60, arms=ARMS):
    """A plausible ledger: a race, then a leader with challengers now and then, rare tests, one roll-back."""
    draw = random.Random(0)
    rows, cost, champion, tested_cost, tests = [], 0, 0.1, 0, 0
    for i in range(1, iterations + 1):
        racing = max(1, math.ceil(len(arms) / 2 ** (i - 1)))
        names = list(arms[:racing]) + ([draw.choice(arms[1:])] if racing == 1 and draw.random() < 0.2 else [])
        length = 50 * 1.03**i
        steps = {name: int(length) * (name in names) for name in arms}
        cost += sum(steps.values())
        current = 0.9421 - 0.5 * math.exp(-cost / 1500) + draw.gauss(0, 0.002)
        moved, test = draw.random() < 0.6, None
        verdict = "adopt" if moved else "keep"
        if cost > 1.5 * tested_cost and i > 1:
            tested_cost, alpha, gain = cost, 0.03 / (tests + 1) ** 2, current - champion
            losses = 740 - i
            wins = losses + max(0, round(5000 * gain))
            p_value = float(binom.sf(wins - 1, wins + losses, 0.5))
            bound = (2 * float(beta.ppf(alpha, wins, losses + 1)) - 1) * (wins + losses) / 5000
            test = {"objective": "promise", "kept": False,
                    "wins": wins, "losses": losses, "n": 5000, "alpha": alpha, "p_value": p_value,
                    "gain": (wins - losses) / 5000, "bound": bound}  # fmt: skip
            promoted = p_value <= alpha
            tests += 1
            verdict, champion = ("promote", current) if promoted else (verdict, champion)
        if i == 41:
            verdict, current = "roll back", champion
        rows.append({
            "iteration": i, "cost": cost, "position": 50 * i, "steps": steps,
            "scores": {name: -0.31 if name in names else None for name in (*arms, "average")},
            "selected": names[0], "discarded": 0, "gain": 0.01, "gain_se": 0.004, "verdict": verdict,
            "arm": names[0], "test": test, "champion_accuracy": champion, "current_accuracy": current,
            "length": length, "wall_s": 1.5 * i,
        })  # fmt: skip
    return rows


def make_report(rows, arms=ARMS):
    steps = {name: sum(row["steps"][name] for row in rows) for name in arms}
    total = max(1, sum(steps.values()))
    tests = [row for row in rows if row["test"]]
    return {
        "teacher": {"source": "onnx:resnet18-cifar10.onnx", "params": 11173962, "accuracy": 0.95304},
        "student": {"network": "mlp width=512 depth=2", "params": 908421, "accuracy": 0.94449, "agreement": 0.96751,
                    "delivered": "champion"},
        "certificate": {"confidence": 0.95, "claims": [
            {"metric": "accuracy", "point": 0.94449, "lower_bound": 0.94098, "n": 10000},
            {"metric": "agreement", "point": 0.96751, "lower_bound": 0.964, "n": 10000}]},
        "cost": {"wall_s": 312.4, "compile_s": 11.23, "steps": total, "examples": 128 * total},
        "iterations": len(rows),
        "promotions": sum(row["verdict"] == "promote" for row in rows),
        "rollbacks": sum(row["verdict"] == "roll back" for row in rows),
        "objectives": {"promise": len(rows)},
        "met": False,
        "control": None,
        "arms": [{"name": name, "share": steps[name] / total, "steps": steps[name], "wins": 30 // (i + 1),
                  "promotions": 5 - i} for i, name in enumerate(arms)],
        "seed": 17,
        "splits": {"explore": 40000, "assess": 5000, "decide": 5001, "test": 10000},
        "data": {"source": "npz:/data/cifar10.npz", "fingerprint": "sha256:9f2c4e1b7ad0",
                 "classes": ["airplane", "cat & dog", HOSTILE]},
        "budget": "20000 steps",
        "error_budget": {"delta": 0.05, "left": 0.0312, "tests": len(tests)},
        "versions": {"jax": "0.10.2", "ev3-distill": "0.1.0", "numpy": "2.4.6"},
        "device": "1 x NVIDIA H200",
        "command": "ev3-distill compress --data /data/cifar10.npz --teacher resnet18.onnx --seed 17",
    }  # fmt: skip


class Page(HTMLParser):
    """Collects tags, attributes and visible text; fails where a tag is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th", "p", "li", "h1", "h2", "title"):
            self.words.append(" ")

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())  # also makes plain spaces of unbroken ones


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def report(rows):
    return make_report(rows)


@pytest.fixture(scope="module")
def html(report, rows):
    return report_page.render(report, rows)


def said(report, rows=()):
    return Page(report_page.render(report, list(rows))).text


def changed(report, path, value):
    other = copy.deepcopy(report)
    *parents, last = path.split(".")
    at = other
    for name in parents:
        at = at[name]
    at[last] = value
    return other


def test_page_is_well_formed_and_needs_no_network(html):
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


def test_promise_and_numbers_agree_with_the_report(report, rows, html):
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
        f"{report['error_budget']['tests']} tests were made, which leave 0.031 of 0.05",
        "with probability 95 % or more, every promotion",
        "ev3-distill 0.1.0, jax 0.10.2, numpy 2.4.6",
        "3: airplane, cat & dog, <script>",
        "Delivered: the champion",
        report["command"],
    ):
        assert shown in text
    for arm in report["arms"]:
        assert f"{arm['name']} {100 * arm['share']:.1f} % {arm['steps']:,}" in text


def test_ledger_shows_the_tests_and_only_them(rows, html):
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


def test_plots_mark_the_verdicts(report, rows):
    def legend(rows):
        svg = re.search(r'<div class="wide">(.*?)</div>', report_page.render(report, rows), re.S)[1]
        return [re.sub("<.*?>", "", text) for text in re.findall(r"<text.*?</text>", svg, re.S)]

    everything = {"teacher, on test", "current, on assess", "champion, on decide", "adopted", "promoted", "rolled back"}
    assert everything <= set(legend(rows))
    quiet = [{**row, "verdict": "keep"} for row in rows]
    assert not {"adopted", "promoted", "rolled back"} & set(legend(quiet))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_few_rows(report, number):
    page = Page(report_page.render(report, make_rows(number)))
    assert page.tags.count("svg") == (3 if number else 0)
    assert ("No iteration was made." in page.text) == (number == 0)
    assert ("No test was made." in page.text) == (number < 2)


def test_one_arm_needs_no_plot_of_shares():
    rows = make_rows(5, arms=("kd", "unused"))
    rows = [{**row, "steps": {"kd": row["steps"]["kd"]}} for row in rows]
    page = Page(report_page.render(make_report(rows, arms=("kd",)), rows))
    assert page.tags.count("svg") == 2


def test_steps_that_chose_the_initial_parameters_are_told(report, rows):
    assert "initial parameters" not in said(report, rows)  # a report from before there were any
    assert "initial parameters" not in said(changed(report, "cost.drawing", 0), rows)
    assert "of which to choose initial parameters 400" in said(changed(report, "cost.drawing", 400), rows)


def test_optional_values_may_be_missing(report, rows):
    text = said(changed(report, "teacher.params", None), rows)
    assert "times fewer" not in text
    assert "Compression \u2013" in text
    assert "The teacher\u2019s size is not known" in text

    unlabelled = changed(changed(report, "teacher.accuracy", None), "student.accuracy", None)
    unlabelled["certificate"]["claims"] = unlabelled["certificate"]["claims"][1:]
    blank = [{**row, "champion_accuracy": None, "current_accuracy": None} for row in rows]
    text = said(unlabelled, blank)
    assert "This student has at least 96.4 % agreement with its teacher, with 95 % confidence." in text
    assert "Accuracy on test \u2013 \u2013" in text
    assert "Agreement over cost" in text
    assert "This bound holds for examples" in text

    assert "Nothing is promised" in said(changed(report, "certificate.claims", []))
    assert "Classes 0 " in said(changed(report, "data.classes", []))
    assert "Classes 25: 0, 1, " in said(changed(report, "data.classes", [str(i) for i in range(25)]))
    assert "19 and 5 more" in said(changed(report, "data.classes", [str(i) for i in range(25)]))
    assert "the student that the run began with" in said(changed(report, "promotions", 0))
    assert "Delivered: the current student" in said(changed(report, "student.delivered", "current"))


def test_a_missing_field_is_an_error_not_a_blank(report):
    broken = copy.deepcopy(report)
    del broken["device"]
    with pytest.raises(jinja2.UndefinedError, match="device"):
        report_page.render(broken, [])


def test_write_html_leaves_only_the_page(tmp_path, report, rows, html, monkeypatch):
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
    source = importlib.resources.files("ev3_distill").joinpath("report.html.j2").read_text(encoding="utf-8")
    assert source.count("|safe") + source.count("| safe") == 6  # four plots and two constants
    assert {"report.html.j2", "page.css"} <= {*jinja2.PackageLoader("ev3_distill", ".").list_templates()}


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
