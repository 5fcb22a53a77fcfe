"""Is what the certificate claims true as often as promised, on real training? And what if the best validation score is
promised?

Only the assignment of examples is simulated. Each run trains a student on MNIST by EV3, as `compress` does, and is certified.
All 70,000 images of MNIST, train and test images alike, are one population:

- 5,000 train the teacher, an mlp:hidden=256-256 and the same for all runs, by their labels alone. No run sees them again;
- every run assigns the other 65,000 anew, uniformly and not class by class: 1,000 to explore, 500 to assess, 500 to decide,
  500 sealed. The remaining 62,500 give the truth. The run's seed also draws one of three students, one of four portfolios of
  arms, a budget from 100 to 1,500 steps (half of them below 387), and the initial parameters.

The sealed examples certify the delivered student, at a confidence of 95 % for four claims together. The truth of a claim is
the same figure on the 62,500. Its own uncertainty is small: its standard error is an eleventh of that on the sealed split (at
90 % accuracy 0.12 points and 1.34), which widens the difference of the two by 0.4 % and raises the chance that one
Clopper-Pearson bound fails from 1.25 % to about 1.28 %. Runs share the population, but each is assigned and trained by
itself: given the population and the teacher, they are independent.

Columns of the table:

- held: the share of runs in which a promise was true; for `all claims together`, the runs in which all four were;
- beyond the truth: by how much a promise is better than the truth, in points, the mean over runs and the largest. Above 0 is
  a false promise, below 0 the price of a true one. (A lower bound minus the truth; for a drop, the truth minus its bound.)

Beside the certificate stand the promises that are often made instead, all about accuracy:

- `best validation score`: of all students of the run, one per iteration, the one that is best on assess (the first of
  equals), and its accuracy on assess. Assess has selected it and has steered the run;
- `best validation score, bounded`: the same student, and the 95 % Clopper-Pearson bound of that score, as if assess had not
  selected anything;
- `sealed score`: the delivered student's accuracy on the sealed examples, without a bound: unbiased, and too high in half of
  all runs.

Three rows are about `latency_ms`, on simulated times of passes: the bound of one measurement, the lowest of ten that are
recorded and corrected as reopenings, and the lowest of ten without correction. Their differences are in percent of the true
median. They are not among the four claims.

Two rows are about near-copies: 200 simulated patients with 10 images each, whose labels are coins, and a student that knows the
patients of explore by heart. Its accuracy on new patients is 50 %. It is promised from splits by examples, and from splits by
groups (`--split-by groups`), where bounds count patients.

The second table is about a student of the prior: the labels of 2,000 examples are noise, and the student predicts the most
common class of explore. Its accuracy is 1 / classes. A promise is false if the bound is higher, a promotion if decide proves
that this class is a better prediction than the rarest. Splits are dealt as runs deal them, and with strata that all four splits
share.

The small size has digits instead of MNIST: 400 examples for the teacher, 400 for explore, 150 for each other split, and the
remaining 547 for the truth, which are too few. Its figures mean nothing.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.arms import DEFAULT, arms_named
from ev3_distill.benchmarks import datasets, statistics
from ev3_distill.benchmarks.latency_coverage import latency_claims
from ev3_distill.benchmarks.split_coverage import near_copies, prior_splits
from ev3_distill.certify import clopper_pearson_lower, make_certificate
from ev3_distill.config import EV3
from ev3_distill.core.assess import outputs_of
from ev3_distill.data.batches import held_out, resident
from ev3_distill.data.sources import load_data
from ev3_distill.runtime.compile import jit
from ev3_distill.tasks.outputs import Outputs, bounds_of
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Network, Pools, Variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = ("seed", "run")  # identifies a row
REPEATS = KEY  # every run has its own splits
REPETITION = "run"
INTERVALS = (
    "Shares of runs have exact 95 % intervals (Clopper and Pearson); differences in points have 95 % t "
    "intervals over runs."
)
RUNS = {"full": 50, "smoke": 3}  # per seed; ten seeds, the default, are 500 runs
SPLIT_SIZES = {
    "full": {"explore": 1000, "assess": 500, "decide": 500, "sealed": 500},
    "smoke": {"explore": 400, "assess": 150, "decide": 150, "sealed": 150},
}
STUDENTS = {"full": ("mlp:hidden=8", "mlp:hidden=32", "mlp:hidden=16-16"), "smoke": ("mlp:hidden=8",)}
ARMS = {"full": (("ce",), ("dkd", "mse"), ("kd2-muon", "kd4-muon"), DEFAULT), "smoke": (("ce", "kd4"),)}
BUDGETS = {"full": (100, 1500), "smoke": (60, 150)}  # steps, minimum and maximum
TEACHER = "mlp:hidden=256-256"
TEACHER_TRAINING = {"full": (5000, 1500), "smoke": (400, 200)}  # examples and steps
TEACHER_SEED = 0
CONFIDENCE = 0.95
CLAIMS = ("accuracy", "agreement", "worst_class_accuracy", "drop(accuracy)")
TOGETHER = "all claims together"
DEALT = ("wrong", "promoted", "jointly_wrong", "jointly_promoted")  # fields of `split_coverage.prior_splits`
LEAST = 0.92  # required lower limit of their joint coverage


class Population(NamedTuple):
    """The M examples that all runs share, with the teacher's logits."""

    inputs: np.ndarray  # [M, ...]
    labels: np.ndarray  # [M]
    teacher: np.ndarray  # [M, K] logits


class Predictions(NamedTuple):
    """Logits of a student and its teacher on N examples."""

    student: np.ndarray  # [N, K] logits
    teacher: np.ndarray  # [N, K] logits
    labels: np.ndarray  # [N]


class Finished(NamedTuple):
    """A finished run."""

    which: str  # the delivered student, 'champion' or 'current'
    delivered: Variables
    iterations: int
    best: Variables  # the most accurate student on assess of all iterations, the first of equals
    best_right: int  # number of assess examples that it gets right


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per run: its promises and the truth.

    Args:
      seeds: number of seeds from 0; each is a block of 50 runs.
      size: full, or smoke: three short runs on digits per seed.
      done: keys of rows to skip.

    Raises:
      InputError: full, and MNIST is missing.
    """
    missing = [key for key in itertools.product(range(seeds), range(RUNS[size])) if key not in done]
    if not missing:
        return
    population = _population(size)
    everything = jnp.asarray(population.inputs)
    for seed, run in missing:
        yield {"seed": seed, "run": run, **_row(population, everything, size, np.random.default_rng([seed, run]))}


def deal(count: int, sizes: Mapping[str, int], rest: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Assigns `count` rows at random: to each name its size, and the others to `rest`."""
    hands = np.split(rng.permutation(count), np.cumsum(list(sizes.values())))
    return dict(zip([*sizes, rest], hands, strict=True))


@functools.cache
def _population(size: str) -> Population:
    """Trains the teacher; returns the population without its training examples."""
    source = datasets.required_source("digits" if size == "smoke" else "mnist")
    dataset, (teacher_examples, steps) = load_data(source), TEACHER_TRAINING[size]
    rng = np.random.default_rng(TEACHER_SEED)
    own, others = deal(len(dataset.labels), {"own": teacher_examples}, "others", rng).values()
    inputs = np.asarray(dataset.inputs)
    network = students.from_name(TEACHER, inputs.shape[1:], dataset.num_classes)
    training = Population(
        inputs[own], dataset.labels[own], np.zeros((teacher_examples, dataset.num_classes), np.float32)
    )
    dealt = deal(teacher_examples, {"assess": teacher_examples // 10, "decide": teacher_examples // 10}, "explore", rng)
    distillation = Distillation(network, arms_named(network.apply, ("ce-slow",)))
    teacher = distillation.complete(_pools(training, dealt, TEACHER_SEED), TEACHER_SEED, budget=steps).current.variables
    return Population(inputs[others], dataset.labels[others], forward(network, teacher)(inputs[others]))


def _pools(population: Population, dealt: Mapping[str, np.ndarray], seed: int) -> Pools:
    def hand(name: str) -> tuple[Any, ...]:
        rows = dealt[name]
        return population.inputs[rows], population.labels[rows], rows, {"logits": population.teacher[rows]}

    inputs, labels, rows, teacher = hand("explore")
    explore = resident(inputs, labels, rows, {"logits": teacher["logits"][None]}, seed=seed)
    return Pools(explore, held_out(*hand("assess")), held_out(*hand("decide")))


def _row(population: Population, everything: jax.Array, size: str, rng: np.random.Generator) -> dict[str, Any]:
    """The measurements of one run."""
    student = STUDENTS[size][rng.integers(len(STUDENTS[size]))]
    arms = ARMS[size][rng.integers(len(ARMS[size]))]
    budget = round(float(np.exp(rng.uniform(*np.log(BUDGETS[size])))))
    own = int(rng.integers(2**31))
    dealt = deal(len(population.labels), SPLIT_SIZES[size], "truth", rng)
    shape, classes = population.inputs.shape[1:], population.teacher.shape[1]
    finished = _train(_distillation(student, arms, shape, classes), _pools(population, dealt, own), own, budget)

    def predictions(variables: Variables) -> tuple[Predictions, Predictions]:
        logits = np.asarray(_network(student, shape, classes)[1](variables, everything))
        whole = Predictions(logits, population.teacher, population.labels)
        return Predictions(*(x[dealt["sealed"]] for x in whole)), Predictions(*(x[dealt["truth"]] for x in whole))

    claims = promised(*predictions(finished.delivered))
    best_truth = _truth(predictions(finished.best)[1])["accuracy"]
    latency = latency_claims(np.random.default_rng([own, 1]), confidence=CONFIDENCE)
    simulated = np.random.default_rng([own, 2])
    return {
        "student": student, "arms": list(arms), "budget": budget, "iterations": finished.iterations, "which": finished.which,
        "sealed": len(dealt["sealed"]), "truth": len(dealt["truth"]), "claims": claims,
        "instead": instead(finished.best_right, len(dealt["assess"]), best_truth, claims[0]), "latency": latency,
        "copies": near_copies(simulated, confidence=CONFIDENCE), "dealt": prior_splits(simulated, confidence=CONFIDENCE),
    }  # fmt: skip


@functools.cache
def _network(student: str, shape: tuple[int, ...], classes: int) -> tuple[Network, Callable[..., jax.Array]]:
    """A student, and a function (variables, inputs [M, ...]) -> logits [M, K]."""
    network = students.from_name(student, shape, classes)
    size = EV3().eval_batch_size
    return network, jit(lambda variables, inputs: outputs_of(network.apply, variables, inputs, batch_size=size))


@functools.cache
def _distillation(student: str, arms: tuple[str, ...], shape: tuple[int, ...], classes: int) -> Distillation:
    """A distillation that is compiled once for all runs of a setting."""
    network = _network(student, shape, classes)[0]
    return Distillation(network, arms_named(network.apply, arms))


def _train(distillation: Distillation, pools: Pools, seed: int, budget: int) -> Finished:
    n, initial = len(pools.assess.index), distillation.begin(pools, seed)
    best, best_right = initial.current.variables, -1
    for state, decision in distillation.run(pools, initial, budget=budget):
        right = round(float(decision.current_score) * n)
        if right > best_right:
            best, best_right = state.current.variables, right
    which, delivered = distillation.evaluator.select(pools, state)
    return Finished(which, delivered, int(state.clock.iteration), best, best_right)


def promised(sealed: Predictions, truth: Predictions) -> list[dict[str, Any]]:
    """The certificate's claims from sealed examples, each with its `truth` on the others."""
    true = _truth(truth)
    return [claim | {"truth": true[claim["metric"]]} for claim in _certified(sealed)]


def instead(best_right: int, assessed: int, best_truth: float, accuracy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The promises that are often made instead of a certificate; see the module.

    Args:
      best_right: number of assess examples that the best student on assess gets right.
      assessed: number of assess examples.
      best_truth: that student's true accuracy.
      accuracy: the certificate's accuracy claim for the delivered student.
    """
    bound = clopper_pearson_lower(best_right, assessed, confidence=CONFIDENCE)
    return [
        {"metric": "best validation score", "lower_bound": best_right / assessed, "truth": best_truth},
        {"metric": "best validation score, bounded", "lower_bound": bound, "truth": best_truth},
        {"metric": "sealed score", "lower_bound": accuracy["point"], "truth": accuracy["truth"]},
    ]


def _certified(sealed: Predictions) -> list[dict[str, Any]]:
    """The certificate's claims: metric, point, and lower_bound or upper_bound. The only call of the certificate."""
    outputs = Outputs(sealed.student, sealed.labels, {"logits": sealed.teacher})
    certified = make_certificate(bounds_of(CLAIMS, outputs), confidence=CONFIDENCE)
    claims: list[dict[str, Any]] = certified.as_dict()["claims"]
    return claims


def _truth(predictions: Predictions) -> dict[str, float]:
    """The true value of each metric, computed independently of the certificate's code."""
    predicted, teacher_predicted = predictions.student.argmax(axis=1), predictions.teacher.argmax(axis=1)
    right = predicted == predictions.labels
    return {
        "accuracy": float(right.mean()),
        "agreement": float((predicted == teacher_predicted).mean()),
        "worst_class_accuracy": min(
            float(right[predictions.labels == k].mean()) for k in np.unique(predictions.labels)
        ),
        "drop(accuracy)": float((teacher_predicted == predictions.labels).mean() - right.mean()),
    }


def beyond(claim: Mapping[str, Any]) -> float:
    """By how much a claim is better than the truth; it holds if this is at most 0."""
    lower, upper, truth = claim.get("lower_bound"), claim.get("upper_bound"), claim["truth"]
    return max(([] if lower is None else [lower - truth]) + ([] if upper is None else [truth - upper]))


def plot(rows: Sequence[dict[str, Any]]) -> "Figure":
    """The distribution over runs of promised accuracy minus true accuracy, for each promise."""
    from matplotlib.figure import Figure

    found: dict[str, list[float]] = {}
    for row in rows:
        certified = [claim for claim in row["claims"] if claim["metric"] == "accuracy"]
        for claim in (*certified, *row["instead"]):
            found.setdefault(claim["metric"], []).append(100 * beyond(claim))
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for metric, values in found.items():
        name = "the certificate" if metric in CLAIMS else metric
        axes.ecdf(values, label=f"{name}: true in {100 * np.mean(np.array(values) <= 0):.0f} %")
    axes.axvspan(0, max(map(max, found.values())), color="0.93", zorder=0)
    axes.axhline(CONFIDENCE, color="0.5", lw=0.8, ls=":")
    axes.set(xlabel="promised minus true accuracy, points (shaded: false)", ylabel="share of runs", ylim=(0, 1))
    axes.legend(fontsize="small", frameon=False, loc="lower right")
    return figure


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """By how much each promise of a row goes beyond the truth."""
    return {f"{claim['metric']}, beyond the truth": beyond(claim) for claim in _promises(row)}


def _promises(row: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    return (*row["claims"], *row["instead"], *row.get("latency", ()), *row.get("copies", ()))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """How often each promise held, with exact 95 % intervals, and how far it went beyond the truth."""
    found: dict[str, list[float]] = {}  # by promise, beyond the truth in points, a value per run
    for row in rows:
        for claim in _promises(row):
            found.setdefault(claim["metric"], []).append(100 * beyond(claim))
    held = {metric: statistics.proportion(sum(x <= 0 for x in values), len(values)) for metric, values in found.items()}
    sound = sum(all(beyond(claim) <= 0 for claim in row["claims"]) for row in rows)
    together = statistics.proportion(sound, len(rows))
    lines = {metric: _line(metric, held[metric], values) for metric, values in found.items()}
    certified = [claim["metric"] for claim in rows[0]["claims"]]
    body = [
        *[lines[metric] for metric in certified],
        [TOGETHER, statistics.percent(together, 1), "", ""],
        *[lines[metric] for metric in lines if metric not in certified],
    ]
    true = [100 * claim["truth"] for row in rows for claim in row["claims"] if claim["metric"] == "accuracy"]
    return "\n\n".join(
        [
            f"Of {len(rows):,} runs, each certified on {rows[0]['sealed']:,} examples, with the truth on {rows[0]['truth']:,} "
            f"others (accuracies from {min(true):.1f} to {max(true):.1f} %):",
            statistics.markdown(
                ["promise", "held, % (exact 95 % interval)", "beyond the truth, points (95 % t interval)", "largest"],
                body,
            ),
            f"{TOGETHER.capitalize()}: target ≥ {100 * CONFIDENCE:g} % of runs, with a lower limit of at least "
            f"{100 * LEAST:g} %: {verdict(together)}.",
            *_table_of_dealing(rows),
        ]
    )


def _table_of_dealing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How often a student of the prior is promised too much, by classes and share of the test split."""
    settings: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for part in itertools.chain.from_iterable(row.get("dealt", ()) for row in rows):
        settings.setdefault((part["classes"], part["share"]), []).append(part)
    if not settings:
        return []
    body = []
    for (classes, share), parts in settings.items():
        runs = sum(part["runs"] for part in parts)
        rates = [statistics.proportion(sum(part[name] for part in parts), runs) for name in DEALT]
        body.append([str(classes), f"{share:g}", *(statistics.percent(rate, 2) for rate in rates)])
    return [
        f"A student of the prior, {runs:,} splits a row. False promises and false promotions, in % of splits; 5 % are allowed:",
        statistics.markdown(
            ["classes", "`--test`", "promises", "promotions", "promises, joint strata", "promotions, joint strata"],
            body,
        ),
    ]


def verdict(together: statistics.Interval) -> str:
    """Whether the claims hold together as often as promised."""
    return "missed" if together.center < CONFIDENCE else statistics.verdict(together, LEAST)


def _line(metric: str, held: statistics.Interval, values: Sequence[float]) -> list[str]:
    name = f"`{metric}`" if metric in CLAIMS else metric
    mean = statistics.plus_minus(statistics.mean(values), 2)
    return [name, statistics.percent(held, 1), mean, statistics.number(max(values), 2)]
