"""Can a population learn what backpropagation learns? Prototypical networks on Omniglot, trained both ways.

Training uses episodes of characters in four rotations, sampled on the device. The test is 1,000 episodes of characters that
training never saw, with 15 queries per class and BatchNorm's running statistics (non-transductive), as in the reference. The
split is that of Vinyals et al. (see `omniglot.py`).

Evolution and backpropagation share all code but the gradient (see `protonet_training.py`). On CPUs each layer has its own
population, larger for deeper layers, which cost less. Episodes have 20 classes and few drawings, because these are more
informative than 5 classes with many (found on validation characters: 94.3 % instead of 91.5 % after 1,200 generations at
width 8).

Training is saved and resumed, so `ev3-distill bench protonet --out DIR` can be repeated until it is complete. Its speed
depends on the machine; its log and weights do not.

Width 64 is trained only on an accelerator. For other machines the table extrapolates its accuracy by a power law from the
widths that were trained.

References:
  Distributed evolution strategies using TPUs for meta-learning. arXiv 2201.00093: 98.4 % (5-way 5-shot), 99.1 % with larger
    populations, and 99.6 % by backpropagation.
  Snell, Swersky and Zemel: Prototypical networks for few-shot learning. 2017: 99.7 % after 60-way training.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ev3_distill import students
from ev3_distill.benchmarks import omniglot, protonet_training, statistics
from ev3_distill.benchmarks.protonet_training import Recipe
from ev3_distill.runtime.files import cache_root

KEY = ("seed", "contender")  # identifies a row
TIMED = ("seconds",)  # depend on the machine
INTERVALS = (
    "Intervals in the table are over the test episodes of the networks that were trained: they do not include "
    "the spread between trainings. A gap to backpropagation has a t interval over seeds, if there are several."
)
TESTS = ((5, 5), (5, 1), (20, 5), (20, 1))  # way, shot
EPISODES = {"full": 1000, "smoke": 20}
GAP = 0.012  # largest allowed gap to backpropagation at the same width: the paper's own
HEADLINE = {"evolution, width 64": 0.984, "backprop, width 64": 0.995}
LARGER = (1, 8, 16, 64)  # pairs at once, per layer: each deeper layer has a quarter of the pixels
RECIPES = {
    "smoke": (Recipe(4, (2, 2, 4, 8), 20, 0.02), Recipe(4, None, 20, 0.01)),
    "full": (
        Recipe(8, (16, 48, 128, 256), 20000, 0.02, way=20, shot=2, query=1, chunks=LARGER),
        Recipe(8, None, 4000, 0.005, way=20),
        Recipe(16, (16, 64, 192, 384), 12000, 0.02, way=20, shot=2, query=1, chunks=LARGER),
        Recipe(16, None, 4000, 0.005, way=20),
    ),
    "accelerator": (Recipe(64, (2048,), 20000, 0.01, rank=1), Recipe(64, None, 20000, 0.001, way=60)),
}


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per seed and contender.

    Args:
      seeds: number of seeds, each with its own initial parameters, episodes and noise.
      size: full (with width 64 on an accelerator), or smoke: 20 generations at width 4, whose figures mean nothing.
      done: keys of rows to skip.
    """
    characters = omniglot.load()
    recipes = RECIPES[size]
    if size == "full" and jax.default_backend() != "cpu":
        recipes += RECIPES["accelerator"]
    for recipe in recipes:
        for seed in range(seeds):
            if (seed, recipe.contender) not in done:
                measured = train_and_test(recipe, seed, characters, EPISODES[size])
                yield {"seed": seed, "contender": recipe.contender, **measured}


def train_and_test(recipe: Recipe, seed: int, characters: omniglot.Characters, episodes: int) -> dict[str, Any]:
    """Trains, resuming a saved training, and tests.

    Args:
      recipe: how to train.
      seed: of initial parameters, episodes and noise.
      characters: the three sets; `validation` is not used here.
      episodes: per test.

    Returns:
      The row's facts: accuracies over episodes with half a 95 % interval, the log, the cost, and a digest of the weights.
    """
    network = students.from_name(f"conv4:width={recipe.width}", protonet_training.SHAPE, 1)
    directory = cache_root() / "protonet" / protonet_training.digest(recipe, seed)
    state, log = protonet_training.trained_state(recipe, seed, network, characters, directory)
    variables = protonet_training.variables_of(network, state)
    accuracies = {}
    for way, shot in TESTS:
        accuracy = protonet_training.episode_accuracies(
            network, variables, characters.test, way=way, shot=shot, episodes=episodes
        )
        half = 1.96 * accuracy.std(ddof=1) / np.sqrt(len(accuracy))
        accuracies[f"{way}-way {shot}-shot"] = [float(accuracy.mean()), float(half)]
    weights = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(variables))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    facts = {"accuracy": accuracies, "log": log, "parameters": size, "episodes": episodes}
    return {**facts, "recipe": dataclasses.asdict(recipe), "weights": hashlib.sha256(weights).hexdigest()[:16]}


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's accuracies and training time in seconds."""
    return {**{test: accuracy for test, (accuracy, _) in row["accuracy"].items()}, "seconds": row["log"][-1]["seconds"]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracies on unseen characters, and each population's gap to backpropagation."""
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    tests = [f"{way}-way {shot}-shot" for way, shot in TESTS]
    groups = {name: [row for row in rows if row["contender"] == name] for name in contenders}
    body = [
        [name, f"{of[0]['parameters']:,}", f"{of[0]['recipe']['generations']:,}", f"{_mean(of, 'seconds'):,.0f}",
         *[_accuracy(of, test) for test in tests]]
        for name, of in groups.items()
    ]  # fmt: skip
    header = ["contender", "parameters", "generations", "seconds", *[f"{test}, %" for test in tests]]
    episodes = rows[0]["episodes"]
    return "\n\n".join(
        [
            f"Accuracy on characters that training never saw, {episodes:,} episodes (95 % interval over episodes, of the mean "
            "over seeds):",
            statistics.markdown(header, body),
            "\n".join(f"- {text}" for text in (*_gaps(groups, tests[0]), *_headlines(groups, tests[0]))),
        ]
    )


def _gaps(groups: Mapping[str, Sequence[dict[str, Any]]], test: str) -> Iterator[str]:
    """Each population against backpropagation at the same width."""
    for name, of in groups.items():
        other = groups.get(name.replace("evolution", "backprop"))
        if name.startswith("evolution") and other is not None:
            gap = statistics.paired(*[[row["accuracy"][test][0] for row in side] for side in (other, of)])
            verdict = statistics.verdict(gap._replace(center=-gap.center, low=-gap.high, high=-gap.low), -GAP)
            yield f"{name}: {statistics.percent(gap, 2)} points behind backprop, target ≤ {100 * GAP:g}: {verdict}"


def _headlines(groups: Mapping[str, Sequence[dict[str, Any]]], test: str) -> Iterator[str]:
    """The paper's accuracies at width 64, reached or extrapolated."""
    for name, target in HEADLINE.items():
        if name in groups:
            accuracy = statistics.mean([row["accuracy"][test][0] for row in groups[name]])
            yield f"{name}: target ≥ {100 * target:g} %: {statistics.verdict(accuracy, target)}"
        else:
            yield (
                f"{name}: target ≥ {100 * target:g} %: not measured, it needs an accelerator"
                f"{_extrapolation_text(groups, name, test)}"
            )


def _extrapolation_text(groups: Mapping[str, Sequence[dict[str, Any]]], name: str, test: str) -> str:
    """What the two widest networks of a kind predict for a wider one; empty if there are fewer than two."""
    kind, _, width = name.partition(", width ")
    known = {int(other.split()[-1]): rows for other, rows in groups.items() if other.startswith(kind)}
    if len(known) < 2:
        return ""
    narrow, wide = sorted(known)[-2:]
    guess = extrapolated({w: _error(known[w], test) for w in (narrow, wide)}, int(width))
    return (
        f"; if the error fell as a power of the width, as from {narrow} to {wide}, it would reach "
        f"{statistics.percent(guess, 1)} (interval over episodes only; the power law is an assumption)"
    )


def extrapolated(errors: Mapping[int, tuple[float, float]], width: int) -> statistics.Interval:
    """The accuracy at a width, if the error is a power of the width that passes through two known errors.

    error(w) = e_2 (w / w_2)^b with b = log(e_2 / e_1) / log(w_2 / w_1). The log error is linear in the two known ones, so its
    standard error follows from theirs.

    Args:
      errors: by width, two of them: the share of wrong answers, and half its 95 % interval.
      width: the width to extrapolate to.
    """
    (w1, (e1, half1)), (w2, (e2, half2)) = sorted(errors.items())
    reach = np.log(width / w2) / np.log(w2 / w1)
    center = np.log(e2) + reach * np.log(e2 / e1)
    half = float(np.hypot((1 + reach) * half2 / e2, reach * half1 / e1))
    low, middle, high = (1 - float(np.exp(center + sign * half)) for sign in (1, 0, -1))
    return statistics.Interval(middle, low, high, 2, statistics.CONFIDENCE)


def _error(rows: Sequence[dict[str, Any]], test: str) -> tuple[float, float]:
    """The share of wrong answers, averaged over seeds, and half its interval over episodes."""
    centers, halves = zip(*[row["accuracy"][test] for row in rows], strict=True)
    return 1 - float(np.mean(centers)), float(np.sqrt(np.square(halves).sum()) / len(rows))


def _mean(rows: Sequence[dict[str, Any]], field: str) -> float:
    return sum(row["log"][-1][field] for row in rows) / len(rows)


def _accuracy(rows: Sequence[dict[str, Any]], test: str) -> str:
    error, half = _error(rows, test)
    return f"{100 * (1 - error):.2f} ± {100 * half:.2f}"
