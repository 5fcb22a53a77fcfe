"""Comparisons of results: tests of differences by hand and by SciPy, excluded fields, and errors for damaged folders."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from ev3_distill import benchmarks
from ev3_distill.benchmarks import comparison, results_folder, statistics

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>alert(1)</script>"
BASIS = {
    "suite": "toy", "size": "full", "seeds": 9, "command": "ev3-distill bench toy --seeds 9", "code": "0123456789ab",
    "machine": {"cpu": "Abacus", "cores": 2, "accelerator": None}, "versions": {"python": "3.11.7", "jax": "0.10.2"},
}  # fmt: skip
TOY = SimpleNamespace(KEY=("seed", "contender"), TIMED=("seconds",), table=lambda rows: "a table")


def results(values, **basis):
    """Results with one row per contender and value: field x, seeds from 0."""
    rows = [
        {"seed": seed, "contender": contender, "x": x}
        for contender, of in values.items()
        for seed, x in (of.items() if isinstance(of, dict) else enumerate(of))
    ]
    return results_folder.Results(TOY, BASIS | basis, rows)


def table_text(before, after):
    return comparison.table(before, after, ("one", "other"))


def test_holm_agrees_with_hand_computed_values():
    """The smallest of four is multiplied by 4, the next by 3; the third is raised to the second to stay monotone."""
    assert statistics.holm([0.04, 0.01, 0.022, 0.021]) == pytest.approx([0.063, 0.04, 0.063, 0.063])
    assert statistics.holm([0.5, 0.6]) == [1, 1]
    assert statistics.holm([]) == []


def test_welch_agrees_with_scipy():
    x, y = [3.0, 5.0, 4.0, 8.0, 5.0], [1.0, 2.0, 4.0]
    result, expected = statistics.welch(x, y), stats.ttest_ind(x, y, equal_var=False)
    assert result.center == pytest.approx(5 - 7 / 3)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert statistics.welch([2.0, 2.0], [1.0, 1.0])[:3] == (1, 1, 1)


def test_paired_difference_agrees_with_hand_computed_values():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 3.464 with 2 degrees of freedom, p = 0.0742."""
    result = comparison.difference({(0,): 10.0, (1,): 20.0, (2,): 30.0}, {(2,): 33.0, (1,): 22.0, (0,): 11.0})
    assert (result.before, result.after, result.of) == (20, 22, "3 pairs")
    half = 4.302653 / math.sqrt(3)
    assert result.interval[:3] == pytest.approx((2, 2 - half, 2 + half))
    assert result.p == pytest.approx(0.074180, abs=1e-6)


def test_unpaired_seeds_are_compared_by_welch():
    before, after = {(0,): 1.0, (1,): 2.0, (2,): 4.0}, {(7,): 9.0, (8,): 9.5}
    result = comparison.difference(before, after)
    assert result.of == "3 and 2"
    expected = stats.ttest_ind([9.0, 9.5], [1.0, 2.0, 4.0], equal_var=False)
    assert result.p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(
    ("before", "after", "p"),
    [
        ([1.0] * 6, [1.3] * 6, 2 / 2**6),  # all pairs have the same sign: 2 of 64 sets of signs
        ([0.3, 0.5, 0.9, 0.1, 0.2, 0.4], [0.4, 0.6, 1.0, 0.2, 0.3, 0.5], 2 / 2**6),  # equal up to rounding
        ([0.3, 0.4], [0.3, 0.4], 1.0),
        ([1.0], [2.0], math.nan),
    ],
)
def test_constant_differences_are_tested_by_signs(before, after, p):
    result = comparison.difference(*({(i,): x for i, x in enumerate(side)} for side in (before, after)))
    assert result.p == pytest.approx(p, nan_ok=True)


def test_unpaired_constants_are_tested_by_permutation():
    """Three of one value and three of another: 2 of the 20 assignments to groups are as far apart."""
    assert comparison.difference({(i,): 1.0 for i in range(3)}, {(i,): 2.0 for i in range(7, 10)}).p == pytest.approx(
        0.1
    )
    assert math.isnan(comparison.difference({(0,): 1.0}, {(7,): 2.0, (8,): 2.5}).p)


def noise(seed, shift=0.0, n=9):
    return np.random.default_rng(seed).normal(shift, 1, n).tolist()


def test_only_the_real_change_is_reported():
    quiet = {f"c{i}": noise(i) for i in range(10)}
    before, after = (
        {**quiet, "moved": noise(50)},
        {f"c{i}": noise(100 + i) for i in range(10)} | {"moved": noise(51, 6)},
    )
    lines = comparison.compared(results(before), results(after))
    assert [line.group for line in lines if line.changed] == [(("contender", "moved"),)]
    text = table_text(results(before), results(after))
    assert text.startswith(
        "**1 of 11 comparisons changed** beyond noise: p at most 0.05 after Holm's correction for all 11."
    )
    assert (
        text.index("## Changed") < text.index("contender moved: x") < text.index("## No change") < text.index("c0: x")
    )


def test_false_changes_are_reported_in_few_comparisons():
    """Of 200 pairs of results from pure noise, at most 5 % report a change; P(17 or more) is below 2 %."""
    named = 0
    for i in range(200):
        sides = [results({f"c{j}": noise((k, i, j), n=5) for j in range(20)}) for k in range(2)]
        named += any(line.changed for line in comparison.compared(*sides))
    assert named <= 16


def test_correction_depends_on_the_number_of_comparisons():
    moved = [0.0, 0.1, -0.1, 0.2, 0.05], [1.0, 0.3, 0.9, 0.4, 1.4]
    p = stats.ttest_rel(*moved).pvalue
    assert 0.05 / 5 < p < 0.05
    for others in (0, 4):
        quiet = {f"c{i}": noise(i, n=5) for i in range(others)}
        wobbly = {f"c{i}": noise(99 + i, n=5) for i in range(others)}
        lines = comparison.compared(results({"m": moved[0], **quiet}), results({"m": moved[1], **wobbly}))
        assert lines[0].changed == (others == 0)
        assert lines[0].adjusted == pytest.approx(min(1, (1 + others) * p))


def test_fields_without_comparison_state_the_reason():
    def row(seed, **fields):
        return {
            "seed": seed,
            "contender": "c",
            "steps": 8,
            "lr": 1,
            "of": {"a": seed % 2},
            "seconds": seed,
            "why": "x",
            **fields,
        }

    before = results_folder.Results(TOY, BASIS, [row(seed) for seed in range(3)])
    after = before._replace(rows=[row(seed, lr=2, y=1.0, of={"a": math.nan}) for seed in range(3)])
    other = {**BASIS, "machine": {"cpu": "Slide rule", "cores": 1, "accelerator": None}, "code": "ba9876543210"}
    reasons = {line.field: line.instead for line in comparison.compared(before, after._replace(header=other))}
    assert reasons == {
        "steps": "the same", "lr": "a setting", "of / a": "not finite: 3 of 6 values", "seconds": "a time on another machine"
    }  # fmt: skip
    assert {line.field: line.instead for line in comparison.compared(before, after)}["seconds"] == ""
    text = table_text(before, after._replace(header=other))
    assert "0 of 0 comparisons" in text and "**The machines differ: times are not compared.**" in text
    assert "| machine | Abacus, 2 cores | Slide rule, 1 cores | differs |" in text
    assert "| code | 0123456789ab | ba9876543210 | differs |" in text and "| jax | 0.10.2 | 0.10.2 | the same |" in text
    assert "| contender c: lr | 1 | 2 | a setting |" in text and "numbers: `why`." in text
    assert "Code and versions are the same" in table_text(before, after)


def test_rows_on_only_one_side_are_listed():
    before, after = results({"a": [1.0, 2.0, 3.0], "b": [1.0]}), results({"a": {1: 2.0, 2: 4.0, 5: 1.0}})
    text = table_text(before, after)
    assert "Only before, 2:\n\n- contender a, seed 0\n- contender b, seed 0" in text
    assert "Only after, 1:\n\n- contender a, seed 5" in text
    many = table_text(results({f"c{i}": [1.0] for i in range(30)}), before)
    assert "- contender c19, seed 0\n- and 10 groups more" in many


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir()))
def test_committed_results_equal_themselves(name):
    """Every suite compares some of its fields, and declares its fields of time as TIMED."""
    result = results_folder.read(ROOT / "benchmarks" / "results" / name, benchmarks.SUITES)
    lines = comparison.compared(result, result)
    assert lines and not any(line.changed for line in lines)
    assert all(line.difference.interval.center == 0 for line in lines)
    timed = {
        field for row in result.rows for field in row if field.endswith(("seconds", "_s")) or field.startswith("ms_")
    }
    assert timed <= set(getattr(result.suite, "TIMED", ()))
    assert comparison.table(result, result, ("a", "a")).startswith("**0 of ")


def test_repeated_fields_are_part_of_the_key():
    for suite in benchmarks.SUITES.values():
        assert set(getattr(suite, "REPEATS", ("seed",))) <= set(suite.KEY)


def write(place, result):
    place.mkdir()
    lines = [result.header, *result.rows]
    (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(benchmarks.SUITES, "toy", TOY)


def test_command_compares_and_writes_a_page(toy, tmp_path, cli):
    one = write(tmp_path / "one", results({HOSTILE: [1.0, 2.0, 3.5], "a|b": [1.0, 2.0, 1.0]}))
    other = write(tmp_path / "other", results({HOSTILE: [2.0, 2.0, 3.0], "a|b": [1.5, 2.0, 1.0]}))
    answer = cli("bench", "--compare", one, other, "--out", tmp_path / "page.html")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("**0 of 2 comparisons changed**") and f"contender {HOSTILE}: x" in answer.out
    html = (tmp_path / "page.html").read_text()
    assert "<script" not in html and html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 1
    assert "contender a|b: x" in html
    assert cli("bench", "--compare", one, other, "--out", tmp_path).code == 2


def damaged(place, how):
    path = place / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(how(lines)))
    return place


@pytest.mark.parametrize(
    ("how", "error"),
    [
        (lambda lines: [], "the first line of rows.jsonl has suite, size"),
        (lambda lines: ["{}\n"], "line 1 of .* is '{}': restore it"),
        (lambda lines: [lines[0].replace("toy", "swift")], "a suite is one of .* got 'swift'"),
        (lambda lines: lines[:1], "at least one row; .* has none: run ev3-distill bench toy --seeds 9 --out"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], "line 4 of .* is '.*': delete it"),  # torn
        (lambda lines: [lines[0], "[1]\n"], r"a row is a line of JSON with seed, contender; line 2 of .* is '\[1\]'"),
        (lambda lines: [lines[0], "\xff\x00\n"], "line 2 of"),
        (lambda lines: [*lines, lines[-1]], "lines 4 and 5 of .* have the same: delete one"),
        (lambda lines: [lines[0].replace('"full"', '"smoke"'), *lines[1:]], "within one size; got full and smoke"),
    ],
)
def test_error_for_a_damaged_folder_names_the_line(toy, tmp_path, cli, how, error):
    one, other = (write(tmp_path / name, results({"a": [1.0, 2.0, 3.0]})) for name in ("one", "other"))
    answer = cli("bench", "--compare", one, damaged(other, how))
    assert (answer.code, answer.out) == (2, "")
    line = answer.err.strip()
    assert line.startswith("ev3-distill: error: ") and "\n" not in line
    assert re.search(error, line), line


def test_wrong_folders_and_options_are_rejected(toy, tmp_path, cli, monkeypatch):
    one = write(tmp_path / "one", results({"a": [1.0, 2.0]}))
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(benchmarks.SUITES, "toil", TOY)
    toil = write(tmp_path / "toil", results({"a": [1.0, 2.0]}, suite="toil"))
    for argv, error in (
        (["--compare", one, tmp_path / "none"], "results are a folder written by bench --out"),
        (["--compare", one, tmp_path / "empty"], "has none: measure with bench SUITE --out"),
        (["--compare", one, toil], "within one suite; got toy and toil: name two folders of the same suite"),
        (["toy", "--compare", one, one], "--compare takes only --out besides"),
        (["--render", one, "--seeds", "3"], "--render nothing"),
        (["--compare", one, one, "--render", one], "--compare takes only --out besides"),
        ([], "bench needs a suite, --compare or --render"),
    ):
        answer = cli("bench", *argv)
        assert answer.code == 2 and error in answer.err and "Traceback" not in answer.err
