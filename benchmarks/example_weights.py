"""Can example weights, tuned during training, tell which labels or which teacher outputs are wrong?

MNIST, an MLP of 256 units, 14 epochs of AdamW at 1e-2, and the average iterate, without EV3. Beside explore there are 1,000
examples whose labels are known to be right. Every fifth step updates a network that maps an example's losses to its weights
(`tuned-weights`), by the hypergradient of the Brier score on these examples.

- `labels`: each label of explore is wrong with probability 0.4, and is then one of two classes, evenly, that its own class is
  mistaken for (flip2). There is no teacher. Controls: cross entropy on the same labels, for as many steps and for as many
  more as tuning costs; on known labels alone; and on the right labels, which are not available in practice.
- `teacher`: labels are right, but the teacher takes all examples of three classes for the next class. Controls: KD at T = 4
  with that teacher, also for longer; labels alone; and KD with the sound teacher, which is not available in practice.

An AUROC is the probability that a right example of explore has a larger weight than a wrong one. Beside that of the weights
stands that of the loss of the student that was trained without weights. Test examples are used for no choice.

References:
  Shu et al., Meta-Weight-Net: Learning an explicit mapping for sample weighting, 2019, section 4.2 (flip2).
  Bohdal et al., EvoGrad: Efficient gradient-based meta-learning and hyperparameter optimization, 2021, section 4.3.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from ev3_distill import students
from ev3_distill.arms.tunable_loss import distillation, label_losses, net_weights
from ev3_distill.benchmarks import problems, statistics, trajectories
from ev3_distill.config import EV3
from ev3_distill.core.assess import outputs_of
from ev3_distill.data import batches
from ev3_distill.runtime.compile import jit
from ev3_distill.tasks.classification import losses
from ev3_distill.types import Batch, Loss, Network, Pools, Variables

KEY = ("wrong", "contender", "seed")  # identifies a row
INTERVALS = "Intervals are Student's t, 95 %, over seeds; gains are paired by seed."
FIRST_SEED = 6100  # no default was chosen on these seeds


class Subject(NamedTuple):
    """A student, its training, and its teacher."""

    data: str
    student: str
    steps: int
    teacher_cost: int  # training steps of a teacher that learns from labels alone
    clean: int  # number of examples whose labels are known to be right


SUBJECTS = {
    "full": Subject("mnist", "mlp:hidden=256", 4000, 3000, 1000),
    "smoke": Subject("digits", "mlp:hidden=16", 60, 150, 100),
}
FLIPPED = 0.4  # share of wrong labels
MISLED = (3, 5, 8)  # classes that the teacher takes for the next one
MORE = 1.4  # cost of a tuned run, in plain runs of the same number of steps
AUROC = 0.9
CONTENDERS = {
    "labels": ("right labels", "labels as given", "labels as given, longer", "known labels alone", "weights"),
    "teacher": ("KD, sound", "KD, misled", "KD, misled, longer", "labels alone", "weights"),
}
OURS = "weights"
CONTROL = {"labels": "labels as given", "teacher": "KD, misled"}  # must be exceeded


class Trained(NamedTuple):
    """A student, and a trust score per example of explore [N]; a larger score means that the example looks right."""

    student: Variables
    trust: jax.Array


Train = Callable[[Pools, Any, Any], Trained]  # (pools, seed, steps)


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per kind of error, contender and seed: test accuracy, and the AUROC of right against wrong examples.

    Args:
      seeds: number of seeds from FIRST_SEED, each with its own splits, teacher, errors and initial parameters.
      size: full, or smoke: digits, few steps.
      done: keys of rows to skip.
    """
    if all((wrong, name, seed) in done for wrong, of in CONTENDERS.items() for name in of for seed in range(seeds)):
        return
    subject = SUBJECTS[size]
    dataset, teach = problems.problem(subject.data, subject.teacher_cost)
    bench = _Bench(students.from_name(subject.student, dataset.inputs.shape[1:], dataset.num_classes), subject.steps)
    for seed in range(seeds):
        own = FIRST_SEED + seed
        if all((wrong, name, seed) in done for wrong, of in CONTENDERS.items() for name in of):
            continue
        pools, test = batches.split(dataset, teach(own), seed=own, fractions=problems.FRACTIONS, final=False)
        pools = pools._replace(assess=jax.tree.map(lambda leaf: leaf[: subject.clean], pools.assess))
        for wrong, name, row in bench.rows(pools, test, own):
            if (wrong, name, seed) not in done:
                yield {"wrong": wrong, "contender": name, "seed": seed, **row()}


class _Bench:
    """All contenders, compiled once for all seeds."""

    def __init__(self, network: Network, steps: int):
        self.steps, self.score = steps, trajectories.accuracy_of(network)
        self.by_labels = _plain(network, losses.cross_entropy(), 0)
        self.by_teacher = _plain(
            network, distillation({"temperature": jnp.float32(4), "mix": jnp.array([0.9, 0.1])}), 1
        )
        self.weighing = {"labels": _weighing(network, 1, mix=0.0), "teacher": _weighing(network, 0)}

    def rows(self, pools: Pools, test: Batch, seed: int) -> Iterator[tuple[str, str, Callable[[], dict[str, float]]]]:
        """The kind of error, the contender, and the function that measures it."""
        longer = round(MORE * self.steps)
        sound = pools.explore.examples
        flipped = sound._replace(
            targets=flip(sound.targets, seed), teacher={"logits": jnp.zeros_like(sound.teacher["logits"])}
        )
        misled = sound._replace(teacher={"logits": mislead(sound.teacher["logits"], sound.targets)})
        right = {"labels": flipped.targets == sound.targets, "teacher": ~jnp.isin(sound.targets, jnp.array(MISLED))}
        damaged = {"labels": _with(pools, flipped), "teacher": _with(pools, misled)}
        runs: dict[str, tuple[tuple[Train, Pools, int], ...]] = {  # in the order of CONTENDERS
            "labels": (
                (self.by_labels, pools, self.steps),
                (self.by_labels, damaged["labels"], self.steps),
                (self.by_labels, damaged["labels"], longer),
                (self.by_labels, _clean_alone(pools), self.steps),
                (self.weighing["labels"], damaged["labels"], self.steps),
            ),
            "teacher": (
                (self.by_teacher, pools, self.steps),
                (self.by_teacher, damaged["teacher"], self.steps),
                (self.by_teacher, damaged["teacher"], longer),
                (self.by_labels, pools, self.steps),
                (self.weighing["teacher"], damaged["teacher"], self.steps),
            ),
        }

        def measured(wrong: str, train: Train, used: Pools, steps: int) -> dict[str, float]:
            trained = train(used, seed, steps)
            row = {"accuracy": float(self.score(trained.student, test)), "steps": steps}
            if used is damaged[wrong]:
                row["auroc"] = auroc(np.asarray(trained.trust), np.asarray(right[wrong]))
            return row

        for wrong, settings in runs.items():
            for name, contender in zip(CONTENDERS[wrong], settings, strict=True):
                yield wrong, name, functools.partial(measured, wrong, *contender)


def flip(labels: jax.Array, seed: int, *, classes: int = 10) -> jax.Array:
    """Labels [N] with a share of FLIPPED wrong ones: each class is mistaken for two others, drawn by the seed."""
    rng = np.random.default_rng(seed)
    two = np.stack([rng.choice(np.delete(np.arange(classes), c), 2, replace=False) for c in range(classes)])
    right = np.asarray(labels)
    other = two[right, rng.integers(0, 2, len(right))]
    return jnp.asarray(np.where(rng.random(len(right)) < FLIPPED, other, right), labels.dtype)


def mislead(teacher_logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Teacher logits [V, N, K] in which examples of MISLED have the logits of their class and the next one swapped."""
    classes = jnp.arange(teacher_logits.shape[-1])
    own, following = labels[:, None], (labels[:, None] + 1) % len(classes)
    swapped = jnp.where(classes == own, following, jnp.where(classes == following, own, classes))
    columns = jnp.where(jnp.isin(own, jnp.array(MISLED)), swapped, classes)
    return jnp.take_along_axis(teacher_logits, columns[None], -1)


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a positive scores above a negative; ties count half (Mann and Whitney 1947). Both are [N]."""
    n = int(positive.sum())
    above = stats.rankdata(score)[positive].sum() - n * (n + 1) / 2
    return float(above / (n * (len(positive) - n)))


def _with(pools: Pools, examples: Batch) -> Pools:
    return pools._replace(explore=pools.explore._replace(examples=examples))


def _clean_alone(pools: Pools) -> Pools:
    """The pools with the examples of known labels instead of explore."""
    batch = pools.assess
    inputs, labels, index, logits = map(np.asarray, (batch.inputs, batch.targets, batch.index, batch.teacher["logits"]))
    return pools._replace(explore=batches.resident(inputs, labels, index, {"logits": logits[None]}, seed=0))


def _plain(network: Network, loss: Loss, column: int) -> Train:
    """A plain run. The trust in an example falls with the loss of its label under the student (0) or the teacher (1)."""
    whole = trajectories.whole_trajectory(network, trajectories.arm_of(network, loss))

    @jit
    def train(pools: Pools, seed: Any, steps: Any) -> Trained:
        student = whole(pools, seed, steps)[1]
        return Trained(student, -_label_losses(network, student, pools)[:, column])

    return train


def _weighing(network: Network, column: int, **options: Any) -> Train:
    """A run that tunes weights. The trust in an example is its weight in the loss of teacher (0) or label (1)."""
    whole = trajectories.whole_trajectory(network, trajectories.tuned_arm_of(network, ("weights",), **options))

    @jit
    def train(pools: Pools, seed: Any, steps: Any) -> Trained:
        state, student = whole(pools, seed, steps)
        net = state.tuned.average["weights"]
        return Trained(student, net_weights(net, _label_losses(network, student, pools))[:, column])

    return train


def _label_losses(network: Network, student: Variables, pools: Pools) -> jax.Array:
    examples = pools.explore.examples
    logits = outputs_of(network.apply, student, examples.inputs, batch_size=EV3().eval_batch_size)
    return label_losses(logits, examples._replace(teacher={"logits": examples.teacher["logits"][0]}))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For each kind of error: accuracies, AUROCs, and the gain from weights, paired over seeds."""
    kinds = dict.fromkeys(row["wrong"] for row in rows)
    return "\n\n".join(_table_of(wrong, [row for row in rows if row["wrong"] == wrong]) for wrong in kinds)


def _table_of(wrong: str, rows: Sequence[dict[str, Any]]) -> str:
    points: dict[str, dict[int, float]] = {}
    areas: dict[str, list[float]] = {}
    for row in rows:
        points.setdefault(row["contender"], {})[row["seed"]] = 100 * row["accuracy"]
        if "auroc" in row:
            areas.setdefault(row["contender"], []).append(row["auroc"])
    body = [
        [name, statistics.plus_minus(statistics.mean(list(points[name].values())), 2),
         statistics.plus_minus(statistics.mean(areas[name]), 3) if name in areas else "",
         statistics.number(next(row["steps"] for row in rows if row["contender"] == name), 0)]
        for name in CONTENDERS[wrong] if name in points
    ]  # fmt: skip
    ours, gains = points.pop(OURS), []
    seeds = sorted(ours)
    for name, by_seed in points.items():
        if ours.keys() <= by_seed.keys():
            gain = statistics.paired([ours[s] for s in seeds], [by_seed[s] for s in seeds])
            verdict = f" (target > 0: {statistics.verdict(gain, 0)})" if name == CONTROL[wrong] else ""
            gains.append(f"{statistics.spread(gain, 2)} over {name}{verdict}")
    least = min(areas[OURS])
    heads = [f"wrong {wrong}", "test accuracy, % (95 % t interval)", "AUROC of right against wrong", "steps"]
    return (
        f"{statistics.markdown(heads, body)}\n\nWeights gain, points, paired over {len(seeds)} seeds: {'; '.join(gains)}. "
        f"Their smallest AUROC: {least:.3f}, target ≥ {AUROC:g}: {'held' if least >= AUROC else 'missed'}."
    )
