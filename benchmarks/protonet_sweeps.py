"""What does evolution of a prototypical network depend on? A short recipe, with one setting changed at a time.

The base recipe is 600 generations at width 8, with one population per layer. Accuracy is on validation characters, 5-way
5-shot, 600 episodes: the test characters are for final recipes. The number of workers is not a setting: a trajectory does not
depend on it, only its time does (`bench evolution`).
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from ev3_distill import students
from ev3_distill.benchmarks import omniglot, protonet_evolution, protonet_training, statistics
from ev3_distill.benchmarks.protonet_training import Recipe
from ev3_distill.runtime.files import cache_root

KEY = ("seed", "what", "value")  # identifies a row
TIMED = ("seconds",)  # depend on the machine
INTERVALS = (
    "Intervals in the table are over the validation episodes of the networks that were trained: they do not "
    "include the spread between trainings."
)
WAY, SHOT = 5, 5  # of the test
EPISODES = {"full": 600, "smoke": 20}
BASE = Recipe(8, (16, 48, 128, 256), 600, 0.02, way=20, shot=2, query=1, chunks=protonet_evolution.LARGER)
SETTINGS: dict[str, tuple[float, ...]] = {
    "population": (0.25, 0.5, 1, 2),  # times that of BASE
    "sigma": (0.0125, 0.025, 0.05, 0.1, 0.2),
    "width": (4, 8, 16),
    "way": (5, 10, 20),
    "shot": (1, 2, 5),
}
SMOKE: dict[str, tuple[float, ...]] = {"population": (0.25, 0.5)}


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per seed, setting and value. BASE itself is trained once for all settings.

    Args:
      seeds: number of seeds, each with its own initial parameters, episodes and noise.
      size: full, or smoke: two values and 10 generations at width 4.
      done: keys of rows to skip.
    """
    characters, small = omniglot.load(), size == "smoke"
    base = dataclasses.replace(BASE, width=4, generations=10) if small else BASE
    measured: dict[tuple[int, Recipe], dict[str, float]] = {}
    for seed in range(seeds):
        for what, values in (SMOKE if small else SETTINGS).items():
            for value in values:
                if (seed, what, value) in done:
                    continue
                recipe = changed(base, what, value)
                if (seed, recipe) not in measured:
                    measured[seed, recipe] = _train_and_validate(recipe, seed, characters, EPISODES[size])
                yield {"seed": seed, "what": what, "value": value, **measured[seed, recipe]}


def changed(base: Recipe, what: str, value: float) -> Recipe:
    """A recipe with one setting changed."""
    if what == "population":
        assert base.pairs is not None
        return dataclasses.replace(base, pairs=tuple(max(round(value * pairs), 1) for pairs in base.pairs))
    return dataclasses.replace(base, **{what: type(getattr(base, what))(value)})


def _train_and_validate(recipe: Recipe, seed: int, characters: omniglot.Characters, episodes: int) -> dict[str, float]:
    network = students.from_name(f"conv4:width={recipe.width}", protonet_training.SHAPE, 1)
    directory = cache_root() / "protonet" / protonet_training.digest(recipe, seed)
    state, log = protonet_training.trained_state(recipe, seed, network, characters, directory)
    variables = protonet_training.variables_of(network, state)
    accuracy = protonet_training.episode_accuracies(
        network, variables, characters.validation, way=WAY, shot=SHOT, episodes=episodes
    )
    return {
        "accuracy": float(accuracy.mean()),
        "half": float(1.96 * accuracy.std(ddof=1) / np.sqrt(len(accuracy))),
        "seconds": log[-1]["seconds"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy and time for each setting and value."""
    body = []
    for what in dict.fromkeys(row["what"] for row in rows):
        for value in sorted({row["value"] for row in rows if row["what"] == what}):
            own = [row for row in rows if (row["what"], row["value"]) == (what, value)]
            accuracy = float(np.mean([row["accuracy"] for row in own]))
            half = float(np.sqrt(np.square([row["half"] for row in own]).sum()) / len(own))
            seconds = statistics.mean([row["seconds"] for row in own]).center
            body.append([f"{what} {value:g}", f"{100 * accuracy:.2f} ± {100 * half:.2f}", f"{seconds:,.0f}"])
    shown = statistics.markdown(["changed", f"{WAY}-way {SHOT}-shot, %", "seconds"], body)
    return f"Accuracy on validation characters (95 % interval over episodes, of the mean over seeds):\n\n{shown}"
