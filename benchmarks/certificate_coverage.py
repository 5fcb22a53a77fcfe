"""Is what the certificate claims true as often as it says, on real training? And what if the best validation score is promised?

Nothing is simulated but the dealing: each run trains a student on MNIST by EV3, as `compress` does, and is certified. All of
MNIST's 70,000 images, its train and its test images alike, are one population:

- 5,000 train the teacher, an mlp:hidden=256-256 and the same for all runs, by their labels alone; no run meets them again;
- every run deals the other 65,000 anew, each as likely as any other, not class by class: 1,000 for explore, 500 for assess,
  500 for decide, 500 sealed; the remaining 62,500 tell the truth. Its seed also draws one of three students, one of four
  portfolios of arms, a budget from 100 to 1,500 steps (as likely to lie below 387 as above), and the initial parameters.

The sealed examples certify the student that the run delivers, at a confidence of 95 % for four claims together. The truth of
a claim is the same figure on the 62,500. What they leave uncertain is little: their standard error is an eleventh of the sealed
split's (at 90 % accuracy 0.12 points and 1.34), which widens the difference of the two by 0.4 % and takes the chance of one
Clopper-Pearson bound to fail from 1.25 % to about 1.28 %. Runs share the population, but each deals and trains by itself:
given the population and the teacher, they are independent.

Columns of the table:

- held: the share of runs in which a promise was true; for `all claims together`, the runs in which all four were;
- beyond the truth: by how much a promise is better than what is true, in points, its mean over runs and its greatest: above
  0 is a false promise, below 0 the price of a true one. (A lower bound less the truth; of a drop, the truth less its bound.)

Beside the certificate stand the promises that are often made instead, all of accuracy:

- `best validation score`: of all students that the run went on to, one per iteration, the one that is best on assess (the
  first of equals), and its accuracy on assess; assess has chosen it, and has led the run there;
- `best validation score, bounded`: that student, and Clopper and Pearson's 95 % bound of that score, as if assess had chosen
  nothing;
- `sealed score`: of the delivered student on the sealed examples, without a bound: honest, and too high in half of all runs.

The small size has digits in the place of MNIST: 400 examples for the teacher, 400 for explore, 150 for each other split, and
the remaining 547 for the truth, which are too few to tell it. It proves nothing.
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
RUNS = {"full": 50, "smoke": 3}  # of a seed: ten seeds, as by default, are 500 runs
DEALT = {
    "full": {"explore": 1000, "assess": 500, "decide": 500, "sealed": 500},
    "smoke": {"explore": 400, "assess": 150, "decide": 150, "sealed": 150},
}
STUDENTS = {"full": ("mlp:hidden=8", "mlp:hidden=32", "mlp:hidden=16-16"), "smoke": ("mlp:hidden=8",)}
ARMS = {"full": (("ce",), ("dkd", "mse"), ("kd2-muon", "kd4-muon"), DEFAULT), "smoke": (("ce", "kd4"),)}
BUDGETS = {"full": (100, 1500), "smoke": (60, 150)}  # steps, least and most
TEACHER = "mlp:hidden=256-256"
TAUGHT = {"full": (5000, 1500), "smoke": (400, 200)}  # examples of the teacher's training, and its steps
TEACHER_SEED = 0
CONFIDENCE = 0.95
CLAIMS = ("accuracy", "agreement", "worst_class_accuracy", "drop(accuracy)")
TOGETHER = "all claims together"
LEAST = 0.92  # that the lower limit of their coverage must reach


class Ground(NamedTuple):
    """What runs share: M examples, and what the teacher says of them."""

    inputs: np.ndarray  # [M, ...]
    labels: np.ndarray  # [M]
    teacher: np.ndarray  # [M, K] logits


class Answers(NamedTuple):
    """What a student and its teacher say of N examples."""

    student: np.ndarray  # [N, K] logits
    teacher: np.ndarray  # [N, K] logits
    labels: np.ndarray  # [N]


class Ended(NamedTuple):
    """A run that is over."""

    which: str  # what is delivered, 'champion' or 'current'
    delivered: Variables
    iterations: int
    best: Variables  # of all that the run went on to, by accuracy on assess, the first of equals
    best_right: int  # examples of assess that it gets right


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per run: what was promised, and what is true.

    Args:
      seeds: from 0; each is 50 runs of its own.
      size: full, or smoke: three short runs on digits per seed.
      done: keys of rows to skip.

    Raises:
      InputError: full, and MNIST is not there.
    """
    missing = [key for key in itertools.product(range(seeds), range(RUNS[size])) if key not in done]
    if not missing:
        return
    ground = _ground(size)
    everything = jnp.asarray(ground.inputs)
    for seed, run in missing:
        yield {"seed": seed, "run": run, **_row(ground, everything, size, np.random.default_rng([seed, run]))}


def deal(count: int, sizes: Mapping[str, int], rest: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Deals `count` rows at random: to each name as many as it is due, the others to `rest`."""
    hands = np.split(rng.permutation(count), np.cumsum(list(sizes.values())))
    return dict(zip([*sizes, rest], hands, strict=True))


@functools.cache
def _ground(size: str) -> Ground:
    """The population without the examples of the teacher, which is trained here."""
    source = datasets.required_source("digits" if size == "smoke" else "mnist")
    dataset, (taught, steps) = load_data(source), TAUGHT[size]
    rng = np.random.default_rng(TEACHER_SEED)
    own, others = deal(len(dataset.labels), {"own": taught}, "others", rng).values()
    inputs = np.asarray(dataset.inputs)
    network = students.from_name(TEACHER, inputs.shape[1:], dataset.num_classes)
    school = Ground(inputs[own], dataset.labels[own], np.zeros((taught, dataset.num_classes), np.float32))
    dealt = deal(taught, {"assess": taught // 10, "decide": taught // 10}, "explore", rng)
    distillation = Distillation(network, arms_named(network.apply, ("ce-slow",)))
    teacher = distillation.complete(_pools(school, dealt, TEACHER_SEED), TEACHER_SEED, budget=steps).current.variables
    return Ground(inputs[others], dataset.labels[others], forward(network, teacher)(inputs[others]))


def _pools(ground: Ground, dealt: Mapping[str, np.ndarray], seed: int) -> Pools:
    def hand(name: str) -> tuple[Any, ...]:
        rows = dealt[name]
        return ground.inputs[rows], ground.labels[rows], rows, {"logits": ground.teacher[rows]}

    inputs, labels, rows, teacher = hand("explore")
    explore = resident(inputs, labels, rows, {"logits": teacher["logits"][None]}, seed=seed)
    return Pools(explore, held_out(*hand("assess")), held_out(*hand("decide")))


def _row(ground: Ground, everything: jax.Array, size: str, rng: np.random.Generator) -> dict[str, Any]:
    """One run, all but its key."""
    student = STUDENTS[size][rng.integers(len(STUDENTS[size]))]
    arms = ARMS[size][rng.integers(len(ARMS[size]))]
    budget = round(float(np.exp(rng.uniform(*np.log(BUDGETS[size])))))
    own = int(rng.integers(2**31))
    dealt = deal(len(ground.labels), DEALT[size], "truth", rng)
    shape, classes = ground.inputs.shape[1:], ground.teacher.shape[1]
    ended = _train(_distillation(student, arms, shape, classes), _pools(ground, dealt, own), own, budget)

    def answers(variables: Variables) -> tuple[Answers, Answers]:
        logits = np.asarray(_network(student, shape, classes)[1](variables, everything))
        whole = Answers(logits, ground.teacher, ground.labels)
        return Answers(*(x[dealt["sealed"]] for x in whole)), Answers(*(x[dealt["truth"]] for x in whole))

    claims = promised(*answers(ended.delivered))
    best_truth = _truth(answers(ended.best)[1])["accuracy"]
    return {
        "student": student, "arms": list(arms), "budget": budget, "iterations": ended.iterations, "which": ended.which,
        "sealed": len(dealt["sealed"]), "truth": len(dealt["truth"]), "claims": claims,
        "instead": instead(ended.best_right, len(dealt["assess"]), best_truth, claims[0]),
    }  # fmt: skip


@functools.cache
def _network(student: str, shape: tuple[int, ...], classes: int) -> tuple[Network, Callable[..., jax.Array]]:
    """A student, and (variables, inputs [M, ...]) -> its logits [M, K]."""
    network = students.from_name(student, shape, classes)
    size = EV3().eval_batch_size
    return network, jit(lambda variables, inputs: outputs_of(network.apply, variables, inputs, batch_size=size))


@functools.cache
def _distillation(student: str, arms: tuple[str, ...], shape: tuple[int, ...], classes: int) -> Distillation:
    """Compiled once for all runs of one setting."""
    network = _network(student, shape, classes)[0]
    return Distillation(network, arms_named(network.apply, arms))


def _train(distillation: Distillation, pools: Pools, seed: int, budget: int) -> Ended:
    n, begun = len(pools.assess.index), distillation.begin(pools, seed)
    best, best_right = begun.current.variables, -1
    for state, decision in distillation.run(pools, begun, budget=budget):
        right = round(float(decision.current_score) * n)
        if right > best_right:
            best, best_right = state.current.variables, right
    which, delivered = distillation.evaluator.select(pools, state)
    return Ended(which, delivered, int(state.clock.iteration), best, best_right)


def promised(sealed: Answers, truth: Answers) -> list[dict[str, Any]]:
    """The certificate's claims from sealed examples, each with its `truth` on all others."""
    true = _truth(truth)
    return [claim | {"truth": true[claim["metric"]]} for claim in _certified(sealed)]


def instead(best_right: int, assessed: int, best_truth: float, accuracy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is often promised in the place of a certificate; see the module.

    Args:
      best_right: examples of assess that the best student on assess gets right.
      assessed: examples of assess.
      best_truth: that student's true accuracy.
      accuracy: the certificate's claim of the delivered student.
    """
    bound = clopper_pearson_lower(best_right, assessed, confidence=CONFIDENCE)
    return [
        {"metric": "best validation score", "lower_bound": best_right / assessed, "truth": best_truth},
        {"metric": "best validation score, bounded", "lower_bound": bound, "truth": best_truth},
        {"metric": "sealed score", "lower_bound": accuracy["point"], "truth": accuracy["truth"]},
    ]


def _certified(sealed: Answers) -> list[dict[str, Any]]:
    """What the certificate claims: metric, point, and lower_bound or upper_bound. The one place that calls it."""
    outputs = Outputs(sealed.student, sealed.labels, {"logits": sealed.teacher})
    certified = make_certificate(bounds_of(CLAIMS, outputs), confidence=CONFIDENCE)
    claims: list[dict[str, Any]] = certified.as_dict()["claims"]
    return claims


def _truth(answers: Answers) -> dict[str, float]:
    """What the claims are about, by metric; written apart from the certificate, which it judges."""
    says, teacher_says = answers.student.argmax(axis=1), answers.teacher.argmax(axis=1)
    right = says == answers.labels
    return {
        "accuracy": float(right.mean()),
        "agreement": float((says == teacher_says).mean()),
        "worst_class_accuracy": min(float(right[answers.labels == k].mean()) for k in np.unique(answers.labels)),
        "drop(accuracy)": float((teacher_says == answers.labels).mean() - right.mean()),
    }


def beyond(claim: Mapping[str, Any]) -> float:
    """By how much a claim is better than the truth; it holds where that is 0 or less."""
    lower, upper, truth = claim.get("lower_bound"), claim.get("upper_bound"), claim["truth"]
    return max(([] if lower is None else [lower - truth]) + ([] if upper is None else [truth - upper]))


def plot(rows: Sequence[dict[str, Any]]) -> "Figure":
    """How far what is promised of accuracy lies beyond the truth: for each promise the share of runs up to there."""
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
    axes.set(xlabel="promised accuracy less the true one, points (shaded: false)", ylabel="share of runs", ylim=(0, 1))
    axes.legend(fontsize="small", frameon=False, loc="lower right")
    return figure


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """By how much each promise of a row goes beyond the truth."""
    return {f"{claim['metric']}, beyond the truth": beyond(claim) for claim in (*row["claims"], *row["instead"])}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """How often each promise held, with exact 95 % intervals, and by how much it went beyond the truth."""
    found: dict[str, list[float]] = {}  # by promise, beyond the truth in points, a value per run
    for row in rows:
        for claim in (*row["claims"], *row["instead"]):
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
                ["promise", "held, % (exact 95 % interval)", "beyond the truth, points (95 % t interval)", "at worst"],
                body,
            ),
            f"{TOGETHER.capitalize()}: promised in {100 * CONFIDENCE:g} % of runs, with a lower limit of "
            f"{100 * LEAST:g} %: {verdict(together)}.",
        ]
    )


def verdict(together: statistics.Interval) -> str:
    """What the share of runs in which all claims held says of the promise that they hold together."""
    return "missed" if together.center < CONFIDENCE else statistics.verdict(together, LEAST)


def _line(metric: str, held: statistics.Interval, values: Sequence[float]) -> list[str]:
    name = f"`{metric}`" if metric in CLAIMS else metric
    mean = statistics.plus_minus(statistics.mean(values), 2)
    return [name, statistics.percent(held, 1), mean, statistics.number(max(values), 2)]
