"""Benchmarks: their statistics are right, their contenders train alike, their rows survive a stop, the README is not typed."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import ev3_distill.arms
from ev3_distill import benchmarks
from ev3_distill.benchmarks import portfolio, readme, rows, safety, search, throughput
from ev3_distill.cli.main import main
from ev3_distill.core import adapt
from ev3_distill.errors import InputError


def test_mean_agrees_with_scipy():
    values = [3.0, 5.0, 4.0, 8.0, 5.0]
    found = rows.mean(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.center == 5
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_paired_agrees_with_scipy():
    values, others = [3.0, 5.0, 4.0, 8.0], [2.0, 5.5, 1.0, 6.0]
    found = rows.paired(values, others, confidence=0.9)
    expected = stats.ttest_rel(values, others).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.center == pytest.approx(1.375)


@pytest.mark.parametrize(
    ("n", "low", "high"),
    [(6, 1, 6), (7, 1, 7), (8, 1, 8), (9, 2, 8), (10, 2, 9), (12, 3, 10), (20, 6, 15)],
)  # ranks by the published tables of 95 % intervals for a median
def test_median_lies_between_tabulated_order_statistics(n, low, high):
    found = rows.median(list(np.random.default_rng(0).permutation(np.arange(1.0, n + 1))))
    assert found == (np.median(np.arange(1, n + 1)), low, high, n, 0.95)


def test_median_of_few_says_what_its_range_is_worth():
    assert rows.median([2.0, 1.0, 9.0]) == (2, 1, 9, 3, 0.75)  # 1 - 2 / 2^3
    assert rows.median([2.0, 4.0])[:3] == (3, 2, 4)


@pytest.mark.parametrize("estimate", [rows.mean, rows.median])
def test_one_value_has_no_interval(estimate):
    found = estimate([4.0])
    assert found.center == 4 and math.isnan(found.low) and math.isnan(found.high)
    assert rows.spread(found, 1) == rows.plus_minus(found, 1) == "4.0"


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_estimates_need_finite_values(values):
    with pytest.raises(ValueError, match="at least one value, all finite"):
        rows.mean(values)


def test_pairs_need_one_length():
    with pytest.raises(ValueError, match="one length"):
        rows.paired([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("center", "low", "high", "told"),
    [
        (2, 1, 3, "held"),
        (2, 0.9, 3, "held, but the interval reaches below"),
        (0.9, 0.5, 1.1, "missed, but the interval reaches above"),
        (0.8, 0.7, 0.9, "missed"),
    ],
)
def test_verdict(center, low, high, told):
    assert rows.verdict(rows.Interval(center, low, high, 9, 0.95), 1) == told


def test_share_has_the_interval_of_clopper_and_pearson():
    found, expected = rows.share(286, 300), stats.binomtest(286, 300).proportion_ci(0.95)
    assert found.center == 286 / 300
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert rows.percent(found, 1) == "95.3 (92.3 to 97.4)"
    assert rows.share(0, 10).low == 0 and rows.share(10, 10).high == 1
    with pytest.raises(ValueError, match="got 11 of 10"):
        rows.share(11, 10)


def test_formatting():
    interval = rows.Interval(1234.56, 1200, 1269.12, 9, 0.95)
    assert rows.spread(interval, 0) == "1,235 (1,200 to 1,269)"
    assert rows.plus_minus(interval, 1) == "1,234.6 ± 34.6"
    assert (rows.number(-0.001, 2), rows.number(-0.01, 2)) == ("0.00", "-0.01")
    assert rows.markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """Every contender over 20 steps, in iterations and calls of 10."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "CONFIG", throughput.EV3(batch_size=128, length=10, max_length=10))
        yield throughput.contenders(20, 20, ledger=tmp_path_factory.mktemp("throughput") / "ledger.jsonl")


@pytest.mark.parametrize("name", ["ev3", "ev3 with ledger", "bare, calls of 100", "reference way"])
def test_contenders_train_alike(field, name):
    pools = throughput.problem(3)
    bare = field["bare, one call"][0](pools, 3)()
    found = field[name][0](pools, 3)()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(bare), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def test_training_moves_parameters_and_follows_the_seed(field):
    bare, start = field["bare, one call"][0], throughput.problem(3)
    one, other = jax.tree.leaves(bare(start, 3)()), jax.tree.leaves(bare(start, 4)())
    assert max(float(abs(a - b).max()) for a, b in zip(one, other, strict=True)) > 0.1


def test_problem_has_the_sizes_it_names():
    pools = throughput.problem(0)
    assert [len(split.labels) for split in (pools.explore.examples, *pools[1:3])] == [1024, 512, 1024]
    assert (
        len(set(np.asarray(pools.explore.examples.index)) | set(np.asarray(pools.assess.index))) == 1536
    )  # none twice


def test_throughput_smoke(tmp_path, capsys):
    main.main(["bench", "throughput", "--seeds", "2", "--size", "smoke", "--out", str(tmp_path)])
    head, *found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in found] == [0, 1]
    assert all(speed > 0 for row in found for speed in row["steps_per_s"].values())
    assert head["command"] == "ev3-distill bench throughput --seeds 2 --size smoke"
    assert head["versions"]["jax"] == jax.__version__
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "table.md").read_text()
    assert "bench throughput: row 2, seed 1" in printed.err


def test_throughput_table_compares_with_the_faster_bare_loop():
    speed = {
        "ev3": 95.0,
        "ev3 with ledger": 80.0,
        "bare, one call": 90.0,
        "bare, calls of 100": 100.0,
        "reference way": 4.0,
    }
    text = throughput.table([{"seed": seed, "steps": 1, "steps_per_s": speed} for seed in range(7)])
    assert "| ev3 / `bare, calls of 100` | 0.95 (0.95 to 0.95) | ≥ 0.9: held |" in text
    assert "| ev3 / reference way | 23.75 (23.75 to 23.75) | ≥ 20: held |" in text
    assert "| reference way | 4 (4 to 4) |" in text


def test_full_throughput_needs_turns():
    with pytest.raises(InputError, match="at least 7 turns; got 3"):
        list(throughput.collect(seeds=3, size="full"))


def _teacher_of_labels(dataset, cost):
    return lambda seed: 5 * np.eye(dataset.num_classes, dtype=np.float32)[dataset.labels]


def test_portfolio_smoke(monkeypatch):
    monkeypatch.setattr(ev3_distill.arms, "DEFAULT", ("ce",))
    monkeypatch.setattr(portfolio, "SINGLES", ("ce",))
    monkeypatch.setattr(portfolio, "COST", {"digits": 2000})
    monkeypatch.setattr(portfolio, "trained_teacher", _teacher_of_labels)  # one less to compile
    found = list(portfolio.collect(seeds=1, size="smoke"))
    assert [row["contender"] for row in found] == ["portfolio", "EV3, ce alone", "bare ce"]
    assert len({tuple(row[field] for field in portfolio.KEY) for row in found}) == 3
    assert all(0 <= row["accuracy"] <= 1 for row in found)
    assert "| bare ce |" in portfolio.table(found)


def test_portfolio_table_takes_the_best_in_hindsight_and_pairs_by_seed():
    accuracies = {"portfolio": [0.95, 0.94, 0.96], "EV3, a alone": [0.90, 0.99, 0.90], "bare b": [0.955, 0.945, 0.965]}
    found = [
        {"data": "d", "seed": seed, "contender": contender, "accuracy": accuracy, "cost": 4000}
        for contender, by_seed in accuracies.items()
        for seed, accuracy in reversed(list(enumerate(by_seed)))
    ]
    text = portfolio.table(found)
    assert "(bare b), paired over 3 seeds: -0.50 (-0.50 to -0.50) points; target ≥ -0.3: missed." in text
    assert "| portfolio | 95.00 ± 2.48 | 4,000 |" in text  # t(.975, 2) = 4.303, std 1, n 3


@pytest.mark.parametrize("rule", ["ev3", "ev3, always asking"])
def test_safety_tells_a_rule_that_spends_too_much(monkeypatch, rule):
    def promoted_falsely(runs):
        safety._simulate.cache_clear()
        ended = safety._simulate("near-copies", rule, 60)(jax.random.split(jax.random.key(0), runs))
        return int(ended.false.sum())

    assert promoted_falsely(40) <= 6  # beyond that with probability 2e-3 were the rate 0.05
    monkeypatch.setattr(adapt, "level", lambda budget, closing: jnp.float32(0.4))
    assert promoted_falsely(40) >= 20
    safety._simulate.cache_clear()


def test_safety_simulates_what_it_says():
    key = jax.random.key(0)
    run = safety._begun(key, 0.9)
    run = run._replace(champion=jax.tree.map(lambda h: jnp.where(jnp.arange(h.size) < 922, 1.0, 0.0), run.champion))
    for kind, won, lost in (("near-copies", 0.03, 0.03), (safety._BETTER, 0.04, 0.02), ("after gains", 0.05, 0.01)):
        made = [safety._candidate(k, kind, run, jnp.int32(0))[0].decide for k in jax.random.split(key, 100)]
        difference = np.stack(made) - np.asarray(run.champion.decide)
        np.testing.assert_allclose((difference > 0).mean(), won, atol=0.002)  # 5 standard errors
        np.testing.assert_allclose((difference < 0).mean(), lost, atol=0.002)


def test_safety_table():
    def row(question, candidates, rule, count, of):
        return {"seed": 0, "question": question, "candidates": candidates, "rule": rule, "count": count, "of": of}

    rows = [
        row("false", "equal", "ev3", 1, 1000),
        row("false", "equal", "ev3", 3, 1000),
        row("false", "equal", "ev3, always asking", 100, 2000),
        row("wait", safety._BETTER, "ev3", 500, 100),
        row("wait", safety._BETTER, "ev3, always asking", 700, 100),
        row("power", "first test", "ev3", 50, 100),
        row("power", "one of five", "ev3", 30, 100),
    ]
    text = safety.table(rows)
    assert "| equal | 0.2 (0.1 to 0.5) | 5.0 (4.1 to 6.0) |" in text  # intervals of Clopper and Pearson
    assert "upper limit of 6.5 %: held" in text
    assert "| iterations up to a promotion, mean | 5.0 | 7.0 |" in text
    assert "one of five: target ≥ 70 %: missed." in text
    assert "upper limit of 6.5 %: missed" in safety.table([*rows, row("false", "equal", "ev3, always asking", 30, 100)])


def test_what_a_search_came_to():
    """Each against the runs alone of its own seed; the last accuracy is beyond them."""

    def alone(seed, params, bound):
        told = {"params": params, "accuracy": bound + 0.0196, "bound": bound, "steps": 100}  # a standard error of 0.01
        return {"data": "d", "seed": seed, "run": f"alone {params}", **told}

    def searched(seed, aim, params, bound):
        told = {"params": params, "bound": bound, "exit": 0 if bound >= aim else 3, "steps": 100, "sizes": []}
        return {"data": "d", "seed": seed, "run": f"search {aim}", **told}

    bounds = {0: {10: 0.6, 20: 0.8, 40: 0.9}, 1: {10: 0.71, 20: 0.75, 40: 0.9}}
    rows = [alone(seed, params, bound) for seed, of_seed in bounds.items() for params, bound in of_seed.items()]
    rows += [searched(0, 0.7, 10, 0.72), searched(1, 0.7, 20, 0.8), searched(0, 0.85, 40, 0.86)]
    rows += [searched(1, 0.85, 40, 0.8), searched(0, 0.99, 40, 0.9), searched(1, 0.99, 40, 0.91)]
    text = search.table(rows)
    # at 0.7 a bound of 0.71 would come again 3 times in 4, which is too seldom
    assert "| d | 0.7 | 20, 10 | 20, 20 | 10, 20 | 0 | 1 | 1 | 0 | 100 | 300 |" in text
    assert "| d | 0.85 | 40, 40 | 40, 40 | 40, none, 80.0% | 1 | 0 | 0 | 1 | 100 | 300 |" in text
    assert "| d | 0.99 | none, none | none, none | none, 90.0%, none, 91.0% | 2 | 0 | 0 | 0 | 100 | 300 |" in text
    assert "none where none does: 4 of 6 searches; as any that would again: 5 of 6." in text
    assert search.again(alone(0, 10, 0.7), 0.7) == pytest.approx(0.5)
    assert search.again(alone(0, 10, 0.7 + 0.01 * 2**0.5 * 1.2816), 0.7) == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize(
    ("suite", "seeds", "size", "told"),
    [
        (
            "swiftness",
            1,
            "full",
            "a suite is one of coverage, evolution, growth, guards, hypergrad, int8, memory, noise, portfolio, protonet, "
            "pytorch, quality, rescue, rotation, safety, search, speed, sweeps, throughput, "
            "tuning; got 'swiftness'",
        ),
        ("throughput", 1, "huge", "a size is one of full, smoke; got 'huge'"),
        ("throughput", 0, "full", "at least 1; got 0"),
    ],
)
def test_bad_input(suite, seeds, size, told):
    with pytest.raises(InputError, match=told):
        benchmarks.run(suite, seeds=seeds, size=size)


class Toy(SimpleNamespace):
    """A suite that counts what it measures and stops, if told, like a killed process."""

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
    benchmarks.run("toy", seeds=seeds, size=size, out=out)


def test_rows_resume(monkeypatch, tmp_path, capsys):
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


def test_rows_of_another_setting_are_refused(monkeypatch, tmp_path):
    _run(monkeypatch, Toy(), tmp_path)
    with pytest.raises(InputError, match="has other size"):
        _run(monkeypatch, Toy(), tmp_path, size="smoke")
    monkeypatch.setattr(benchmarks, "_code", lambda: "edited")
    with pytest.raises(InputError, match="has other code"):
        _run(monkeypatch, Toy(), tmp_path)


def test_a_suite_that_cannot_leave_out_writes_no_row_twice(monkeypatch, tmp_path):
    _run(monkeypatch, Toy(), tmp_path, seeds=2)
    suite = Toy()
    whole = suite.collect
    suite.collect = lambda *, seeds, size: whole(seeds=seeds, size=size)
    _run(monkeypatch, suite, tmp_path, seeds=3)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4


def test_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setitem(benchmarks.SUITES, "toy", Toy())
    benchmarks.run("toy", seeds=2, size="full")
    assert "bench toy: row 2, seed 1" in capsys.readouterr().err


def test_provenance_names_machine_and_no_host():
    basis = benchmarks.provenance("throughput", seeds=10, size="full")
    assert basis["command"] == "ev3-distill bench throughput --seeds 10"
    assert set(basis["machine"]) == {"cpu", "cores", "accelerator"}
    assert set(basis["versions"]) == {"python", "jax", "flax", "optax", "numpy"}


@pytest.fixture
def page(tmp_path):
    results = tmp_path / "results"
    for name in ("a", "b"):
        (results / name).mkdir(parents=True)
        (results / name / "table.md").write_text(f"table {name}\n")
    path = tmp_path / "README.md"
    marked = "<!-- bench:{0} -->\nold\n<!-- /bench:{0} -->"
    path.write_text(f"before\n{marked.format('a')}\nbetween\n{marked.format('b')}\nafter\n")
    return path, ["--readme", str(path), "--results", str(results)]


def test_readme_is_rendered_and_checked(page, capsys):
    path, options = page
    assert readme.main(["--check", *options]) == 1
    assert "differs" in capsys.readouterr().err
    assert "old" in path.read_text()  # a check changes nothing
    assert readme.main(options) == 0
    marked = "<!-- bench:{0} -->\ntable {0}\n<!-- /bench:{0} -->"
    assert path.read_text() == f"before\n{marked.format('a')}\nbetween\n{marked.format('b')}\nafter\n"
    assert readme.main(["--check", *options]) == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- bench:a -->\n", "come in pairs"),
        ("<!-- /bench:a -->\n<!-- bench:a -->\n", "come in pairs"),
        ("<!-- bench:a -->\n<!-- /bench:b -->\n", "come in pairs"),
        ("<!-- bench:c -->\n<!-- /bench:c -->\n", "measure it first"),
    ],
)
def test_readme_errors(page, capsys, text, told):
    path, options = page
    path.write_text(text)
    assert readme.main(options) == 2
    assert told in capsys.readouterr().err
    assert path.read_text() == text


def quality_row(seed, contender, accuracy, held_out=0.5, cost=100):
    facts = {"cost": cost, "held_out": held_out, "accuracy": accuracy, "bound": accuracy - 0.02}
    return {"data": "digits", "seed": seed, "contender": contender, **facts}


def test_quality_takes_of_the_grid_what_held_out_examples_prefer():
    """Of seed 0 that is the point which the test examples like least, and the grid costs all its points."""
    rows = [
        *[quality_row(seed, "EV3", 0.9 + seed / 100, cost=150) for seed in (0, 1)],
        quality_row(0, "grid T=4 alpha=0.9", 0.88, held_out=0.7),
        quality_row(0, "grid T=1 alpha=0.9", 0.95, held_out=0.6),
        quality_row(1, "grid T=4 alpha=0.9", 0.89, held_out=0.6),
        quality_row(1, "grid T=1 alpha=0.9", 0.91, held_out=0.7),
    ]
    told = benchmarks.quality.table(rows)
    assert "| best of the grid | 89.50 ± 19.06 | 87.50 | 200 |" in told
    assert "| KD, T = 4 | 88.50 ± 6.35 | 86.50 | 100 |" in told
    assert "EV3 minus best of the grid, paired: 1.00 (-11.71 to 13.71) points at 0.75 times the cost" in told
    assert "at no more than 0.33: missed, by its cost." in told
    assert (
        "EV3 minus KD, T = 4, paired: 2.00 (2.00 to 2.00) points at 1.50 times the cost; target > 0 at no more than 1.5: held."
        in told
    )


def test_quality_measures_every_contender(tmp_path, monkeypatch):
    """The smoke size: each contender once, with what its cost comes to; a row at hand is left out."""
    monkeypatch.setattr(benchmarks.quality, "ALONE", ("ce",))
    monkeypatch.setattr(benchmarks.quality, "TEMPERATURES", (1.0, 4.0))
    monkeypatch.setattr(benchmarks.quality, "ALPHAS", (0.9,))
    rows = list(benchmarks.quality.collect(seeds=1, size="smoke", done=[("digits", 0, "EV3, tuning")]))
    costs = {row["contender"]: row["cost"] for row in rows}
    assert costs == {
        "ce": 150, "grid T=1 alpha=0.9": 150, "grid T=4 alpha=0.9": 150, "EV3": 225, "EV3, synergy": 450,
    }  # fmt: skip
    assert all(0 <= row["bound"] < row["accuracy"] <= 1 and 0 < row["held_out"] <= 1 for row in rows)
    by_name = {row["contender"]: row["accuracy"] for row in rows}
    assert by_name["grid T=1 alpha=0.9"] != by_name["grid T=4 alpha=0.9"]
