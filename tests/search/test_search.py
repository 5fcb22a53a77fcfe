"""A search finds the smallest student that meets its guards, and a kill at any point changes nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import TIMES, once, rows_without_times, variables_of
from scipy import stats

from ev3_distill import students
from ev3_distill.cli.main import main
from ev3_distill.runtime.digest import tree_digest
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
    """An uninterrupted search, in a folder with its data."""

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
    outcome = report["search"]
    sizes = {one["number"]: one for one in outcome["sizes"]}
    delivered = sizes[outcome["delivered"]]
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
    assert (
        f"Delivered: no. {delivered['number']} of the sizes below, the smallest that met all guards on decide" in page
    )
    assert delivered["network"] in page


def test_it_grows_then_shrinks_then_repeats(searched):
    how = [one["how"] for one in report_of(searched / "run")["search"]["sizes"]]
    assert how[0] == "begun"
    assert any(one.startswith("wider, from ") for one in how)
    assert any(one.startswith("pass 2, taught by ") for one in how)
    assert any(one.startswith("narrower, from ") for one in how)
    before = max(i for i, one in enumerate(how) if not one.startswith("pass 2, "))
    assert how[before].startswith("longer, from ")  # the selected student gets the remaining budget


@pytest.mark.slow
def test_a_size_gets_three_attempts_and_the_best_of_them_continues(cli, here, monkeypatch):
    """Two start from a part of the larger student. Decide is not sure of the best, but the sealed split proves it."""
    parts_used, begin = [], Distillation.begin

    def recording_begin(self, *args, variables=None, **options):
        parts_used.extend([] if variables is None else [variables])
        return begin(self, *args, variables=variables, **options)

    monkeypatch.setattr(Distillation, "begin", recording_begin)
    write_data()
    assert cli("compress", *LADDER, "--guard", "accuracy >= 0.93", "--seed", "1", "--out", "run")[0] == 0
    report = report_of(here / "run")
    outcome = report["search"]
    larger = next(one for one in outcome["sizes"] if one["met"] and one["params"] == 39)
    own = [one for one in outcome["sizes"] if one["number"] > larger["number"]]
    draws, longer = own[:3], own[3]
    how = [f"{how} {larger['number']}" for how in ("narrower, from", "narrower, from", "taught by")]
    assert [one["how"] for one in draws] == how
    best = max(draws, key=lambda one: one["accuracy"])
    assert longer["how"] == f"longer, from {best['number']}" and longer["accuracy"] > best["accuracy"]
    assert len(parts_used) == sum(one["how"].startswith("narrower, from ") for one in outcome["sizes"])
    whole = units_of(students.load(here / "run" / "sizes" / f"{larger['number']:02d}")[1])
    parts = [part for part in map(units_of, parts_used) if len(part) == 4]
    assert len(parts) >= 2 and all(part < whole for part in parts) and len({*map(frozenset, parts)}) > 1
    assert report["cost"]["steps"] == 6000
    preferred, surer = (next(one for one in outcome["sizes"] if one["number"] == n) for n in outcome["candidates"])
    assert (preferred["params"], preferred["met"], surer["number"]) == (27, False, larger["number"])
    assert preferred["p_value"] > surer["p_value"]
    assert outcome["delivered"] == preferred["number"] and all(guard["certified"] for guard in report["guards"])
    page = (here / "run" / "report.html").read_text()
    assert (
        f"Delivered: no. {preferred['number']} of the sizes below, smaller than any that met all guards on decide"
        in page
    )
    assert f"opened for no. {preferred['number']} and no. {surer['number']}; the second is delivered if" in page


@pytest.mark.slow
def test_the_surer_candidate_is_delivered_if_the_preferred_one_fails(cli, here, monkeypatch):
    """The sealed split is opened for both. Each has half of the error probability, also when evaluated again."""
    monkeypatch.setattr(
        "ev3_distill.search.stage.CANDIDATE_PROBABILITY", 1e-9
    )  # prefers a student that is hardly ever proved
    write_data()
    assert cli("compress", *LADDER, "--guard", "accuracy >= 0.95", "--out", "run")[0] == 0
    report = report_of(here / "run")
    preferred, surer = report["search"]["candidates"]
    assert report["search"]["delivered"] == surer
    sizes = {one["number"]: one for one in report["search"]["sizes"]}
    assert report["student"]["params"] == sizes[surer]["params"] > sizes[preferred]["params"]
    assert variables_of(here / "run") == variables_of(here / "run" / "sizes" / f"{surer:02d}")
    certificate = report["certificate"]
    assert certificate["among"] == 2
    claim = certificate["claims"][0]
    right = round(claim["point"] * claim["n"])
    expected = stats.beta.ppf(0.05 / 2 / 2, right, claim["n"] - right + 1)  # two claims on two students
    assert claim["lower_bound"] == pytest.approx(expected)
    (opening,) = json.loads((here / "run" / "opened.json").read_text())["openings"]
    folders = (here / "run" / "sizes" / f"{number:02d}" for number in (preferred, surer))
    digests = [tree_digest(students.load(folder)[1]) for folder in folders]
    assert [opening["student"], *opening["others"]] == digests
    page = (here / "run" / "report.html").read_text()
    assert "The sealed split was opened for 2 students, any of which could have been delivered" in page

    code, out, _ = cli("evaluate", "run")
    assert code == 0
    assert f"at least {int(claim['lower_bound'] * 10_000) / 100:.2f}% with 95% confidence" in out
    assert "was opened for 2 students, any of which could have been delivered; the bounds are corrected for it." in out
    assert len(json.loads((here / "run" / "opened.json").read_text())["openings"]) == 1


@pytest.mark.slow
def test_a_size_continues_from_its_ancestor_if_that_is_better(cli, here, monkeypatch):
    """The student from growing had spent its part of the budget without being stuck; the one attempt turned out worse."""
    monkeypatch.setattr("ev3_distill.search.stage.STAGE_SHARE", 6)
    monkeypatch.setattr("ev3_distill.search.policy.ATTEMPTS", 1)
    write_data()
    assert cli("compress", *SEARCH, "--guard", "accuracy >= 0.92", "--seed", "2", "--out", "run")[0] == 0
    _, ancestor, larger, draw, again, *_ = report_of(here / "run")["search"]["sizes"]
    assert ancestor["params"] == draw["params"] == again["params"] < larger["params"]
    assert not ancestor["met"] and larger["met"] and not draw["met"] and again["met"]
    assert (draw["how"], again["how"]) == (f"narrower, from {larger['number']}", f"longer, from {ancestor['number']}")
    assert draw["accuracy"] < ancestor["accuracy"] <= again["accuracy"] and again["cost"] > draw["cost"]


def state_of(run):
    """Everything that a run leaves, except times."""
    content = {}
    for folder in sorted((run / "sizes").iterdir()):
        if (folder / "student").exists():
            content[folder.name] = variables_of(folder)
        content[f"{folder.name} rows"] = rows_without_times(folder / "ledger.jsonl")
    report = report_of(run)
    for name in TIMES:
        report["cost"].pop(name, None)
    return content, report, (run / "archive.json").read_text(), variables_of(run)


@pytest.mark.slow
def test_kills_change_nothing(searched, tmp_path):
    """Wherever they occur: before, during and after growing, shrinking and passes."""
    rng = random.Random(0)
    run = tmp_path / "run"
    kills = 0
    while not (run / "report.json").exists():
        has_started = (run / "config.toml").exists()
        argv = ["--resume", run] if has_started else [*SEARCH, "--passes", "2", "--out", run]
        command = [sys.executable, "-m", "ev3_distill", "compress", *map(str, argv)]
        process = subprocess.Popen(command, cwd=searched, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        folders = len(list((run / "sizes").glob("*"))) if has_started else 0
        while kills < KILLS and process.poll() is None:
            if len(list((run / "sizes").glob("*/ledger.jsonl"))) > folders:  # a stage has started
                time.sleep(rng.uniform(0, 0.4))
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    assert kills >= 3
    assert state_of(run) == state_of(searched / "run")


def test_export_picks_a_student_of_the_search(searched, cli, here):
    run = searched / "run"
    sizes = report_of(run)["search"]["sizes"]
    smallest = min(sizes, key=lambda one: one["params"])
    answer = cli("export", run, "--pick", f"params<={smallest['params']}", "--out", "small")
    assert answer.code == 0
    assert f"{smallest['params']:,} parameters" in answer.out
    assert "no certificate covers it" in " ".join(answer.out.split())
    assert students.load("small")[0].spec == smallest["spec"]
    assert json.loads((here / "small/evidence.json").read_text())["decide"]["params"] == smallest["params"]
    assert cli("export", run, "--out", "delivered").code == 0
    assert variables_of(run) == variables_of(here / "delivered")
    assert json.loads((here / "delivered/evidence.json").read_text())["guards"][0]["certified"]
    for argv, says in (
        (("--out", "small"), "export writes a new folder; small exists"),
        (("--out", "x", "--pick", "params<=1"), "a pick needs a student that meets it"),
    ):
        answer = cli("export", run, *argv)
        assert (answer.code, says in answer.err) == (2, True), answer.err
    assert cli("export", here, "--out", "x").code == 2
    assert sorted(path.name for path in here.iterdir()) == ["delivered", "small"]


def test_pick_needs_a_search(finished, cli, here):
    answer = cli("export", finished, "--pick", "params<=3", "--out", "x")
    assert answer.code == 2
    assert "--pick needs a run of a search" in answer.err


def test_a_guard_out_of_reach_ends_with_code_3(cli, here):
    """The largest allowed size was tried, and the best bound is reported."""
    write_data()
    options = [word if word != "accuracy >= 0.8" else "accuracy >= 0.999" for word in SEARCH]
    answer = cli("compress", *options, "--max-params", "30", "--out", "run")
    assert answer.code == 3
    assert "NOT CERTIFIED, proven: at least" in " ".join(answer.out.split())
    sizes = report_of(here / "run")["search"]["sizes"]
    assert not any(one["met"] for one in sizes)
    assert [one["params"] for one in sizes if one["how"][:6] != "longer"] == [21, 27]  # three units, four


@pytest.mark.slow
def test_listed_sizes_are_tried_in_order(cli, here):
    """Even one that growth cannot reach."""
    write_data()
    ladder = ("mlp:hidden=2", "mlp:hidden=3", "mlp:hidden=2-3")
    options = [*SEARCH[:4], *SEARCH[8:14], *SEARCH[16:]]
    answer = cli("compress", *options, "--guard", "accuracy >= 0.999", "--sizes", *ladder, "--out", "run")
    assert answer.code == 3, answer
    sizes = report_of(here / "run")["search"]["sizes"]
    assert [one["network"] for one in sizes] == list(ladder)
    assert [one["how"] for one in sizes] == ["begun", "the next size, from 1", "the next size, from 2"]


@pytest.mark.slow
def test_a_size_without_a_fitting_part_starts_from_scratch(cli, here):
    """The larger network has a smaller first layer; the report names the origin correctly."""
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
def test_bad_search_options_are_refused(cli, here, argv, says):
    answer = cli("compress", *argv, "--out", "run")
    assert answer.code == 2
    assert says in " ".join(answer.err.split())
    assert not list(here.iterdir())
