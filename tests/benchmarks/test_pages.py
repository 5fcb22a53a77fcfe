"""Documentation pages of benchmarks: generated from rows, checked, and silent about intervals that one seed cannot give."""

import json
from types import SimpleNamespace

import pytest
from test_comparison import BASIS

from ev3_distill.benchmarks import pages

QUESTION = "Is it good?"


def suite(table="| a |\n| --- |\n| 1 |", **members):
    """A suite module."""
    defaults = {
        "KEY": ("seed", "contender"),
        "INTERVALS": "Intervals are over seeds.",
        "__name__": "benchmarks.toy_suite",
    }
    documented = f"{QUESTION}\n\nIt is measured.\n\nReferences:\n  A paper,\n    2020.\n  Another.\n"
    return SimpleNamespace(**{**defaults, **members}, table=lambda rows: table, __doc__=documented)


@pytest.fixture
def render(tmp_path, monkeypatch):
    """A function (module, seeds by contender) -> the arguments of the command for results of that suite."""

    def prepare(module, seeds):
        monkeypatch.setattr(pages, "SUITES", {"toy": module})
        folder = tmp_path / "results" / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"seed": seed, "contender": name} for name, count in seeds.items() for seed in range(count)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (BASIS, *rows)))
        (folder / "about.md").write_text("Yes, it is\ngood.\n\nBecause.\n")
        return ["--results", str(tmp_path / "results"), "--pages", str(tmp_path / "pages")]

    return prepare


def test_committed_pages_are_up_to_date():
    assert pages.main(["--check"]) == 0


def test_page_has_question_answer_table_method_and_command(render, tmp_path):
    assert pages.main(render(suite(), {"a": 3})) == 0
    page = (tmp_path / "pages" / "toy.md").read_text()
    order = [
        "# Toy suite", f"**{QUESTION}**", "Yes, it is\ngood.", "Because.", "| 1 |", "3 seeds per cell", "It is measured.",
        "- A paper, 2020.\n- Another.", "ev3-distill bench toy --seeds 9 --out toy", "Abacus, 2 cores", "jax 0.10.2",
    ]  # fmt: skip
    assert [page.index(text) for text in order] == sorted(page.index(text) for text in order)
    assert f"| [toy](toy.md) | {QUESTION} | Yes, it is good. | 3 |" in (tmp_path / "pages" / "index.md").read_text()


def test_page_of_one_seed_says_that_it_gives_no_verdict(render, tmp_path):
    pages.main(render(suite(), {"a": 1, "b": 1}))
    page = (tmp_path / "pages" / "toy.md").read_text()
    assert "1 seed per cell." in page and "gives no verdict on one" in page


@pytest.mark.parametrize(("seeds", "code"), [(1, 2), (2, 0)])
def test_verdict_on_an_interval_is_refused_with_one_seed(render, capsys, seeds, code):
    assert pages.main(render(suite("held, but the interval reaches below"), {"a": seeds})) == code
    assert ("one seed gives no verdict on an interval; the table of toy has one" in capsys.readouterr().err) == (
        code == 2
    )


def test_different_numbers_of_seeds_are_listed(render, tmp_path):
    pages.main(render(suite(), {"a": 20, "b": 3}))
    page = (tmp_path / "pages" / "toy.md").read_text()
    assert "Seeds per cell: 20 for a, 3 for b." in page
    assert "| 3 to 20 |" in (tmp_path / "pages" / "index.md").read_text()


def test_check_reports_changed_missing_and_leftover_pages_and_writes_nothing(render, tmp_path, capsys):
    options, folder = render(suite(), {"a": 3}), tmp_path / "pages"
    assert pages.main(["--check", *options]) == 1 and not folder.exists()
    assert "index.md, toy.md" in capsys.readouterr().err
    assert pages.main(options) == 0 == pages.main(["--check", *options])
    (folder / "old.md").write_text("a suite that is gone")
    (folder / "toy.md").write_text("typed by hand")
    assert pages.main(["--check", *options]) == 1
    assert "old.md, toy.md" in capsys.readouterr().err and (folder / "toy.md").read_text() == "typed by hand"
    assert pages.main(options) == 0 == pages.main(["--check", *options])
    assert not (folder / "old.md").exists()


def test_missing_answer_is_an_error(render, tmp_path, capsys):
    options = render(suite(), {"a": 3})
    (tmp_path / "results" / "toy" / "about.md").unlink()
    assert pages.main(options) == 2
    assert "about.md cannot be read" in capsys.readouterr().err
