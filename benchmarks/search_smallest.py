"""Does a search end with the smallest size that can certify the guard?

For each data set and seed, `ev3-distill teach` trains a teacher. Then:

- `alone`: every size of the ladder by a `compress` of its own with the whole budget. The bound in its certificate shows which
  sizes can certify an accuracy;
- `search`: `compress --start tiny --moves wider --guard "accuracy >= X"`, with five times that budget for all eight sizes
  together. It may grow up to the last size of the ladder, and knows nothing of the runs alone.

These are the commands that a user gives, each in its own process. Which of two neighboring sizes certifies is partly chance:
it depends on the initial parameters and on the sealed split. A size whose students are right on just enough examples
certifies every other time. So a search is also compared with the sizes that would probably certify again on another sealed
split. No size of the ladder reaches the last accuracy: there a search must report failure.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from ev3_distill.benchmarks import datasets, statistics
from ev3_distill.search.stage import SEALED_PROBABILITY

KEY = ("data", "seed", "run")  # identifies a row
INTERVALS = "The table counts searches; counts have no interval."
# The search policy was designed on seeds below 4000, and changed after results on seeds 4000 to 4404.
FIRST_SEED = 4500
LADDER = (2, 3, 4, 6, 8, 12, 16, 24)  # hidden units: tiny, and what `wider` makes of it
SIZES = {"full": LADDER, "smoke": LADDER[:2]}
BUDGET = {"full": {"digits": 20000, "mnist": 10000}, "smoke": {"digits": 2000}}  # of each size alone
TIMES = 5  # budget of a search, in budgets of a size alone
TEACHER_BUDGET = {"full": 3000, "smoke": 300}
AIMS = {
    "digits": (0.75, 0.85, 0.99),
    "mnist": (0.75, 0.9, 0.99),
}  # accuracies; no size of the ladder reaches the last one
LEVEL = 0.05 / 2  # of a run alone, whose certificate has two claims: accuracy and agreement with the teacher
OUTCOMES = ("the same", "smaller", "larger", "not certified")


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per data set, seed and run.

    Args:
      seeds: number of seeds from FIRST_SEED, each with its own splits, teacher and initial parameters.
      size: full, or smoke: digits only, two sizes, short runs.
      done: keys of rows to skip.
    """
    names = ("digits",) if size == "smoke" else ("digits", "mnist")
    ladder, aims = SIZES[size], AIMS if size == "full" else {"digits": AIMS["digits"][:1]}
    for name in names:
        source = datasets.required_source(name)
        for seed in range(seeds):
            runs: dict[str, tuple[str, ...]] = {
                f"alone {hidden}": ("--student", f"mlp:hidden={hidden}") for hidden in ladder
            }
            most = str(_params(source, ladder[-1]))
            for aim in aims[name]:
                guard = ("--guard", f"accuracy >= {aim}", "--max-params", most)
                runs[f"search {aim:g}"] = ("--start", "tiny", "--student", "mlp:hidden=2", "--moves", "wider", *guard)
            if missing := {run: options for run, options in runs.items() if (name, seed, run) not in done}:
                with tempfile.TemporaryDirectory() as directory:
                    bench = _Bench(Path(directory), source, FIRST_SEED + seed, size, budget=BUDGET[size][name])
                    for run, options in missing.items():
                        yield {"data": name, "seed": seed, "run": run, **bench.row(run, options)}


def _params(source: str, hidden: int) -> int:
    import jax

    from ev3_distill import students
    from ev3_distill.data.sources import load_data
    from ev3_distill.students import count_params

    dataset = load_data(source)
    network = students.from_name(f"mlp:hidden={hidden}", dataset.inputs.shape[1:], dataset.num_classes)
    return count_params(jax.eval_shape(network.init, jax.random.key(0)))


class _Bench:
    """The commands of one data set and seed, in their own folder."""

    def __init__(self, directory: Path, source: str, seed: int, size: str, *, budget: int):
        self.directory, self.budget = directory, budget
        cache = Path(tempfile.gettempdir()) / "ev3-distill-bench-search"  # compiled programs of all seeds
        self.environment = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            **os.environ,
            "EV3_DISTILL_CACHE": str(directory / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.common = ("--data", source, "--seed", str(seed))
        self._command("teach", "--budget", str(TEACHER_BUDGET[size]), "--out", "teacher")

    def row(self, run: str, options: Sequence[str]) -> dict[str, Any]:
        """The measurements of one run."""
        out = run.replace(" ", "-")
        budget = self.budget * (TIMES if "--start" in options else 1)
        arguments = ("--teacher", "flax:teacher", "--budget", str(budget), "--out", out, *options)
        code = self._command("compress", *arguments)
        report = json.loads((self.directory / out / "report.json").read_text())
        bound = next(claim for claim in report["certificate"]["claims"] if claim["metric"] == "accuracy")["lower_bound"]
        facts = {
            "params": report["student"]["params"],
            "network": report["student"]["network"],
            "accuracy": report["student"]["accuracy"],
            "bound": bound,
            "steps": report["cost"]["steps"],
            "exit": code,
        }
        if "search" in report:
            sizes = report["search"]["sizes"]
            facts["sizes"] = [
                {key: one[key] for key in ("number", "params", "how", "cost", "accuracy", "met")} for one in sizes
            ]
        return facts

    def _command(self, name: str, *options: str) -> int:
        """Runs a command; returns its exit code, 0 or 3."""
        command = [sys.executable, "-m", "ev3_distill", name, *self.common, *options]
        done = subprocess.run(command, cwd=self.directory, env=self.environment, stdout=sys.stderr, check=False)
        if done.returncode not in (0, 3):
            raise RuntimeError(f"{name} ended with exit code {done.returncode}: see above")
        return done.returncode


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers, and whether it certified."""
    return {
        **{field: row[field] for field in ("params", "accuracy", "bound", "steps")},
        "certified": float(row["exit"] == 0),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For each data set and accuracy: the sizes that can certify it, and the size that the search ended with."""
    lines, found, surely = [], [], 0
    for name in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == name]
        for run in dict.fromkeys(row["run"] for row in own if "sizes" in row):
            ended = {row["seed"]: row for row in own if row["run"] == run}
            alone = {seed: [row for row in own if row["seed"] == seed and "sizes" not in row] for seed in ended}
            outcomes = [_outcome(row, alone[seed], float(run.split()[1])) for seed, row in ended.items()]
            found += [outcome.how for outcome in outcomes]
            surely += sum(_as_small(outcome.certified, outcome.would) for outcome in outcomes)
            lines.append([
                name,
                run.removeprefix("search "),
                ", ".join(str(outcome.could or "none") for outcome in outcomes),
                ", ".join(str(outcome.would or "none") for outcome in outcomes),
                ", ".join(str(outcome.certified or f"none, {outcome.bound:.1%}") for outcome in outcomes),
                *(str(sum(outcome.how == how for outcome in outcomes)) for how in OUTCOMES),
                statistics.number(sum(row["steps"] for row in ended.values()) / len(ended), 0),
                statistics.number(sum(row["steps"] for each in alone.values() for row in each) / len(ended), 0),
            ])  # fmt: skip
    heads = [
        "data",
        "accuracy",
        "smallest alone",
        "smallest that would again",
        "search",
        *OUTCOMES,
        "steps",
        "steps alone",
    ]
    good = sum(how in OUTCOMES[:2] for how in found)
    return (
        statistics.markdown(heads, lines)
        + "\n\nNumbers of parameters, by seed: of the smallest student whose certificate proves the accuracy in a run alone; "
        "of the smallest that would also do so on another sealed split, with a probability of at least "
        f"{SEALED_PROBABILITY:g}; and of the student that the search certifies. For a search that ended with exit code 3, "
        f"the best bound. As small as any that certifies alone, or none where none does: {good} of {len(found)} searches. As "
        f"small as any that would certify again: {surely} of {len(found)}."
    )


class _Outcome(NamedTuple):
    """The result of one search, beside the runs alone of its seed."""

    could: int | None  # parameters of the smallest that certified alone
    would: int | None  # and of the smallest that would probably do so again
    certified: int | None  # parameters of the student that the search certified
    bound: float
    how: str


def _outcome(row: dict[str, Any], alone: Sequence[dict[str, Any]], aim: float) -> _Outcome:
    could = min((one["params"] for one in alone if one["bound"] >= aim), default=None)
    would = min((one["params"] for one in alone if again(one, aim) >= SEALED_PROBABILITY), default=None)
    certified = row["params"] if row["exit"] == 0 else None
    if certified is None:
        how = OUTCOMES[0] if could is None else OUTCOMES[3]
    elif could is None or certified < could:
        how = OUTCOMES[1]
    else:
        how = OUTCOMES[0] if certified == could else OUTCOMES[2]
    return _Outcome(could, would, certified, row["bound"], how)


def _as_small(certified: int | None, would: int | None) -> bool:
    return would is None if certified is None else would is None or certified <= would


def again(row: Mapping[str, Any], aim: float) -> float:
    """The probability that a student's certificate would prove the accuracy on another sealed split of the same size.

    Uses the normal approximation: a bound lies z standard errors below the accuracy, and the bound on another split differs
    from it by sqrt(2) standard errors.

    Args:
      row: a run alone.
      aim: the accuracy to prove.
    """
    se = (row["accuracy"] - row["bound"]) / stats.norm.isf(LEVEL)
    return float(stats.norm.cdf((row["bound"] - aim) / (2**0.5 * se)))
