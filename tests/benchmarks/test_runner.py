"""Running a suite: bad input, resumption, refusal of rows of another provenance, progress."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from ev3_distill import benchmarks
from ev3_distill.benchmarks import runner
from ev3_distill.cli.main import main
from ev3_distill.errors import InputError


@pytest.mark.parametrize(
    ("suite", "seeds", "size", "expected"),
    [
        (
            "swiftness",
            1,
            "full",
            "a suite is one of coverage, evolution, growth, guards, hypergrad, int8, memory, noise, portfolio, protonet, "
            "pytorch, quality, rescue, robustness, rotation, safety, scaling, search, speed, sweeps, throughput, "
            "tuning; got 'swiftness'",
        ),
        ("throughput", 1, "huge", "a size is one of full, smoke; got 'huge'"),
        ("throughput", 0, "full", "at least 1; got 0"),
    ],
)
def test_unknown_suite_size_or_no_seeds_is_refused(suite, seeds, size, expected):
    with pytest.raises(InputError, match=expected):
        benchmarks.run_suite(suite, seeds=seeds, size=size)


def test_parts_of_a_suite_without_parts_are_refused():
    with pytest.raises(
        InputError, match="--only is for suites with parts, such as robustness; got it for speed: omit it"
    ):
        benchmarks.run_suite("speed", seeds=1, size="smoke", only=["digits"])


def test_parts_reach_the_suite(monkeypatch, capsys):
    suite = SimpleNamespace(KEY=("seed",), table=lambda rows: f"{[row['seed'] for row in rows]}")
    suite.collect = lambda *, seeds, size, only=(): ({"seed": name} for name in only)
    monkeypatch.setitem(benchmarks.SUITES, "toy", suite)
    benchmarks.run_suite("toy", seeds=1, size="smoke", only=["b", "a"])
    assert "['b', 'a']" in capsys.readouterr().out


class Toy(SimpleNamespace):
    """A suite that counts what it measures and stops, if asked to, like a killed process."""

    KEY = ("seed",)

    def __init__(self, stop: int = 99):
        super().__init__(measured=[], stop=stop)

    def collect(self, *, seeds, size, done=()):
        for seed in range(seeds):
            if (seed,) in done:
                continue
            if seed == self.stop:
                raise KeyboardInterrupt
            self.measured.append(seed)
            yield {"seed": seed, "value": 10 * seed}

    def table(self, found):
        return f"sum {sum(row['value'] for row in found)}"


def _run(monkeypatch, suite, out: Path, *, seeds: int = 4, size: str = "full") -> None:
    monkeypatch.setitem(benchmarks.SUITES, "toy", suite)
    benchmarks.run_suite("toy", seeds=seeds, size=size, out=out)


def test_interrupted_suite_resumes_after_its_last_complete_row(monkeypatch, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        _run(monkeypatch, Toy(stop=2), tmp_path)
    assert not (tmp_path / "table.md").exists()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"seed": 2, "val')  # torn by a kill
    second = Toy()
    _run(monkeypatch, second, tmp_path)
    assert second.measured == [2, 3]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines[1:]] == [0, 1, 2, 3]
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("sum 60\n\n`ev3-distill bench toy --seeds 4`, seeds 0 to 3; ")
    assert f"jax {jax.__version__}" in table and capsys.readouterr().out == table


def test_more_seeds_extend_rows_and_fewer_are_refused(monkeypatch, tmp_path):
    _run(monkeypatch, Toy(), tmp_path, seeds=2)
    third = Toy()
    _run(monkeypatch, third, tmp_path, seeds=3)
    assert third.measured == [2]
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["seeds"] == 3
    with pytest.raises(InputError, match="has other seeds"):
        _run(monkeypatch, Toy(), tmp_path, seeds=2)


def test_rows_of_another_size_or_code_are_refused(monkeypatch, tmp_path):
    _run(monkeypatch, Toy(), tmp_path)
    with pytest.raises(InputError, match="has other size"):
        _run(monkeypatch, Toy(), tmp_path, size="smoke")
    header = runner.provenance
    monkeypatch.setattr(runner, "provenance", lambda *given, **options: header(*given, **options) | {"code": "edited"})
    with pytest.raises(InputError, match=r"has other code.*--keep-rows"):
        _run(monkeypatch, Toy(), tmp_path)


def test_rows_of_other_code_are_kept_on_request_and_marked(monkeypatch, tmp_path):
    _run(monkeypatch, Toy(), tmp_path, seeds=2)
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["code"]
    header = runner.provenance
    monkeypatch.setattr(runner, "provenance", lambda *given, **options: header(*given, **options) | {"code": "edited"})
    monkeypatch.setitem(benchmarks.SUITES, "toy", again := Toy())
    benchmarks.run_suite("toy", seeds=3, size="full", out=tmp_path, keep_rows=True)
    assert again.measured == [2]
    head, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert (head["code"], [row.get("code") for row in rows]) == ("edited", [first, first, None])
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("sum 30") and f"of 3 rows, earlier code measured 2 by code {first}" in table
    benchmarks.run_suite("toy", seeds=3, size="full", out=tmp_path)  # the marks stay, and nothing is refused
    assert [json.loads(line).get("code") for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]] == [
        first,
        first,
        None,
    ]


def test_suite_without_done_writes_no_row_twice(monkeypatch, tmp_path):
    _run(monkeypatch, Toy(), tmp_path, seeds=2)
    suite = Toy()
    whole = suite.collect
    suite.collect = lambda *, seeds, size: whole(seeds=seeds, size=size)
    _run(monkeypatch, suite, tmp_path, seeds=3)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4


def test_terminal_shows_a_progress_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setitem(benchmarks.SUITES, "toy", Toy())
    benchmarks.run_suite("toy", seeds=2, size="full")
    shown = capsys.readouterr().err
    assert "bench toy" in shown and "row 2, seed 1" in shown


def test_help_names_every_suite(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    words = re.findall(r"[a-z0-9]+", capsys.readouterr().out)
    assert set(benchmarks.SUITES) <= set(words)
