"""The tables of the robustness suite."""

from collections.abc import Mapping, Sequence
from typing import Any

from ev3_distill.benchmarks import statistics
from ev3_distill.benchmarks.regret import Cells, Regret, best_overall, regret, summary
from ev3_distill.benchmarks.robustness_scenarios import Scenario
from ev3_distill.benchmarks.statistics import Interval

OURS, ALL_ROWS, STOPPED = "EV3", "KD, all rows", ", stopped"
PLAIN, LABELS = "kd4", "ce"
MEAN, WORST, CLEAN, SHARE, NEAR = 0.3, 1.0, 0.1, 0.02, 1.0  # targets: points, points, points, share of steps, points
STRICT = ("two-classes", "wrong-labels")  # scenarios with a target in every seed


def table(rows: Sequence[dict[str, Any]], *, scenarios: Mapping[str, Scenario]) -> str:
    """Regrets over scenarios, by scenario and of each recipe, and whether the targets hold."""
    cells: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        of_scenario = cells.setdefault(row["scenario"], {})
        of_scenario.setdefault(row["contender"], {})[row["seed"]] = 100 * row["accuracy"]
    fixed = list(dict.fromkeys(row["contender"] for row in rows if row["fixed"]))
    cells = {name: cells[name] for name in [*scenarios, *cells] if name in cells}
    complete = {name: cell for name, cell in cells.items() if regret(cell, OURS, fixed)}
    missing = [name for name in scenarios if name not in complete]
    parts = [
        _headline(complete, fixed),
        *_targets(complete, rows, fixed, scenarios),
        _by_scenario(complete, rows, fixed, scenarios),
        _ablations(complete),
        _by_recipe(complete, fixed),
        f"Not measured: {', '.join(missing)}." if missing else "",
    ]
    return "\n\n".join(filter(None, parts))


def _headline(cells: Cells, fixed: Sequence[str]) -> str:
    """The mean, the median and the worst regret of each contender."""
    if not cells:
        return "No scenario has both the recipes and EV3."
    best = best_overall(cells, fixed)
    names = {name: name for name in (OURS, ALL_ROWS, ALL_ROWS + STOPPED)}
    names |= {f"{LABELS}{STOPPED}": "labels alone, stopped", PLAIN: "KD, T = 4"}
    names |= {PLAIN + STOPPED: "KD, T = 4, stopped"} | ({best: f"best fixed recipe: {best}"} if best else {})
    body = []
    for name, shown in names.items():
        if one := summary(cells, name, fixed):
            body.append([
                shown, statistics.spread(one.mean, 2), statistics.number(one.median, 2), statistics.spread(one.worst, 2),
                one.where, str(len(one.scenarios)),
            ])  # fmt: skip
    head = statistics.markdown(["contender", "mean", "median", "worst", "where", "scenarios"], body)
    return f"**Regret over scenarios**, in points\n\n{head}"


def _targets(
    cells: Cells, rows: Sequence[dict[str, Any]], fixed: Sequence[str], scenarios: Mapping[str, Scenario]
) -> list[str]:
    """Whether each target holds, one paragraph."""
    ours = summary(cells, OURS, fixed)
    if ours is None:
        return []
    texts = [f"Mean regret of {OURS} at most {MEAN:g}: {_at_most(ours.mean, MEAN)}."]
    over = {name: one.interval for name, cell in cells.items() if (one := regret(cell, OURS, fixed))}
    limits = {name: scenarios[name].allowed if name in scenarios else WORST for name in over}
    beyond = [f"{name} {one.center:.2f}" for name, one in over.items() if one.center > limits[name]]
    texts.append(
        f"Regret of {OURS} at most {WORST:g} in every scenario (2 with 500 rows): "
        + (f"missed in {', '.join(beyond)}." if beyond else "held.")
    )
    clean = [name for name in cells if name in scenarios and scenarios[name].clean and ALL_ROWS in cells[name]]
    if clean:
        margins = {name: _margin(cells[name][ALL_ROWS], cells[name][OURS]) for name in clean}
        mean = sum(one.center for one in margins.values()) / len(margins)
        texts.append(
            f"On clean data not behind {ALL_ROWS} by more than {CLEAN:g} in the mean: "
            f"{statistics.number(mean, 2)} behind in the mean of {len(margins)} scenarios ("
            + "; ".join(f"{name} {statistics.spread(one, 2)}" for name, one in margins.items())
            + f"): {'held' if mean <= CLEAN else 'missed'}."
        )
    strict = {name: gaps for name in STRICT if name in cells and (gaps := _strict(cells, name, fixed))}
    if strict:
        worst = {name: max(gaps.values()) for name, gaps in strict.items()}
        texts.append(
            f"Within {NEAR:g} point in every seed of the best recipe (with the misled teacher, of the best on labels alone): "
            + "; ".join(f"{name} up to {statistics.number(gap, 2)} behind" for name, gap in worst.items())
            + f": {'held' if max(worst.values()) <= NEAR else 'missed'}."
        )
    shares = [row["labels_share"] for row in rows if row["contender"] == OURS]
    enough = sum(share >= SHARE for share in shares)
    texts.append(
        f"Labels alone get at least {SHARE:.0%} of the steps in every run: in {enough} of {len(shares)}: "
        f"{'held' if enough == len(shares) else 'missed'}."
    )
    return ["**Targets**", "\n".join(f"- {text}" for text in texts)]


def _at_most(estimate: Interval, target: float) -> str:
    negated = Interval(-estimate.center, -estimate.high, -estimate.low, estimate.n, estimate.confidence)
    return statistics.verdict(negated, -target).replace("reaches below", "reaches beyond").replace("above", "within")


def _margin(values: Mapping[int, float], others: Mapping[int, float]) -> Interval:
    seeds = sorted(values.keys() & others.keys())
    return statistics.paired([values[seed] for seed in seeds], [others[seed] for seed in seeds])


def _strict(cells: Cells, name: str, fixed: Sequence[str]) -> dict[int, float]:
    """By seed, how far EV3 is behind the best recipe; with a misled teacher, behind the best on labels alone."""
    names = [one for one in fixed if one.startswith(LABELS)] if name == STRICT[0] else fixed
    one = regret(cells[name], OURS, names)
    return one.by_seed if one else {}


def _by_scenario(
    cells: Cells, rows: Sequence[dict[str, Any]], fixed: Sequence[str], scenarios: Mapping[str, Scenario]
) -> str:
    """Per scenario: the best recipe and the regrets of the main contenders."""
    best = best_overall(cells, fixed)
    shown = [OURS, *([best] if best else []), PLAIN, ALL_ROWS, ALL_ROWS + STOPPED]
    body = []
    for name, cell in cells.items():
        own = [row for row in rows if row["scenario"] == name]
        regrets = {one: regret(cell, one, fixed) for one in shown}
        ours = regrets[OURS]
        assert ours is not None
        teacher = statistics.mean([100 * row["teacher"] for row in own if row["contender"] == OURS])
        top = statistics.mean([cell[ours.best][seed] for seed in ours.by_seed])
        body.append([
            scenarios[name].about if name in scenarios else name, str(len(ours.by_seed)), f"{own[0]['steps']:,}",
            statistics.number(teacher.center, 1), f"{ours.best} {statistics.number(top.center, 2)}",
            *(_text(regrets[one]) for one in shown),
        ])  # fmt: skip
    head = ["scenario", "seeds", "steps", "teacher, %", "best recipe, %"]
    return "**Regret by scenario**, in points\n\n" + statistics.markdown([*head, *dict.fromkeys(shown)], body)


def _ablations(cells: Cells) -> str:
    """What EV3 gains by each of its parts, in the scenarios in which it was measured without."""
    names = dict.fromkeys(name for cell in cells.values() for name in cell if name.startswith(f"{OURS} "))
    body = []
    for name in names:
        if one := summary(cells, name, [OURS]):  # its regret against EV3 as it is
            body.append([
                name, statistics.spread(one.mean, 2), statistics.number(one.median, 2), statistics.spread(one.worst, 2),
                one.where, str(len(one.scenarios)),
            ])  # fmt: skip
    if not body:
        return ""
    head = statistics.markdown(["contender", "mean", "median", "largest", "where", "scenarios"], body)
    return f"**What a part is worth**: the figure of {OURS} minus that without the part, in points\n\n{head}"


def _text(one: Regret | None) -> str:
    return statistics.spread(one.interval, 2) if one else "-"


def _by_recipe(cells: Cells, fixed: Sequence[str]) -> str:
    """The mean and the worst regret of each recipe, to the end and with early stopping."""
    body = []
    for name in fixed:
        pair = [summary(cells, one, fixed) for one in (name, name + STOPPED)]
        if name.endswith(STOPPED) or None in pair:
            continue
        body.append([
            name,
            *(text for one in pair if one
              for text in (statistics.number(one.mean.center, 2), f"{statistics.number(one.worst.center, 2)} {one.where}")),
        ])  # fmt: skip
    if not body:
        return ""
    head = ["recipe", "mean, to the end", "worst, to the end", "mean, stopped", "worst, stopped"]
    return "**Regret of the fixed recipes**, in points\n\n" + statistics.markdown(head, body)
