"""The check that two checkouts compute the same: it ignores times and finds every other difference."""

import json
import shutil

import pytest

from ev3_distill.benchmarks import unchanged_runs


@pytest.fixture
def sides(tmp_path):
    """Two folders with the same search: two ledgers that differ in times, and a student of two arrays."""
    rows = [{"iteration": i, "verdict": "keep", "scores": {"kd4": 0.5}, "wall_s": 1.0} for i in range(3)]
    for place in (tmp_path / "before" / "search", tmp_path / "before" / "search" / "sizes" / "0"):
        place.mkdir(parents=True)
        (place / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = {"exit_code": 0, "student": {".params['w']": "ab", ".params['b']": "cd"}}
    (tmp_path / "before" / "search" / unchanged_runs.OUTCOME).write_text(json.dumps(outcome))
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    for path in (tmp_path / "after").rglob("ledger.jsonl"):
        path.write_text(path.read_text().replace('"wall_s": 1.0', '"wall_s": 2.5'))
    return tmp_path / "before", tmp_path / "after"


def compare(sides):
    return unchanged_runs.main([*map(str, sides), "--compare-only"])


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_runs_that_differ_in_times_are_the_same(sides, capsys):
    assert compare(sides) == 0
    assert capsys.readouterr().out == "the runs are the same\n"


@pytest.mark.parametrize(
    ("path", "old", "new", "difference"),
    [
        ("sizes/0/ledger.jsonl", '"iteration": 1', '"iteration": 7', "sizes/0/ledger.jsonl, row 2, iteration: 1 before, 7"),
        ("ledger.jsonl", '{"kd4": 0.5}', '{"kd4": 0.5000001}', 'row 1, scores: {"kd4": 0.5} before, {"kd4": 0.5000001} after'),
        ("ledger.jsonl", '"iteration": 0, ', '"iteration": 0, "met": true, ', "row 1, met: nothing before, true after"),
        ("outcome.json", '"cd"', '"ce"', "search: student, .params['b']: \"cd\" before, \"ce\" after"),
        ("outcome.json", '"exit_code": 0', '"exit_code": 3', "search: exit code: 0 before, 3 after"),
    ],
)  # fmt: skip
def test_one_changed_entry_is_found_and_exits_with_1(sides, capsys, path, old, new, difference):
    replace(sides[1] / "search" / path, old, new)
    assert compare(sides) == 1
    assert difference in capsys.readouterr().out


def test_missing_rows_ledgers_and_runs_are_differences(sides, capsys):
    ledger = sides[1] / "search" / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:2]))
    assert compare(sides) == 1 and "has 3 rows before and 2 after" in capsys.readouterr().out
    ledger.unlink()
    assert compare(sides) == 1 and "ledger.jsonl is only in" in capsys.readouterr().out
    shutil.copytree(sides[0] / "search", sides[0] / "default")
    assert compare(sides) == 1 and "default: only in" in capsys.readouterr().out


def test_folder_without_runs_and_checkout_without_package_are_refused(sides, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert compare((sides[0], tmp_path / "empty")) == 2
    assert "make the runs again" in capsys.readouterr().err
    assert unchanged_runs.main([str(tmp_path / "empty"), str(tmp_path / "empty"), "--only", "default"]) == 2
    assert "name its top folder" in capsys.readouterr().err
