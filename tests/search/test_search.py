"""A search for a size: it finds the smallest that meets its guards, and a kill anywhere changes nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import once, rows_without_times, variables_of
from scipy import stats

from ev3_distill import students
from ev3_distill.cli.main import main
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.search.stage import falls_behind, level_of
from ev3_distill.training.trainer import Distillation

SEARCH = (
    *("--data", "npz:data.npz", "--teacher", "logits:logits.npz", "--start", "mlp:hidden=3", "--moves", "wider"),
    *("--arms", "ce", "--budget", "6000", "--guard", "accuracy >= 0.8", "--max-params", "400", "--checkpoint-s", "0"),
    *("--length", "20"),
)
LADDER = (*SEARCH[:4], *SEARCH[8:14], *SEARCH[16:], "--sizes", "mlp:hidden=4", "mlp:hidden=6")
KILLS = 5


def write_data(seed=0, n=3000):
    """Points [N, 2] in six sectors of three classes, which two units cannot tell apart."""
    inputs = np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)
    labels = (np.arctan2(*inputs.T) // (np.pi / 3)).astype(int) % 3
    np.savez("data.npz", inputs=inputs, labels=labels)
    np.savez("logits.npz", logits=(4 * np.eye(3)[labels]).astype(np.float32))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search that nobody disturbed, in a folder with its data."""

    def make(place):
        before = os.getcwd()
        os.chdir(place)
        try:
            write_data()
            main(["compress", *SEARCH, "--passes", "2", "--out", "run"])
        finally:
            os.chdir(before)

    return once(tmp_path_factory, "searched", make)


def units_of(variables):
    """The units of an MLP's first layer, by their biases."""
    return {*np.asarray(variables.params["layers"][0]["bias"]).tolist()}


def report_of(run):
    return json.loads((run / "report.json").read_text())


def test_the_smallest_that_meets_the_guard_is_delivered(searched):
    run = searched / "run"
    report = report_of(run)
    found = report["search"]
    sizes = {one["number"]: one for one in found["sizes"]}
    delivered = sizes[found["delivered"]]
    assert delivered["met"]
    assert not any(one["met"] and one["params"] < delivered["params"] for one in sizes.values())
    assert any(one["params"] < delivered["params"] for one in sizes.values())  # and smaller ones were tried
    assert report["guards"][0]["certified"]
    assert (report["student"]["network"], report["student"]["params"]) == (delivered["network"], delivered["params"])
    assert report["cost"]["steps"] <= 6000
    assert variables_of(run) == variables_of(run / "sizes" / f"{delivered['number']:02d}")
    assert {one["number"] for one in sizes.values()} == {
        row["size"] for row in rows_without_times(run / "ledger.jsonl")
    }
    page = (run / "report.html").read_text()
    assert "<h2>Sizes</h2>" in page
    assert f"Delivered: no. {delivered['number']} of the sizes below, the smallest of which decide proved" in page
    assert delivered["network"] in page


def test_it_went_up_by_growth_down_by_parts_and_again(searched):
    how = [one["how"] for one in report_of(searched / "run")["search"]["sizes"]]
    assert how[0] == "begun"
    assert any(one.startswith("wider, from ") for one in how)
    assert any(one.startswith("pass 2, taught by ") for one in how)
    assert any(one.startswith("narrower, from ") for one in how)
    before = max(i for i, one in enumerate(how) if not one.startswith("pass 2, "))
    assert how[before].startswith("longer, from ")  # what was found goes on with what is left


def test_a_size_has_several_draws_and_the_best_of_them_goes_on(cli, here, monkeypatch):
    """Two begin with a part of the larger student; decide is then not sure of the best, but the sealed split proves it."""
    given, begin = [], Distillation.begin

    def begun(self, *args, variables=None, **options):
        given.extend([] if variables is None else [variables])
        return begin(self, *args, variables=variables, **options)

    monkeypatch.setattr(Distillation, "begin", begun)
    write_data()
    assert cli("compress", *LADDER, "--guard", "accuracy >= 0.93", "--out", "run")[0] == 0
    report = report_of(here / "run")
    found = report["search"]
    larger = next(one for one in found["sizes"] if one["met"] and one["params"] == 39)
    own = [one for one in found["sizes"] if one["number"] > larger["number"]]
    draws, longer = own[:3], own[3]
    how = [f"{how} {larger['number']}" for how in ("narrower, from", "narrower, from", "taught by")]
    assert [one["how"] for one in draws] == how
    best = max(draws, key=lambda one: one["accuracy"])
    assert longer["how"] == f"longer, from {best['number']}" and longer["accuracy"] > best["accuracy"]
    assert len(given) == sum(one["how"].startswith("narrower, from ") for one in found["sizes"])
    whole = units_of(students.load(here / "run" / "sizes" / f"{larger['number']:02d}")[1])
    parts = [part for part in map(units_of, given) if len(part) == 4]
    assert len(parts) >= 2 and all(part < whole for part in parts) and len({*map(frozenset, parts)}) > 1
    assert report["cost"]["steps"] == 6000
    wanted, surer = (next(one for one in found["sizes"] if one["number"] == n) for n in found["candidates"])
    assert (wanted["params"], wanted["met"], surer["number"]) == (27, False, larger["number"])
    assert wanted["p_value"] > surer["p_value"]
    assert found["delivered"] == wanted["number"] and all(guard["certified"] for guard in report["guards"])
    page = (here / "run" / "report.html").read_text()
    assert f"Delivered: no. {wanted['number']} of the sizes below, smaller than any of which decide proved" in page
    assert f"opened for no. {wanted['number']} and no. {surer['number']}, to take the second if" in page


def test_the_surer_candidate_is_delivered_where_the_wanted_one_fails(cli, here, monkeypatch):
    """The sealed split is opened for both; each has half of the risk of error, and has it when it is asked again."""
    monkeypatch.setattr("ev3_distill.search.policy.EVEN", 1e-9)  # wants what is hardly to be had
    write_data()
    assert cli("compress", *LADDER, "--guard", "accuracy >= 0.95", "--out", "run")[0] == 0
    report = report_of(here / "run")
    wanted, surer = report["search"]["candidates"]
    assert report["search"]["delivered"] == surer
    sizes = {one["number"]: one for one in report["search"]["sizes"]}
    assert report["student"]["params"] == sizes[surer]["params"] > sizes[wanted]["params"]
    assert variables_of(here / "run") == variables_of(here / "run" / "sizes" / f"{surer:02d}")
    told = report["certificate"]
    assert told["among"] == 2
    claim = told["claims"][0]
    right = round(claim["point"] * claim["n"])
    expected = stats.beta.ppf(0.05 / 2 / 2, right, claim["n"] - right + 1)  # two claims on two students
    assert claim["lower_bound"] == pytest.approx(expected)
    (opening,) = json.loads((here / "run" / "opened.json").read_text())["openings"]
    folders = (here / "run" / "sizes" / f"{number:02d}" for number in (wanted, surer))
    digests = [tree_digest(students.load(folder)[1]) for folder in folders]
    assert [opening["student"], *opening["others"]] == digests
    page = (here / "run" / "report.html").read_text()
    assert "The sealed split was opened for 2 students, any of which could have been delivered" in page

    code, out, _ = cli("evaluate", "run")
    assert code == 0
    assert f"at least {int(claim['lower_bound'] * 10_000) / 100:.2f}% with 95% confidence" in out
    assert "was opened for 2 students, any of which could have been delivered; the bounds are corrected for it." in out
    assert len(json.loads((here / "run" / "opened.json").read_text())["openings"]) == 1


def test_a_size_goes_on_from_its_ancestor_where_that_is_better(cli, here, monkeypatch):
    """The student of the way up had spent its share and was not stuck; the one draw of its size came out worse."""
    monkeypatch.setattr("ev3_distill.search.policy.SHARE", 6)
    monkeypatch.setattr("ev3_distill.search.policy.DRAWS", 1)
    write_data()
    assert cli("compress", *SEARCH, "--start", "mlp:hidden=5", "--guard", "accuracy >= 0.97", "--out", "run")[0] == 0
    ancestor, larger, draw, again, *_ = report_of(here / "run")["search"]["sizes"]
    assert ancestor["params"] == draw["params"] == again["params"] < larger["params"]
    assert not ancestor["met"] and larger["met"] and not draw["met"] and again["met"]
    assert (draw["how"], again["how"]) == (f"narrower, from {larger['number']}", f"longer, from {ancestor['number']}")
    assert draw["accuracy"] < ancestor["accuracy"] <= again["accuracy"] and again["cost"] > draw["cost"]


def state_of(run):
    """All that a run leaves but times."""
    kept = {}
    for folder in sorted((run / "sizes").iterdir()):
        if (folder / "student").exists():
            kept[folder.name] = variables_of(folder)
        kept[f"{folder.name} rows"] = rows_without_times(folder / "ledger.jsonl")
    report = report_of(run)
    for name in ("wall_s", "compile_s"):
        report["cost"].pop(name)
    return kept, report, (run / "archive.json").read_text(), variables_of(run)


def test_kills_change_nothing(searched, tmp_path):
    """Before, during and after growth, descent and passes: wherever they fall."""
    rng = random.Random(0)
    run = tmp_path / "run"
    kills = 0
    while not (run / "report.json").exists():
        begun = (run / "config.toml").exists()
        argv = ["--resume", run] if begun else [*SEARCH, "--passes", "2", "--out", run]
        command = [sys.executable, "-m", "ev3_distill", "compress", *map(str, argv)]
        process = subprocess.Popen(command, cwd=searched, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        folders = len(list((run / "sizes").glob("*"))) if begun else 0
        while kills < KILLS and process.poll() is None:
            if len(list((run / "sizes").glob("*/ledger.jsonl"))) > folders:  # a rung has begun
                time.sleep(rng.uniform(0, 0.4))
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        _, told = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), told
    assert kills >= 3
    assert state_of(run) == state_of(searched / "run")


def test_export_picks_among_its_students(searched, cli, here):
    run = searched / "run"
    sizes = report_of(run)["search"]["sizes"]
    smallest = min(sizes, key=lambda one: one["params"])
    answer = cli("export", run, "--pick", f"params<={smallest['params']}", "--out", "small")
    assert answer.code == 0
    assert f"{smallest['params']:,} parameters" in answer.out
    assert "no certificate is about it" in " ".join(answer.out.split())
    assert students.load("small")[0].spec == smallest["spec"]
    assert json.loads((here / "small/evidence.json").read_text())["decide"]["params"] == smallest["params"]
    assert cli("export", run, "--out", "delivered").code == 0
    assert variables_of(run) == variables_of(here / "delivered")
    assert json.loads((here / "delivered/evidence.json").read_text())["guards"][0]["certified"]
    for argv, says in (
        (("--out", "small"), "export writes a new folder; small is there"),
        (("--out", "x", "--pick", "params<=1"), "a pick needs a student that meets it"),
    ):
        answer = cli("export", run, *argv)
        assert (answer.code, says in answer.err) == (2, True), answer.err
    assert cli("export", here, "--out", "x").code == 2
    assert sorted(path.name for path in here.iterdir()) == ["delivered", "small"]


def test_a_pick_needs_a_search(finished, cli, here):
    answer = cli("export", finished, "--pick", "params<=3", "--out", "x")
    assert answer.code == 2
    assert "a pick is among the students of a search" in answer.err


def test_a_guard_out_of_reach(cli, here):
    """Exit code 3, with the best bound reached; the largest size allowed was tried."""
    write_data()
    options = [word if word != "accuracy >= 0.8" else "accuracy >= 0.999" for word in SEARCH]
    answer = cli("compress", *options, "--max-params", "30", "--out", "run")
    assert answer.code == 3
    assert "NOT CERTIFIED, proven is at least" in " ".join(answer.out.split())
    sizes = report_of(here / "run")["search"]["sizes"]
    assert not any(one["met"] for one in sizes)
    assert [one["params"] for one in sizes if one["how"][:6] != "longer"] == [21, 27]  # three units, four


def test_a_ladder(cli, here):
    """Sizes of one's own, one of them of another shape, that no growth reaches."""
    write_data()
    ladder = ("mlp:hidden=2", "mlp:hidden=3", "mlp:hidden=2-3")
    options = [*SEARCH[:4], *SEARCH[8:14], *SEARCH[16:]]
    answer = cli("compress", *options, "--guard", "accuracy >= 0.999", "--sizes", *ladder, "--out", "run")
    assert answer.code == 3, answer
    sizes = report_of(here / "run")["search"]["sizes"]
    assert [one["network"] for one in sizes] == list(ladder)
    assert [one["how"] for one in sizes] == ["begun", "the next size, from 1", "the next size, from 2"]


def test_a_size_that_nothing_narrows_to_starts_afresh(cli, here):
    """On the way back from a network whose first layer is smaller; the report does not say otherwise."""
    write_data()
    ladder = ("mlp:hidden=4", "mlp:hidden=3-16")
    options = [*SEARCH[:4], *SEARCH[8:14], *SEARCH[16:]]
    assert cli("compress", *options, "--guard", "accuracy >= 0.95", "--sizes", *ladder, "--out", "run")[0] == 0
    first, second, third, *_ = report_of(here / "run")["search"]["sizes"]
    assert (first["met"], second["how"], second["met"]) == (False, "the next size, from 1", True)
    assert (third["params"], third["how"]) == (first["params"], "taught by 2")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--start", "tiny", "--sizes", "mlp:hidden=2"), "a search takes --start or --sizes; got both: omit one"),
        (("--max-params", "10"), "max_params and passes are options of a search; got (10, 1): give --start tiny"),
        (
            ("--start", "tiny", "--deliver", "champion"),
            "a search delivers the smallest student that meets the guards; got --deliver",
        ),
        (("--start", "tiny", "--control"), "a search has no control"),
        (("--start", "tiny", "--teacher-in-step"), "a search uses cached teacher outputs"),
        (("--start", "tiny", "--budget", "90s"), "a search needs a budget in steps or epochs; got '90s'"),
        (("--sizes", "mlp:hidden=4", "mlp:hidden=2"), "the sizes of a search must come smallest first"),
        (("--arms", "ce", "kd4-peer"), "only a search has peers to learn from; got the arm 'kd4-peer': omit it"),
        (("--start", "tiny", "--passes", "0"), "passes must be at least 1"),
    ],
)
def test_bad_searches(cli, here, argv, says):
    answer = cli("compress", *argv, "--out", "run")
    assert answer.code == 2
    assert says in " ".join(answer.err.split())
    assert not list(here.iterdir())


def told(*risks, every=250):
    """Ledger rows of a size that began at global step 1000 and cost 1200, with what it lay above its goals."""
    return [
        {"position": 1000 + every * i, "cost": 1200 + every * i, "risks": {"accuracy": risk, "worst": 9.0}}
        for i, risk in enumerate(risks, 1)
    ]


@pytest.mark.parametrize(
    ("risks", "steps", "until", "behind"),
    [
        ((-12.0, -8.0), 500, 1200 + 500 * 4, False),  # 4 more with each of two doublings: level
        ((-12.0, -8.0), 500, 1200 + 500 * 2, True),  # with one: 4 below
        ((-12.0, -8.0), 500, 1200 + 1420, False),  # with one and a half: 2 below, which may be chance
        ((-3.0, -3.5), 500, 10**6, True),  # it does not rise
        ((-1.0, -1.5), 500, 10**6, False),  # but is near
        ((-12.0,), 500, 1300, False),  # too early to tell
        ((-12.0, -8.0, -1.0, 3.0), 500, 1200 + 500 * 2, True),  # what came later does not count
        ((-12.0, -8.0, -7.0, -6.0), 1000, 1200 + 1000 * 3, True),
        ((None, -8.0), 500, 1300, False),
    ],
)
def test_a_size_that_will_miss_its_guards_is_left(risks, steps, until, behind):
    assert falls_behind(told(*risks), 1000, steps, until=until) is behind


def test_decide_promises_what_the_sealed_split_will_prove():
    """Over many pairs of splits: of students that stand just where decide proves the guard, as many are certified as asked."""
    rng, n, more, least = np.random.default_rng(0), 400, 900, 0.8
    level = level_of(0.025, n / more, 0.9)
    margin = stats.norm.isf(level) * (least * (1 - least) / n) ** 0.5
    true = least + margin + rng.normal(size=20000) * (least * (1 - least) / n) ** 0.5  # as decide leaves it open
    right = rng.binomial(more, true)
    proven = right / more - stats.norm.isf(0.025) * (least * (1 - least) / more) ** 0.5 >= least
    assert proven.mean() == pytest.approx(0.9, abs=0.02)


def test_a_size_that_had_no_step_is_not_left():
    assert not falls_behind(told(-12.0, every=0), 1000, 0, until=10**6)


def test_without_goals_no_size_is_left():
    rows = [{**row, "risks": {}} for row in told(-9.0, -9.0)]
    assert not falls_behind(rows, 1000, 500, until=1300)
