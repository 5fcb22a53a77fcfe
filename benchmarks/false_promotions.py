"""How often does a run promote a candidate that is no better, and how soon does it find a better one? A simulation of the
rules.

A held-out example is right or wrong under a student; there are N = 1,024 of them on assess and as many on decide. A run has
200 iterations, each with one candidate (or eight). A promotion is false if the candidate is, in the population, no better
than the champion it replaces. Candidates:

- `equal`: as accurate as the champion (90 %), independent of it;
- `near-copies`: as accurate, and different on 6 % of the examples;
- `best of 8`: of eight near-copies, the one with the best accuracy on assess;
- `after gains`: near-copies, after five candidates that are truly 4 points better (from 70 %);
- `adapting`: coin flips on a problem of two classes; every second candidate is the weighted vote of all earlier ones, by
  whether they were accepted: what a search can learn about decide from the outcomes alone (after Blum and Hardt, arXiv
  1502.04585);
- `in stages`: near-copies in a search of ten stages. At the end of each, the search continues from the best student so far on
  decide, and pays for that answer from the error budget that all stages share.

Rules: `ev3` tests as a run does (assess predicts success, and the run's cost has grown by a half since the last test). `ev3,
always asking` tests in every iteration, the worst case that the guarantee must bear. `reference` is the rule of the public
EV3 code: two unpaired intervals of 1.96 standard errors that do not overlap, from the named number of draws with replacement.

Guards: promotions for a broken guard on the worst class, in a simulation of their own (`benchmarks/guard_promotions.py`):
four classes of 250 examples, ten tests a run; the champion is right on 70 % of one class and on 90 % of the others.
`new worst class` are candidates with 90 % on that class and 70 % on another one. `one class` tests the champion's worst class
alone; `every class` is the test of a run.

Power: candidates that are 2 points better and differ on 6 % (4 % won, 2 % lost), independent of each other.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.benchmarks import guard_promotions, statistics
from ev3_distill.config import EV3
from ev3_distill.core import adapt, paired_tests
from ev3_distill.runtime.compile import jit
from ev3_distill.types import ErrorBudget

KEY = ("seed", "question", "candidates", "rule")  # identifies a row
INTERVALS = (
    "A seed is a block of 400 simulated runs (4,000 trials for the power). Rates pool the blocks and have "
    "exact 95 % intervals (Clopper and Pearson)."
)
N = 1024  # examples in each of assess and decide
ITERATIONS = {"full": 200, "smoke": 20}
RUNS = {"full": 400, "smoke": 20}  # per row
TRIALS = {"full": 4000, "smoke": 100}  # per row about power
DELTA = EV3.delta
SLACK = 0.015  # the upper limit of a rate may exceed delta by this
TARGETS = {"first test": 0.45, "one of five": 0.7}
DRAWS = {"reference, 1,024 draws": 1024, "reference, 32,768 draws": 32768}
RULES = ("ev3", "ev3, always asking", *DRAWS)
CANDIDATES = ("equal", "near-copies", "best of 8", "after gains", "adapting", "in stages")
SIMULATED = {"full": (CANDIDATES, RULES), "smoke": (CANDIDATES[1:2], RULES[:3])}
GAINS, STAGES = 5, 10
_BETTER = "2 points better"
AFTER = tuple(
    (tests, promotions) for tests in (1, 2, 4) for promotions in (0, tests)
)  # error budgets whose power is measured


class Hits(NamedTuple):
    """Correctness of a student per example, in {0, 1}."""

    assess: jax.Array  # [N]
    decide: jax.Array  # [N]


class Run(NamedTuple):
    """A simulated run; scalars unless stated."""

    champion: Hits
    right: jax.Array  # the champion's accuracy in the population
    budget: ErrorBudget
    tested_cost: jax.Array
    best: Hits  # the best student so far on decide, at the ends of stages
    votes: jax.Array  # [2 N], votes of earlier candidates for and against
    false: jax.Array  # bool, whether a candidate that is no better was promoted
    waited: jax.Array  # int32, iterations up to and including the first promotion; all of them if there was none


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per seed, kind of candidates and rule: its false promotions, waits and power.

    Args:
      seeds: number of seeds from 0; each is a block of 400 runs and 4,000 trials.
      size: full, or smoke: a few short runs.
      done: keys of rows to skip.
    """
    for seed in range(seeds):
        for candidates, rule in itertools.product(*SIMULATED[size]):
            if (seed, "false", candidates, rule) in done:
                continue
            number = 1000 * seed + 10 * CANDIDATES.index(candidates) + RULES.index(rule)
            keys = jax.random.split(jax.random.key(number), RUNS[size])
            ended = _simulate(candidates, rule, ITERATIONS[size])(keys)
            yield _row(seed, "false", candidates, rule, count=int(ended.false.sum()), of=len(keys))
        for rule in SIMULATED[size][1]:
            if (seed, "wait", _BETTER, rule) not in done:
                keys = jax.random.split(jax.random.key(1000 * seed + 998), RUNS[size])
                ended = _simulate(_BETTER, rule, ITERATIONS[size])(keys)
                yield _row(seed, "wait", _BETTER, rule, count=int(ended.waited.sum()), of=len(keys))
        for candidates, rule in itertools.product(guard_promotions.CANDIDATES, guard_promotions.RULES):
            if (seed, "guard", candidates, rule) not in done:
                keys = jax.random.split(jax.random.key(1000 * seed + 997), RUNS[size])
                promoted = guard_promotions.simulate(candidates, rule)(keys)
                yield _row(seed, "guard", candidates, rule, count=int(promoted.sum()), of=len(keys))
        for question, rule, happened in _power(jax.random.key(1000 * seed + 999), TRIALS[size]):
            if (seed, "power", question, rule) not in done:
                yield _row(seed, "power", question, rule, count=int(happened.sum()), of=len(happened))


def _row(seed: int, question: str, candidates: str, rule: str, *, count: int, of: int) -> dict[str, Any]:
    return {"seed": seed, "question": question, "candidates": candidates, "rule": rule, "count": count, "of": of}


@functools.cache
def _simulate(candidates: str, rule: str, iterations: int) -> Callable[[jax.Array], Run]:
    """Keys [R] -> the final states of R runs."""

    def iterate(run: Run, step: tuple[jax.Array, jax.Array]) -> tuple[Run, None]:
        t, key = step
        candidate_key, test_key = jax.random.split(key)
        candidate, right = _candidate(candidate_key, candidates, run, t)
        cost = 100 * (t + 1)
        closing = (t == iterations - 1) & (candidates != "in stages")
        tested, promoted = _test(test_key, rule, candidate, run, cost=cost, closing=closing)
        signed = jnp.concatenate(candidate) * 2 - 1
        champion = jax.tree.map(functools.partial(jnp.where, promoted), candidate, run.champion)
        budget, best = adapt.spend(run.budget, closing, tested, promoted), run.best
        if candidates == "in stages":
            ends = (t + 1) % (iterations // STAGES) == 0
            better = ends & (champion.decide.sum() > best.decide.sum())
            best = jax.tree.map(functools.partial(jnp.where, better), champion, best)
            champion = jax.tree.map(functools.partial(jnp.where, ends), best, champion)
            budget = jax.tree.map(functools.partial(jnp.where, ends), adapt.divide(budget, 2), budget)
        return Run(
            champion=champion,
            right=jnp.where(promoted, right, run.right),
            budget=budget,
            tested_cost=jnp.where(tested, cost, run.tested_cost),
            best=best,
            votes=run.votes + jnp.where(promoted, 1.0, -0.01 * tested) * signed,
            false=run.false | (promoted & (right <= run.right)),
            waited=run.waited + (run.budget.promotions == 0),
        ), None

    def one(key: jax.Array) -> Run:
        first, rest = jax.random.split(key)
        run = _initial_run(first, {"adapting": 0.5, "after gains": 0.7}.get(candidates, 0.9))
        steps = (jnp.arange(iterations), jax.random.split(rest, iterations))
        return jax.lax.scan(iterate, run, steps)[0]

    runs: Callable[[jax.Array], Run] = jit(lambda keys: jax.lax.map(one, keys, batch_size=50))
    return runs


def _initial_run(key: jax.Array, right: float) -> Run:
    champion = Hits(*jax.random.bernoulli(key, right, (2, N)).astype(jnp.float32))
    zero = jnp.int32(0)
    budget, votes = adapt.initial_budget(DELTA), jnp.zeros(2 * N)
    return Run(champion, jnp.float32(right), budget, zero, champion, votes, jnp.bool_(False), zero)


def _candidate(key: jax.Array, candidates: str, run: Run, t: jax.Array) -> tuple[Hits, jax.Array]:
    """A candidate and its accuracy in the population."""
    if candidates == "equal":
        return Hits(*jax.random.bernoulli(key, run.right, (2, N)).astype(jnp.float32)), run.right
    if candidates == _BETTER:
        return _changed(key, run, 0.04, 0.02), run.right + 0.02
    if candidates in ("near-copies", "in stages"):
        return _changed(key, run, 0.03, 0.03), run.right
    if candidates == "best of 8":
        eight = jax.vmap(lambda k: _changed(k, run, 0.03, 0.03))(jax.random.split(key, 8))
        best = jnp.argmax(eight.assess.sum(axis=1))
        return Hits(eight.assess[best], eight.decide[best]), run.right
    if candidates == "after gains":
        gaining = t < GAINS
        gain = jnp.where(gaining, 0.04, 0.0)
        return _changed(key, run, 0.03 + gain / 2, 0.03 - gain / 2), run.right + gain
    probe = jax.random.bernoulli(key, 0.5, (2 * N,)).astype(jnp.float32)
    vote = jnp.where(run.votes == 0, probe, run.votes > 0).astype(jnp.float32)
    return Hits(*jnp.split(jnp.where(t % 2 == 1, vote, probe), 2)), run.right


def _changed(key: jax.Array, run: Run, won: Any, lost: Any) -> Hits:
    """A student that wins a share `won` of all examples from the champion and loses a share `lost`."""
    u = jax.random.uniform(key, (2, N))
    now = [
        jnp.where(hits > 0.5, u_ >= lost / run.right, u_ < won / (1 - run.right)).astype(jnp.float32)
        for hits, u_ in zip(run.champion, u, strict=True)
    ]
    return Hits(*now)


def _test(
    key: jax.Array, rule: str, candidate: Hits, run: Run, *, cost: jax.Array, closing: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether the candidate was tested on decide, and whether it was promoted."""
    if rule in DRAWS:
        n = DRAWS[rule]
        ours, theirs = candidate.decide > 0.5, run.champion.decide > 0.5
        shares = jnp.stack([ours & theirs, ours & ~theirs, theirs & ~ours, ~ours & ~theirs]).mean(axis=1)
        both, won, lost, _ = jax.random.multinomial(key, n, shares)  # both students see the same draws
        accuracy = jnp.stack([both + won, both + lost]) / n
        half = 1.96 * jnp.sqrt(accuracy * (1 - accuracy) / n)
        return jnp.bool_(True), accuracy[0] - half[0] > accuracy[1] + half[1]
    alpha = adapt.level(run.budget, closing)
    tested = jnp.bool_(True)
    if rule == "ev3":
        p_assess = paired_tests.mcnemar(candidate.assess, run.champion.assess)[2]
        tested = adapt.due(cost, run.tested_cost, closing) & adapt.worth_testing(p_assess, alpha, closing)
    return tested, tested & (paired_tests.mcnemar(candidate.decide, run.champion.decide)[2] <= alpha)


def _power(key: jax.Array, trials: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """(question, rule, whether it happened [trials])."""
    five = np.asarray(_p_values(jax.random.split(key, 5 * trials))).reshape(trials, 5)
    levels = np.array([_level(tests, 0) for tests in range(5)])
    yield "first test", "ev3", np.asarray(five[:, 0] <= levels[0])
    yield "one of five", "ev3", np.asarray((five <= levels).any(axis=1))
    for tests, promotions in AFTER:
        yield (
            f"test {tests + 1}, {promotions} promoted before",
            "ev3",
            np.asarray(five[:, 0] <= _level(tests, promotions)),
        )
    for rule in DRAWS:
        promoted = np.asarray(_promotes(rule)(jax.random.split(jax.random.fold_in(key, 1), trials)))
        yield "first test", rule, promoted


def _level(tests: int, promotions: int) -> float:
    """The level of the next test in a run."""
    budget = adapt.initial_budget(DELTA)
    for i in range(tests):
        budget = adapt.spend(budget, jnp.bool_(False), jnp.bool_(True), jnp.bool_(i < promotions))
    return float(adapt.level(budget, jnp.bool_(False)))


def _pair(key: jax.Array) -> tuple[Run, Hits]:
    """A champion and a candidate that is two points better."""
    first, second = jax.random.split(key)
    run = _initial_run(first, 0.9)
    return run, _changed(second, run, 0.04, 0.02)


@jit
def _p_values(keys: jax.Array) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        run, candidate = _pair(key)
        return paired_tests.mcnemar(candidate.decide, run.champion.decide)[2]

    return jax.lax.map(one, keys, batch_size=500)


@functools.cache
def _promotes(rule: str) -> Callable[[jax.Array], jax.Array]:
    def one(key: jax.Array) -> jax.Array:
        pair_key, test_key = jax.random.split(key)
        run, candidate = _pair(pair_key)
        return _test(test_key, rule, candidate, run, cost=jnp.int32(100), closing=jnp.bool_(False))[1]

    return jit(lambda keys: jax.lax.map(one, keys, batch_size=500))


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's rate; for a wait, the iterations up to a promotion."""
    return {"iterations" if row["question"] == "wait" else "share": row["count"] / row["of"]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rates of runs with a false promotion, and the power, with exact 95 % intervals."""
    totals: dict[str, dict[tuple[str, str], list[int]]] = {"false": {}, "power": {}, "wait": {}, "guard": {}}
    for row in rows:
        total = totals[row["question"]].setdefault((row["candidates"], row["rule"]), [0, 0])
        total[0], total[1] = total[0] + row["count"], total[1] + row["of"]
    false, power, guard = (
        {name: statistics.proportion(*total) for name, total in totals[of].items()}
        for of in ("false", "power", "guard")
    )
    rules = [rule for rule in RULES if any(rule == name[1] for name in false)]
    ours = [rate for (_, rule), rate in false.items() if rule not in DRAWS]
    worst = max(ours, key=lambda rate: rate.high)
    sound = all(rate.center <= DELTA and rate.high <= DELTA + SLACK for rate in ours)
    waits = {rule: count / of for (_, rule), (count, of) in totals["wait"].items()}
    power_lines = [
        ["iterations up to a promotion, mean", *[f"{waits[rule]:.1f}" for rule in rules]],
        *[
            [
                question,
                *[statistics.percent(power[question, rule], 1) if (question, rule) in power else "" for rule in rules],
            ]
            for question in dict.fromkeys(question for question, _ in power)
        ],
    ]
    verdicts = [
        f"{question}: target ≥ {100 * target:g} %: {statistics.verdict(power[question, 'ev3'], target)}"
        for question, target in TARGETS.items()
    ]
    kinds = dict.fromkeys(candidates for candidates, _ in false)
    rates = [[kind, *[statistics.percent(false[kind, rule], 1) for rule in rules]] for kind in kinds]
    return "\n\n".join(
        [
            f"Runs with a false promotion, % (exact 95 % interval), {worst.n:,} runs each:",
            statistics.markdown(["candidates", *rules], rates),
            f"The worst rate of `ev3`: {statistics.percent(worst, 1)}; target ≤ {100 * DELTA:g} %, with an upper limit of "
            f"at most {100 * (DELTA + SLACK):g} %: {'held' if sound else 'missed'}.",
            *_guard_lines(guard),
            "Candidates 2 points better (4 % won, 2 % lost), a new one in each iteration: the wait for a promotion, and the "
            "probability, in %, that a test promotes one:",
            statistics.markdown(["test", *rules], power_lines),
            "; ".join(verdicts) + ".",
        ]
    )


def _guard_lines(guard: Mapping[tuple[str, str], statistics.Interval]) -> list[str]:
    """The table of promotions for a broken guard; nothing in results of older versions."""
    if not guard:
        return []
    rates = [
        [kind, *[statistics.percent(guard[kind, rule], 1) for rule in guard_promotions.RULES]]
        for kind in guard_promotions.CANDIDATES
    ]
    ours = [guard[kind, guard_promotions.RULES[0]] for kind in guard_promotions.CANDIDATES[:2]]
    sound = all(rate.center <= DELTA and rate.high <= DELTA + SLACK for rate in ours)
    return [
        "Runs with a promotion for a broken guard on the worst class, %; only `better` is truly better:",
        statistics.markdown(["candidates", *guard_promotions.RULES], rates),
        f"Target ≤ {100 * DELTA:g} % for the first two: {'held' if sound else 'missed'}.",
    ]
