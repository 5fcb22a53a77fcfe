"""Whatever is wrong with the teacher, the labels or the recipe: how far from the best recipe in hindsight does the default end?

In each scenario one student learns in each of these ways, with the same number of training steps:

- each recipe of a grid of losses, optimizers and rates (`fixed_recipes.RECIPES`), on the explore split, without EV3. The
  average of the iterates is delivered, once at the end and once as early stopping has it: of 24 marks (10 for CIFAR-10), that
  with the highest accuracy on assess. Early stopping sees the labels of assess as they are given, wrong ones too;
- `KD, all rows`: the usual recipe, KD with T = 4 and a tenth of cross entropy (`kd4`), on explore, assess and decide;
- `KD, all rows, stopped`: the same on explore and decide, with early stopping on assess;
- `EV3`: the default, from the data and the teacher's outputs to the delivered student as `compress` does it. The steps of all
  arms count;
- `EV3 without ...`: the same without one of its parts.

The student has 16 hidden units. MNIST has 20,000 training images, drawn by the seed, and the teacher is an MLP of two layers of
256 units, trained on the labels of explore. Splits, initial parameters and the order of batches are those of an EV3 run with
the same seed. Images are not augmented. The default was chosen on other seeds.

The figure is the accuracy on test examples with correct labels, which choose nothing for any contender. With the imbalance it
is the mean over classes, on assess, too. Regret is the mean figure, over seeds, of the best recipe of the grid in hindsight,
with or without early stopping, minus that of the contender, in points. Hindsight picks among all recipes by the test figures
themselves, so even a perfect choice has some regret.

Scenarios:

- `digits`, `mnist`, `cifar10`: clean. The last distills a pretrained ResNet-56 (ONNX) into a ResNet-8 of width 8, in 3 epochs;
- `wrong-labels`: 30 % of the labels are those of another class, also for the teacher;
- `two-classes`: the teacher says 5 where it sees a 3;
- `weak-teacher`: it was trained on 50 images, and about 60 % of its answers are right;
- `over-confident`: logits times 8;
- `500-rows`: 500 training images, with the teacher of 20,000;
- `few-labels`: labels for 5 % of the training images, and teacher outputs for all. Assess and decide have labeled images alone;
- `imbalanced`: class sizes fall to 1 in 50, with a guard on the worst class;
- `300-steps`, `50000-steps`: clean MNIST, shorter and longer. All others have 6,000 steps, and CIFAR-10 1,056;
- `shuffled`: the teacher's classes are in another order, let through by `--teacher-as-is`;
- `adult`: a table with a tree ensemble as teacher, once tables are supported.

`--only` restricts a run to some of these names, or to some of the contenders: `recipes`, `plain`, `ev3` and `ablations`.
"""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.arms import ARMS
from ev3_distill.arms.zoo import is_convolutional
from ev3_distill.benchmarks import fixed_recipes, robustness_table
from ev3_distill.benchmarks.robustness_scenarios import SCENARIOS, SMOKE, Problem, Scenario, problem_of
from ev3_distill.config import Compress
from ev3_distill.data.batches import resident
from ev3_distill.errors import InputError
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.teachers.targets import RecordedTargets
from ev3_distill.training import run_dir
from ev3_distill.training.setup import TrainingSetup, classification_setup
from ev3_distill.training.student_setup import prepare_student
from ev3_distill.training.train import train

KEY = ("scenario", "seed", "contender")  # identifies a row
INTERVALS = (
    "Intervals are Student's t, 95 %, over seeds, paired by seed; they take the best recipe in hindsight as given. That "
    "of a mean over scenarios is over the seeds that all scenarios share."
)
SIZES = {"full": SCENARIOS, "smoke": SMOKE}
MARKS = (0.01, 0.02, 0.03, *(i / 20 for i in range(1, 21)), 0.08)  # fractions of the steps, in any order
MARKS_OF_CONVOLUTIONAL = tuple(i / 10 for i in range(1, 11))  # whose evaluation takes as long as a tenth of an epoch
STOPPED = robustness_table.STOPPED
ALL_ROWS = robustness_table.ALL_ROWS
OURS = robustness_table.OURS
ABLATIONS: dict[str, dict[str, Any]] = {  # fields of Compress that leave a part out; ev3.X is a field of its EV3
    "EV3 without a portfolio": {"arms": ("kd4-muon",)},
    "EV3 without a race": {"ev3.race": 0.0},
    "EV3 without leaving the race": {"ev3.drop": 1e6},
    "EV3 without a final phase": {"ev3.final": 0.0},
    "EV3 without roll-back": {"ev3.roll_back": 1e-6},
    "EV3 without unproven students": {"deliver": "champion"},
}
PARTS = ("recipes", "plain", "ev3", "ablations")


class Subject(NamedTuple):
    """A scenario with a seed, ready to train."""

    scenario: Scenario
    problem: Problem
    config: Compress
    setup: TrainingSetup

    @property
    def seed(self) -> int:
        """The seed of splits, parameters and batches."""
        return self.config.seed


def collect(
    *, seeds: int, size: str, done: Collection[tuple[Any, ...]] = (), only: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """One row per scenario, seed and contender.

    Args:
      seeds: number of seeds, from a scenario's first. Its `most` limits it.
      size: full, or smoke: one scenario on digits, few steps, no ablations.
      done: keys of rows to skip.
      only: names of scenarios and of PARTS; if none of a kind is named, all are measured.

    Raises:
      InputError: the data are missing, or a name is unknown.
    """
    scenarios = SIZES[size]
    if unknown := [name for name in only if name not in (*scenarios, *PARTS)]:
        raise InputError(
            f"--only takes {', '.join((*scenarios, *PARTS))}; got '{unknown[0]}': name some of these, or omit it"
        )
    names = [name for name in scenarios if name in only] or [*scenarios]
    parts = [part for part in PARTS if part in only] or [
        part for part in PARTS if size == "full" or part != "ablations"
    ]
    for name in names:
        scenario = scenarios[name]
        for seed in range(min(seeds, scenario.most) if scenario.data else 0):
            missing = {one for part in parts for one in contenders(part) if (name, seed, one) not in done}
            if missing:
                for row in _rows(scenario, scenario.first_seed + seed, missing):
                    yield {"scenario": name, "seed": seed, **row}


def contenders(part: str) -> list[str]:
    """The contenders of one of PARTS."""
    recipes = [f"{name}{ending}" for name in fixed_recipes.RECIPES for ending in ("", STOPPED)]
    return {"recipes": recipes, "plain": [ALL_ROWS, ALL_ROWS + STOPPED], "ev3": [OURS], "ablations": [*ABLATIONS]}[part]


def _rows(scenario: Scenario, seed: int, missing: Collection[str]) -> Iterator[dict[str, Any]]:
    subject = _subject(scenario, seed)
    rows = subject.setup.rows
    train_on = {  # rows to train on, recipes, names
        "explore": [rows["explore"]],
        ALL_ROWS: [rows["explore"], rows["decide"], rows["assess"]],
        ALL_ROWS + STOPPED: [rows["explore"], rows["decide"]],
    }
    common = {"steps": scenario.steps, "teacher": _figure(subject, subject.problem.logits[rows["test"]].argmax(1))}
    if any(name in missing for name in contenders("recipes")):
        for group in _together(subject):
            if any(f"{name}{ending}" in missing for name in group for ending in ("", STOPPED)):
                for name, stopped, row in _trained(subject, group, train_on["explore"]):
                    if (contender := f"{name}{STOPPED if stopped else ''}") in missing:
                        yield {"contender": contender, "fixed": True, **row, **common}
    for contender in contenders("plain"):
        if contender in missing:
            plain = {fixed_recipes.PLAIN: fixed_recipes.RECIPES[fixed_recipes.PLAIN]}
            for _, stopped, row in _trained(subject, plain, train_on[contender]):
                if stopped == contender.endswith(STOPPED):
                    yield {"contender": contender, "fixed": False, **row, **common}
    for contender, changes in {OURS: {}, **ABLATIONS}.items():
        if contender in missing:
            yield {"contender": contender, "fixed": False, **_delivered(subject, changes), **common}


def _subject(scenario: Scenario, seed: int) -> Subject:
    problem = problem_of(scenario, seed)
    config = Compress(
        student=scenario.student,
        teacher="logits:recorded.npz",
        budget=str(scenario.steps),
        seed=seed,
        augment="none",
        guards=scenario.guards,
        teacher_as_is=True,
        checkpoint_s=3600.0,
    )
    with _quiet():
        setup = classification_setup(config, config.student, problem.dataset, problem.dataset.num_classes)
    return Subject(scenario, problem, config, setup)


def _together(subject: Subject) -> list[Mapping[str, fixed_recipes.Recipe]]:
    """The recipes that train together: those of a convolutional student each alone, so that a stop loses one of them."""
    recipes = fixed_recipes.RECIPES
    alone = is_convolutional(subject.setup.network.spec)
    return [{name: one} for name, one in recipes.items()] if alone else [recipes]


def _trained(
    subject: Subject, recipes: Mapping[str, fixed_recipes.Recipe], parts: Sequence[np.ndarray]
) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Trains fixed recipes on these rows; yields (recipe, whether assess stopped it, facts)."""
    dataset, rows, seed = subject.problem.dataset, np.concatenate(parts), subject.seed
    inputs, held = np.asarray(dataset.inputs), subject.setup.rows["assess"]
    pool = resident(inputs[rows], dataset.labels[rows], rows, {"logits": subject.problem.logits[rows][None]}, seed=seed)
    fractions = MARKS_OF_CONVOLUTIONAL if is_convolutional(subject.setup.network.spec) else MARKS
    marks = sorted({max(1, round(subject.scenario.steps * fraction)) for fraction in fractions})
    steps = fixed_recipes.stages(subject.scenario.student, dataset.num_classes, recipes, pool, seed=seed, marks=marks)
    on = [jnp.asarray(inputs[part]) for part in (held, subject.setup.rows["test"])]
    for name, curve in fixed_recipes.curves_of(steps, *on).items():
        scores = [figure(predicted, dataset.labels[held], subject.scenario.by_class) for predicted in curve.held_out]
        for stopped, at in ((False, len(marks) - 1), (True, last_best(scores))):
            yield name, stopped, {"at": curve.steps[at], **_figures(subject, curve.test[at])}


def last_best(scores: Sequence[float]) -> int:
    """The position of the highest score, the last of equals: more training at no loss."""
    return len(scores) - 1 - int(np.argmax(scores[::-1]))


def _delivered(subject: Subject, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the student that EV3 delivers, and what its arms did."""
    config, dataset = configured(subject.config, changes), subject.problem.dataset
    with tempfile.TemporaryDirectory() as folder, _quiet():
        directory = Path(folder) / "run"
        setup, arms = prepare_student(config, subject.setup, {})
        with run_dir.lock_run(directory, make=True):
            run_dir.create(directory, config, {"fingerprint": dataset.fingerprint, "teacher": None})
            targets = RecordedTargets({"logits": subject.problem.logits})
            facts = {"source": config.teacher, "params": None}
            report = train(directory, config, setup, arms, targets, teacher=facts)
        network, variables = students.load(directory / "student")
    predicted = forward(network, variables)(np.asarray(dataset.inputs)[setup.rows["test"]]).argmax(1)
    shares = {arm["name"]: round(arm["share"], 4) for arm in report["arms"]}
    of_labels = sum(share for name, share in shares.items() if name in ARMS and not ARMS[name].uses_teacher)
    return {
        **{"at": int(report["cost"]["steps"]), **_figures(subject, predicted)},
        **{
            "iterations": report["iterations"],
            "rollbacks": report["rollbacks"],
            "delivered": report["student"]["delivered"],
        },
        **{"labels_share": of_labels, "shares": shares},
    }


def configured(config: Compress, changes: Mapping[str, Any]) -> Compress:
    """A configuration with other values of some fields; `ev3.X` is the field X of `config.ev3`."""
    inner = {name.removeprefix("ev3."): value for name, value in changes.items() if name.startswith("ev3.")}
    outer = {name: value for name, value in changes.items() if not name.startswith("ev3.")}
    return dataclasses.replace(config, ev3=dataclasses.replace(config.ev3, **inner), **outer)


def _figures(subject: Subject, predicted: np.ndarray) -> dict[str, float]:
    """The figure of a student by its predictions on the test split, and its accuracy on the worst class."""
    truth = subject.problem.truth[subject.setup.rows["test"]]
    return {
        "accuracy": _figure(subject, predicted),
        "worst_class": min(float((predicted == truth)[truth == k].mean()) for k in np.unique(truth)),
    }


def _figure(subject: Subject, predicted: np.ndarray) -> float:
    truth = subject.problem.truth[subject.setup.rows["test"]]
    return figure(predicted, truth, subject.scenario.by_class)


def figure(predicted: np.ndarray, labels: np.ndarray, by_class: bool) -> float:
    """The accuracy on labeled examples, or its mean over the classes that occur.

    Args:
      predicted: classes [N].
      labels: [N], -1 for none.
      by_class: whether every class counts the same.
    """
    labeled = labels >= 0
    hits = (predicted == labels)[labeled]
    if not by_class:
        return float(hits.mean())
    return float(np.mean([hits[labels[labeled] == k].mean() for k in np.unique(labels[labeled])]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the warnings of a run, whose teachers are bad on purpose."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Regrets over scenarios, by scenario and of each recipe, and whether the targets hold."""
    return robustness_table.table(rows, scenarios=SCENARIOS)
