"""What changed beyond noise between two results of one suite: every measurement of every group, at one error rate for all.

A row's measurements are its numbers outside of KEY, those in a nested table included, or the suite's `measures(row)`. A group
is the set of rows that differ only in the suite's `REPEATS`, by default `seed`. If both sides have at least two common
repetitions, their differences are taken in pairs (Student's t); otherwise all values are compared (Welch's t).

`changed` are differences whose p-value is at most 5 % after Holm's correction for the number of comparisons: their interval
excludes zero at the corrected level. If nothing changed, a comparison names any change with a probability of at most 5 %. If
all values are alike, a t interval does not apply; then p is that of the sign of the pairs, or of the order of the two sets.

Not compared: fields with one value in all repetitions of a group on both sides; settings, which are constant in every group
of a side; times, the suite's `TIMED`, if the machines differ; and values that were measured once or are not finite.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ev3_distill.benchmarks import statistics
from ev3_distill.benchmarks.provenance import machine_text, seeds_text
from ev3_distill.benchmarks.results_folder import Results
from ev3_distill.errors import InputError

ALPHA = 1 - statistics.CONFIDENCE
SHOWN = 20  # largest number of groups listed if rows are on one side only
SAME, SETTING = "the same", "a setting"
_ROUNDING = 1e-9  # relative
FIELD = " / "  # between the names of nested fields

Group = tuple[tuple[str, Any], ...]  # fields of KEY without repetitions, with their values
Repeat = tuple[Any, ...]


class Difference(NamedTuple):
    """After minus before, of one measurement in one group."""

    before: float  # means
    after: float
    interval: statistics.Interval  # 95 %, without correction
    of: str  # the number of values or pairs
    p: float  # two-sided, without correction; NaN if there are too few values


class Line(NamedTuple):
    """A measurement of a group, or the reason why it was not compared."""

    group: Group
    field: str
    difference: Difference
    instead: str = ""  # the reason why it was not compared
    adjusted: float = math.nan  # p after Holm's correction

    @property
    def changed(self) -> bool:
        """Whether the difference is beyond noise."""
        return self.adjusted <= ALPHA


def compared(before: Results, after: Results) -> list[Line]:
    """Every measurement that both sides have, in the order of the rows.

    Raises:
      InputError: the results are of different suites or sizes.
    """
    for name in ("suite", "size"):
        if before.header[name] != after.header[name]:
            raise InputError(
                f"results are compared within one {name}; got {before.header[name]} and {after.header[name]}: name two folders "
                f"of the same {name}"
            )
    sides = [_measured(results) for results in (before, after)]
    times = set() if before.header["machine"] == after.header["machine"] else set(getattr(before.suite, "TIMED", ()))
    one, other = sides
    settings = _settings(sides)
    lines = []
    for group, fields in one.items():
        for field in fields:
            if field in other.get(group, {}):
                time, setting = field.split(FIELD)[0] in times, field in settings
                lines.append(_line(group, field, fields[field], other[group][field], time=time, setting=setting))
    tested = [i for i, line in enumerate(lines) if not line.instead]
    for i, adjusted in zip(tested, statistics.holm([lines[i].difference.p for i in tested]), strict=True):
        lines[i] = lines[i]._replace(adjusted=adjusted)
    return lines


def difference(before: Mapping[Repeat, float], after: Mapping[Repeat, float]) -> Difference:
    """The difference of finite values by repetition."""
    common = [repeat for repeat in before if repeat in after]
    if len(common) >= 2 or (common and min(len(before), len(after)) == 1):
        return _paired([before[repeat] for repeat in common], [after[repeat] for repeat in common])
    return _unpaired([*before.values()], [*after.values()])


def _paired(x: Sequence[float], y: Sequence[float]) -> Difference:
    interval, p = statistics.paired(y, x), math.nan
    if len(x) > 1:
        moved = np.subtract(y, x)
        p = _certain(moved.mean(), 2.0 ** (1 - len(x))) if _alike(moved, x, y) else stats.ttest_1samp(moved, 0).pvalue
    pairs = f"{len(x)} pair{'s' if len(x) > 1 else ''}"
    return Difference(float(np.mean(x)), float(np.mean(y)), interval, pairs, float(p))


def _unpaired(x: Sequence[float], y: Sequence[float]) -> Difference:
    means, of = (float(np.mean(x)), float(np.mean(y))), f"{len(x)} and {len(y)}"
    if min(len(x), len(y)) < 2:
        alone = statistics.Interval(means[1] - means[0], math.nan, math.nan, len(x) + len(y), statistics.CONFIDENCE)
        return Difference(*means, alone, of, math.nan)
    if _alike(x, x, y) and _alike(y, x, y):
        p = _certain(means[1] - means[0], min(1.0, 2 / math.comb(len(x) + len(y), len(x))))
    else:
        p = stats.ttest_ind(y, x, equal_var=False).pvalue
    return Difference(*means, statistics.welch(y, x), of, float(p))


def _alike(values: Any, *scales: Sequence[float]) -> bool:
    """Whether all values are the same up to rounding."""
    return bool(np.ptp(values) <= _ROUNDING * max(np.abs(scale).max() for scale in scales))


def _certain(moved: float, least: float) -> float:
    """The p-value if all values are alike: the smallest possible one if they moved."""
    return least if moved else 1.0


def _line(
    group: Group,
    field: str,
    before: Mapping[Repeat, float],
    after: Mapping[Repeat, float],
    *,
    time: bool,
    setting: bool,
) -> Line:
    if wild := sum(not math.isfinite(value) for side in (before, after) for value in side.values()):
        nothing = statistics.Interval(math.nan, math.nan, math.nan, 0, statistics.CONFIDENCE)
        unknown = Difference(math.nan, math.nan, nothing, "", math.nan)
        return Line(group, field, unknown, f"not finite: {wild} of {len(before) + len(after)} values")
    found = difference(before, after)
    constant = min(len(before), len(after)) > 1 and len({*before.values(), *after.values()}) == 1
    reasons = {
        SAME: constant,
        SETTING: setting,
        "a time on another machine": time,
        "measured once": math.isnan(found.p),
    }
    return Line(group, field, found, next((reason for reason, holds in reasons.items() if holds), ""))


def _measured(results: Results) -> dict[Group, dict[str, dict[Repeat, float]]]:
    """Values by group, field and repetition."""
    repeats = _repeats(results.suite)
    found: dict[Group, dict[str, dict[Repeat, float]]] = {}
    for row in results.rows:
        group, repeat = _named(row, results.suite.KEY, repeats)
        for field, value in measures(results.suite, row).items():
            found.setdefault(group, {}).setdefault(field, {})[repeat] = value
    return found


def measures(suite: ModuleType, row: Mapping[str, Any]) -> dict[str, float]:
    """A row's measurements by field; NaN for null."""
    found = suite.measures(row) if hasattr(suite, "measures") else dict(_numbers(row, suite.KEY))
    return {field: math.nan if value is None else float(value) for field, value in found.items()}


def _numbers(
    values: Mapping[str, Any], key: Sequence[str] = (), within: str = ""
) -> Iterator[tuple[str, float | None]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, within=f"{within}{name}{FIELD}")
        elif name not in key and (value is None or type(value) in (int, float)):
            yield f"{within}{name}", value


def _repeats(suite: ModuleType) -> tuple[str, ...]:
    return tuple(getattr(suite, "REPEATS", ("seed",)))


def _named(row: Mapping[str, Any], key: Sequence[str], repeats: Sequence[str]) -> tuple[Group, Repeat]:
    return (
        tuple((field, row[field]) for field in key if field not in repeats),
        tuple(row[field] for field in key if field in repeats),
    )


def _settings(sides: Sequence[Mapping[Group, Mapping[str, Mapping[Repeat, float]]]]) -> set[str]:
    """Fields with one value in each group of each side, and more than one repetition in some group."""
    varies, repeated = set(), set()
    for side in sides:
        for fields in side.values():
            for field, values in fields.items():
                repeated |= {field} if len(values) > 1 else set()
                varies |= {field} if len(set(values.values())) > 1 else set()
    return repeated - varies


# Text.


def table(before: Results, after: Results, names: tuple[str, str]) -> str:
    """What changed, as Markdown, with the answer first.

    Args:
      before: one side.
      after: the other.
      names: of the folders.
    """
    lines = compared(before, after)
    tested = [line for line in lines if not math.isnan(line.adjusted)]
    changed = [line for line in tested if line.changed]
    rest = [line for line in tested if not line.changed]
    settings = [line for line in lines if line.instead == SETTING]
    same = sum(line.instead == SAME for line in lines)
    parts = [
        f"**{len(changed)} of {len(tested)} comparisons changed** beyond noise: p at most {ALPHA:.2g} after Holm's correction "
        f"for all {len(tested)}. Differences are after less before, with a 95 % interval, each by itself."
        + (f" Beside them {same:,} have one value in all repetitions of both sides." if same else ""),
        f"Before: `{names[0]}`; after: `{names[1]}`.",
        _sides(before, after),
        *_warnings(before, after),
        *(["## Changed", _differences(changed)] if changed else []),
        *(["## No change beyond noise", _differences(rest)] if rest else []),
        *(["## Settings that differ", _plain(settings)] if settings else []),
        *_alone(before, after),
        *_not_compared(before, after, [line for line in lines if line.instead not in ("", SAME, SETTING)]),
    ]
    return "\n\n".join(parts)


def _sides(before: Results, after: Results) -> str:
    one, other = before.header, after.header
    packages = dict.fromkeys([*one["versions"], *other["versions"]])
    facts = [
        ["rows", f"{len(before.rows):,}", f"{len(after.rows):,}"],
        ["seeds", seeds_text(one), seeds_text(other)],
        ["machine", machine_text(one), machine_text(other)],
        *[[name, one["versions"].get(name, "-"), other["versions"].get(name, "-")] for name in packages],
        ["code", one["code"], other["code"]],
    ]
    body = [[name, x, y, "the same" if x == y else "differs"] for name, x, y in facts]
    return statistics.markdown(["what", "before", "after", ""], body)


def _warnings(before: Results, after: Results) -> list[str]:
    """Limits of the comparison."""
    texts = []
    if before.header["machine"] != after.header["machine"]:
        texts.append("**The machines differ: times are not compared.**")
    elif getattr(before.suite, "TIMED", ()):
        texts.append("Times depend on the machine's other load, which is not recorded.")
    if before.header["code"] == after.header["code"] and before.header["versions"] == after.header["versions"]:
        texts.append("Code and versions are the same: they explain no change.")
    return [" ".join(texts)] if texts else []


def _differences(lines: Sequence[Line]) -> str:
    header = ["measurement", "before", "after", "difference (95 % interval)", "from", "p, corrected"]
    body = []
    for line in lines:
        found = line.difference
        digits = _digits(found.interval.high - found.interval.low, found.interval.center, found.before)
        means = [statistics.number(value, digits) for value in (found.before, found.after)]
        p = f"{line.adjusted:.2g}" if line.adjusted >= 1e-4 else "< 0.0001"
        body.append([_called(line), *means, statistics.spread(found.interval, digits), found.of, p])
    return statistics.markdown(header, body)


def _plain(lines: Sequence[Line]) -> str:
    """Values that are not compared, and why."""
    body = []
    for line in lines:
        means = (line.difference.before, line.difference.after)
        body.append([_called(line), *("-" if math.isnan(x) else f"{x:,.6g}" for x in means), line.instead])
    return statistics.markdown(["what", "before", "after", "why"], body)


def _digits(*scales: float) -> int:
    """Number of decimals that show two digits of the first nonzero scale."""
    scale = next((abs(scale) for scale in scales if math.isfinite(scale) and scale), 1.0)
    return min(12, max(0, 1 - math.floor(math.log10(scale))))


def _called(line: Line) -> str:
    return f"{_of(line.group)}: {line.field}" if line.group else line.field


def _of(group: Group) -> str:
    return ", ".join(f"{field} {value}" for field, value in group)


def _alone(before: Results, after: Results) -> list[str]:
    """Rows on one side only, by group."""
    key, repeats, texts = before.suite.KEY, _repeats(before.suite), []
    one, other = ({_named(row, key, repeats): None for row in side.rows} for side in (before, after))
    for name, alone in (("before", [x for x in one if x not in other]), ("after", [x for x in other if x not in one])):
        groups: dict[Group, list[str]] = {}
        for group, repeat in alone:
            groups.setdefault(group, []).append("/".join(map(str, repeat)))
        counted = "/".join(field for field in key if field in repeats)
        items = [f"- {_of(group) + ', ' if group else ''}{counted} {', '.join(of)}" for group, of in groups.items()]
        items = items[:SHOWN] + ([f"- and {len(items) - SHOWN} groups more"] if len(items) > SHOWN else [])
        texts += [f"Only {name}, {len(alone)}:", "\n".join(items)] if alone else []
    return ["## Rows on one side alone", *texts] if texts else []


def _not_compared(before: Results, after: Results, lines: Sequence[Line]) -> list[str]:
    """Measurements that could not be compared, and fields that are not numbers."""
    texts = [_plain(lines)] if lines else []
    if not hasattr(before.suite, "measures"):
        rows = [*before.rows, *after.rows]
        numbers = {field.split(FIELD)[0] for row in rows for field in measures(before.suite, row)}
        words = dict.fromkeys(field for row in rows for field in row if field not in numbers | {*before.suite.KEY})
        texts += [f"Fields that are not numbers: {', '.join(f'`{field}`' for field in words)}."] if words else []
    return ["## Not compared", *texts] if texts else []
