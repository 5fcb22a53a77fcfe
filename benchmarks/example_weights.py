"""Do weights of examples, tuned while a student trains, tell labels and teachers that are wrong?

MNIST, an MLP of 256 units, 14 epochs of AdamW at 1e-2, and its average iterate, without EV3 around it. Beside explore there are
1,000 examples whose labels are known to be right: every fifth step moves a net from an example's losses to its weights
(`tuned-weights`) by the hypergradient of the Brier score on these.

- `labels`: each label of explore is wrong with probability 0.4, and is then, evenly, one of two classes that its own is
  mistaken for (flip2). There is no teacher. Beside the tuned student: cross entropy on the same labels, for as many steps
  and for as many more as tuning costs; on known labels alone; and on the right labels, which nobody has.
- `teacher`: labels are right, but the teacher says of all examples of three classes that they are of the next. Beside the
  tuned student: KD at T = 4 with that teacher, also longer; labels alone; and KD with the teacher as it was, which nobody has.

An AUROC is the probability that an example of explore that is right has a greater weight than one that is wrong; beside that
of the weights stands that of the loss of the student that was trained without any. Test examples choose nothing.

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
FIRST_SEED = 6100  # nothing was chosen on these


class Subject(NamedTuple):
    """A student, its training, and its teacher."""

    data: str
    student: str
    steps: int
    teacher_cost: int  # steps, of one trained by labels alone
    clean: int  # examples whose labels are known to be right


SUBJECTS = {
    "full": Subject("mnist", "mlp:hidden=256", 4000, 3000, 1000),
    "smoke": Subject("digits", "mlp:hidden=16", 60, 150, 100),
}
FLIPPED = 0.4  # of the labels
MISLED = (3, 5, 8)  # classes that the teacher takes for the next
MORE = 1.4  # times the cost of plain training, of a tuned run
AUROC = 0.9
CONTENDERS = {
    "labels": ("right labels", "labels as given", "labels as given, longer", "known labels alone", "weights"),
    "teacher": ("KD, sound", "KD, misled", "KD, misled, longer", "labels alone", "weights"),
}
OURS = "weights"
BEATEN = {"labels": "labels as given", "teacher": "KD, misled"}  # by a margin


class Found(NamedTuple):
    """A student and, of every example of explore, what is believed of it, [N]: greater where it is more."""

    student: Variables
    belief: jax.Array


Train = Callable[[Pools, Any, Any], Found]  # (pools, seed, steps)


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per thing that is wrong, contender and seed: accuracy on test, and the AUROC of right against wrong.

    Args:
      seeds: from FIRST_SEED, each with splits, a teacher, mistakes and initial parameters of its own.
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
        pools, test = batches.split(dataset, teach(own), seed=own, fractions=problems.FRACTIONS)
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
        """What is wrong, the contender, and what measures it."""
        longer = round(MORE * self.steps)
        sound = pools.explore.examples
        flipped = sound._replace(
            targets=flip(sound.targets, seed), teacher={"logits": jnp.zeros_like(sound.teacher["logits"])}
        )
        misled = sound._replace(teacher={"logits": mislead(sound.teacher["logits"], sound.targets)})
        right = {"labels": flipped.targets == sound.targets, "teacher": ~jnp.isin(sound.targets, jnp.array(MISLED))}
        damaged = {"labels": _with(pools, flipped), "teacher": _with(pools, misled)}
        field: dict[str, tuple[tuple[Train, Pools, int], ...]] = {  # in the order of CONTENDERS
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

        def measured(wrong: str, train: Train, given: Pools, steps: int) -> dict[str, float]:
            found = train(given, seed, steps)
            row = {"accuracy": float(self.score(found.student, test)), "steps": steps}
            if given is damaged[wrong]:
                row["auroc"] = auroc(np.asarray(found.belief), np.asarray(right[wrong]))
            return row

        for wrong, how in field.items():
            for name, contender in zip(CONTENDERS[wrong], how, strict=True):
                yield wrong, name, functools.partial(measured, wrong, *contender)


def flip(labels: jax.Array, seed: int, *, classes: int = 10) -> jax.Array:
    """Labels [N] of which FLIPPED are wrong, each class being mistaken for two others that the seed draws."""
    rng = np.random.default_rng(seed)
    two = np.stack([rng.choice(np.delete(np.arange(classes), c), 2, replace=False) for c in range(classes)])
    given = np.asarray(labels)
    other = two[given, rng.integers(0, 2, len(given))]
    return jnp.asarray(np.where(rng.random(len(given)) < FLIPPED, other, given), labels.dtype)


def mislead(teacher_logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Logits [V, N, K] of a teacher that says of an example of MISLED what it had said of the class before, and the reverse."""
    classes = jnp.arange(teacher_logits.shape[-1])
    own, following = labels[:, None], (labels[:, None] + 1) % len(classes)
    swapped = jnp.where(classes == own, following, jnp.where(classes == following, own, classes))
    columns = jnp.where(jnp.isin(own, jnp.array(MISLED)), swapped, classes)
    return jnp.take_along_axis(teacher_logits, columns[None], -1)


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a positive scores above a negative, ties counting half (Mann and Whitney 1947); both [N]."""
    n = int(positive.sum())
    above = stats.rankdata(score)[positive].sum() - n * (n + 1) / 2
    return float(above / (n * (len(positive) - n)))


def _with(pools: Pools, examples: Batch) -> Pools:
    return pools._replace(explore=pools.explore._replace(examples=examples))


def _clean_alone(pools: Pools) -> Pools:
    """The known examples in the place of explore's."""
    batch = pools.assess
    inputs, labels, index, logits = map(np.asarray, (batch.inputs, batch.targets, batch.index, batch.teacher["logits"]))
    return pools._replace(explore=batches.resident(inputs, labels, index, {"logits": logits[None]}, seed=0))


def _plain(network: Network, loss: Loss, column: int) -> Train:
    """A run by a loss; an example is believed the more the smaller the loss of its label, by student (0) or teacher (1)."""
    whole = trajectories.whole_trajectory(network, trajectories.arm_of(network, loss))

    @jit
    def train(pools: Pools, seed: Any, steps: Any) -> Found:
        student = whole(pools, seed, steps)[1]
        return Found(student, -_seen(network, student, pools)[:, column])

    return train


def _weighing(network: Network, column: int, **options: Any) -> Train:
    """A run that tunes weights; an example is believed by its weight in the loss of teacher (0) or label (1)."""
    whole = trajectories.whole_trajectory(network, trajectories.tuned_arm_of(network, ("weights",), **options))

    @jit
    def train(pools: Pools, seed: Any, steps: Any) -> Found:
        state, student = whole(pools, seed, steps)
        net = state.tuned.average["weights"]
        return Found(student, net_weights(net, _seen(network, student, pools))[:, column])

    return train


def _seen(network: Network, student: Variables, pools: Pools) -> jax.Array:
    examples = pools.explore.examples
    logits = outputs_of(network.apply, student, examples.inputs, batch_size=EV3().eval_batch_size)
    return label_losses(logits, examples._replace(teacher={"logits": examples.teacher["logits"][0]}))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For each thing that is wrong accuracies and AUROCs, and what weights gain, paired over seeds."""
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
    ours, told = points.pop(OURS), []
    seeds = sorted(ours)
    for name, by_seed in points.items():
        if ours.keys() <= by_seed.keys():
            gain = statistics.paired([ours[s] for s in seeds], [by_seed[s] for s in seeds])
            verdict = f" (target > 0: {statistics.verdict(gain, 0)})" if name == BEATEN[wrong] else ""
            told.append(f"{statistics.spread(gain, 2)} over {name}{verdict}")
    least = min(areas[OURS])
    heads = [f"wrong {wrong}", "test accuracy, % (95 % t interval)", "AUROC of right against wrong", "steps"]
    return (
        f"{statistics.markdown(heads, body)}\n\nWeights gain, points, paired over {len(seeds)} seeds: {'; '.join(told)}. Their "
        f"least AUROC: {least:.3f}, target ≥ {AUROC:g}: {'held' if least >= AUROC else 'missed'}."
    )
