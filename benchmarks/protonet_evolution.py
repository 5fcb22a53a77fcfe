"""Does a population learn what backpropagation learns? Prototypical networks on Omniglot, by evolution alone and by its twin.

A Conv4 embeds drawings; a query belongs to the class whose prototype, the mean of its support drawings, is nearest by squared
Euclidean distance. Trained on episodes of characters in four rotations, sampled on the device; tested on 1,000 episodes of
characters that training never saw, with 15 queries a class and BatchNorm by running statistics, as the reference does it
(non-transductive). The split is Vinyals' (see `omniglot.py`).

Evolution and its twin share all of this file but the line that makes a gradient: `estimate_by_blocks`, or `jax.grad`. A
generation's members all see the same episodes; the running statistics follow the mean's. On CPUs each layer has a population
of its own, larger for deeper ones, which cost less; and episodes are of 20 classes and few drawings, which tell more than 5
classes of many do (found on validation characters: 94.3 % in place of 91.5 % after 1,200 generations, width 8).

Training is kept on disk and goes on where it was stopped, so `ev3-distill bench protonet --out DIR` can be given again until it
is done. Its speed is of the machine, and its log and weights follow from seed and recipe: sums are in fixed order.

Width 64 is trained where an accelerator is at hand, and is unproven elsewhere; what the widths that were trained let one expect
of it, by a power law, is told beside.

References:
  Distributed evolution strategies using TPUs for meta-learning. arXiv 2201.00093: 98.4 % (5-way 5-shot), 99.1 % with larger
    populations, and 99.6 % by backpropagation.
  Snell, Swersky and Zemel: Prototypical networks for few-shot learning. 2017: 99.7 % after 60-way training.
"""

import dataclasses
import hashlib
import inspect
import io
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ev3_distill import students
from ev3_distill.benchmarks import omniglot, statistics
from ev3_distill.evolution import (
    Block,
    Population,
    all_parameters,
    estimate_by_blocks,
    layerwise,
    lowrank,
    noise,
    parameters_named,
    population,
    shaping,
)
from ev3_distill.runtime import distributed
from ev3_distill.runtime.compile import compiler_options
from ev3_distill.runtime.files import atomic_write, cache_root
from ev3_distill.students.layers import conv
from ev3_distill.types import Network, PyTree, Variables

KEY = ("seed", "contender")  # identifies a row
TIMED = ("seconds",)  # depend on the machine
INTERVALS = (
    "Intervals in the table are over the test episodes of the networks that were trained: they do not include "
    "the spread between trainings. A gap to the twin has a t interval over seeds, if there are several."
)
LAYERS = 4
SHAPE = (omniglot.SIDE, omniglot.SIDE, 1)
TESTS = ((5, 5), (5, 1), (20, 5), (20, 1))  # way, shot
TEST_QUERY = 15
EPISODES = {"full": 1000, "smoke": 20}
KEEP_S = 30  # between states that are kept
GAP = 0.012  # to the twin of the same width, at most: the paper's own
HEADLINE = {"evolution, width 64": 0.984, "backprop, width 64": 0.995}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an embedding is trained."""

    width: int
    pairs: tuple[int, ...] | None  # of a population of the whole network, or of one per layer; None for backpropagation
    generations: int  # or steps
    rate: float  # of Adam, falling to zero along half a cosine
    sigma: float = 0.05  # at first; it falls to a fifth along with the rate
    rank: int | None = None
    way: int = 5
    shot: int = 5
    query: int = 5
    episodes: int = 1  # that a generation's members see
    chunks: tuple[int | None, ...] = (None, None, None, None)  # of each population, pairs at once

    @property
    def contender(self) -> str:
        """Its name."""
        return f"{'backprop' if self.pairs is None else 'evolution'}, width {self.width}"


LARGER = (1, 8, 16, 64)  # pairs at once: a layer deeper, a quarter of the pixels
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


class Training(NamedTuple):
    """What training needs to go on."""

    params: PyTree  # by path; those that are trained
    stats: PyTree
    opt_state: PyTree
    generation: jax.Array  # int32


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per seed and contender.

    Args:
      seeds: initial parameters, episodes and noise.
      size: full, with width 64 where there is an accelerator, or smoke: 20 generations of width 4, which prove nothing.
      done: keys of rows to leave out.
    """
    characters = omniglot.load()
    recipes = RECIPES[size]
    if size == "full" and jax.default_backend() != "cpu":
        recipes += RECIPES["accelerator"]
    for recipe in recipes:
        for seed in range(seeds):
            if (seed, recipe.contender) not in done:
                yield {"seed": seed, "contender": recipe.contender, **trained(recipe, seed, characters, EPISODES[size])}


def trained(recipe: Recipe, seed: int, characters: omniglot.Characters, episodes: int) -> dict[str, Any]:
    """Trains, going on from what was kept, and tests.

    Args:
      recipe: how.
      seed: of all that is random.
      characters: their three sets; validation is left for whoever looks for recipes.
      episodes: of each test.

    Returns:
      The row's facts: accuracies over episodes with half a 95 % interval, the log, the cost and a digest of the weights.
    """
    network = students.named(f"conv4:width={recipe.width}", SHAPE, 1)
    directory = cache_root() / "protonet" / digest(recipe, seed)
    state, log = trained_state(recipe, seed, network, characters, directory)
    variables = variables_of(network, state)
    accuracies = {}
    for way, shot in TESTS:
        found = tested(network, variables, characters.test, way=way, shot=shot, episodes=episodes)
        half = 1.96 * found.std(ddof=1) / np.sqrt(len(found))
        accuracies[f"{way}-way {shot}-shot"] = [float(found.mean()), float(half)]
    weights = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(variables))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    facts = {"accuracy": accuracies, "log": log, "parameters": size, "episodes": episodes}
    return {**facts, "recipe": dataclasses.asdict(recipe), "weights": hashlib.sha256(weights).hexdigest()[:16]}


def trained_state(
    recipe: Recipe, seed: int, network: Network, characters: omniglot.Characters, directory: Path
) -> tuple[Training, list[dict[str, float]]]:
    """The state after all generations, and what was seen every hundredth of the way."""
    mesh = distributed.mesh_of()
    advance = _advance(recipe, network, mesh)
    state = jax.tree.map(np.asarray, begun(recipe, network, jax.random.key(seed)))
    log: list[dict[str, float]] = []
    path = directory / "state.npz"
    if kept := distributed.as_first(path.read_bytes() if distributed.first() and path.exists() else b""):
        state, log = _restored(kept, state)
    every = max(1, recipe.generations // 100)
    fixed = distributed.replicate((np.asarray(jax.random.key_data(jax.random.key(seed))), characters.train), mesh)
    state, kept_at, spent = distributed.replicate(state, mesh), time.monotonic(), log[-1]["seconds"] if log else 0.0
    began = time.monotonic() - spent
    while (at := int(state.generation)) < recipe.generations:
        state, seen = advance(*fixed, state, np.int32(min(every, recipe.generations - at)))
        seconds = time.monotonic() - began
        score = round(float(seen), 5)
        log.append({"generation": int(state.generation), "seconds": round(seconds, 1), "log_likelihood": score})
        last = int(state.generation) == recipe.generations
        if last or time.monotonic() - kept_at > KEEP_S:
            _keep(directory, state, log)
            kept_at = time.monotonic()
            if distributed.first():
                print(f"bench protonet: {recipe.contender}, {log[-1]}", file=sys.stderr, flush=True)
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state), log


def begun(recipe: Recipe, network: Network, key: jax.Array) -> Training:
    """Training before its first generation."""
    variables = network.init(key)
    params = parameters_named("convs", "norms")(variables.params).selected
    return Training(params, variables.stats, _optimizer(recipe).init(params), jnp.int32(0))


def variables_of(network: Network, state: Training) -> Variables:
    """All of the network's; its head, which no embedding needs, is zero."""
    shapes = jax.eval_shape(network.init, jax.random.key(0)).params
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return Variables(parameters_named("convs", "norms")(params).join(state.params), state.stats)


def _annealed(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    """From 1 down to 0 along half a cosine."""
    return optax.cosine_decay_schedule(1.0, recipe.generations)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(recipe.rate, recipe.generations))


def _advance(recipe: Recipe, network: Network, mesh: jax.sharding.Mesh) -> Callable[..., tuple[Training, jax.Array]]:
    """(key data, drawings, state, generations) -> (state, the last one's mean log-likelihood), jitted."""
    spread = distributed.spread_over(mesh, fixed_order=True)
    optimizer = _optimizer(recipe)

    def generation(key: jax.Array, drawings: jax.Array, state: Training) -> tuple[Training, jax.Array]:
        now = jax.random.fold_in(key, state.generation)
        of_data, of_noise = jax.random.split(now)
        episodes = jax.vmap(lambda k: omniglot.episode(k, drawings, way=recipe.way, images=recipe.shot + recipe.query))(
            jax.random.split(of_data, recipe.episodes)
        )

        def fitness(params: PyTree, _: jax.Array) -> jax.Array:
            variables = variables_of(network, state._replace(params=params))
            score = [likelihood(network, variables, e, recipe.shot)[0] for e in episodes]
            return sum(score[1:], score[0]) / len(score)

        if recipe.pairs is None:
            seen, gradient = jax.value_and_grad(fitness)(state.params, now)
        else:
            sigma = recipe.sigma * (0.2 + 0.8 * _annealed(recipe)(state.generation))
            blocks = _blocks(recipe, sigma)
            gradient, stats = estimate_by_blocks(of_noise, state.params, fitness, blocks, spread=spread)
            seen = stats.mean
        updates, opt_state = optimizer.update(optax.tree.scale(-1, gradient), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        moved = likelihood(network, variables_of(network, state._replace(params=params)), episodes[0], recipe.shot)[2]
        return Training(params, moved.stats, opt_state, state.generation + 1), seen

    def advance(key: jax.Array, drawings: jax.Array, state: Training, count: jax.Array) -> tuple[Training, jax.Array]:
        def one(_: jax.Array, now: tuple[Training, jax.Array]) -> tuple[Training, jax.Array]:
            return generation(jax.random.wrap_key_data(key), drawings, now[0])

        moved: tuple[Training, jax.Array] = jax.lax.fori_loop(0, count, one, (state, jnp.float32(0)))
        return moved

    return jax.jit(distributed.everywhere(advance, mesh), compiler_options=compiler_options())


def _blocks(recipe: Recipe, sigma: jax.Array) -> list[Block]:
    """Populations: of the network, or of its layers, each a convolution with its BatchNorm."""
    assert recipe.pairs is not None
    subspaces = [all_parameters] if len(recipe.pairs) == 1 else [parameters_named(rf"\[{i}\]") for i in range(LAYERS)]
    sizes = zip(subspaces, recipe.pairs, recipe.chunks[: len(subspaces)], strict=True)
    return [
        Block(subspace, Population(pairs=pairs, sigma=sigma, rank=recipe.rank, chunk=chunk))
        for subspace, pairs, chunk in sizes
    ]


def likelihood(
    network: Network, variables: Variables, images: jax.Array, shot: int, *, train: bool = True
) -> tuple[jax.Array, jax.Array, Variables]:
    """Of an episode [way, shot + query, H, W, 1]: mean log-likelihood and accuracy of its queries; moved statistics.

    p(class k) is the softmax over -|embedding - prototype_k|^2.
    """
    assert network.features is not None
    way, count = images.shape[:2]
    (_, found), moved = network.features(variables, images.reshape(-1, *SHAPE), train=train)
    embedded = found["embedding"].reshape(way, count, -1)
    prototypes, queries = embedded[:, :shot].mean(axis=1), embedded[:, shot:]
    # |q - p|^2 without |q|^2, which all classes share
    logits = 2 * queries @ prototypes.T - jnp.square(prototypes).sum(-1)
    own = jnp.arange(way)[:, None, None]
    at_own = jnp.take_along_axis(jax.nn.log_softmax(logits), own, -1)
    hits = jnp.argmax(logits, -1) == own[..., 0]
    return at_own.mean(), hits.mean(), moved


def tested(
    network: Network, variables: Variables, drawings: np.ndarray, *, way: int, shot: int, episodes: int
) -> np.ndarray:
    """Accuracy in each of so many episodes, by running statistics; the same episodes for all networks."""

    def one(key: jax.Array) -> jax.Array:
        images = omniglot.episode(key, jnp.asarray(drawings), way=way, images=shot + TEST_QUERY)
        return likelihood(network, variables, images, shot, train=False)[1]

    keys = jax.random.split(jax.random.key(way * 100 + shot), episodes)
    run = jax.jit(lambda keys: jax.lax.map(one, keys), compiler_options=compiler_options())
    return np.asarray(run(keys), np.float64)


# What is kept.


def digest(recipe: Recipe, seed: int) -> str:
    """Of all that a training follows from; what is only told of it is no part of that."""
    rooms: list[Any] = [
        omniglot,
        population,
        shaping,
        layerwise,
        noise,
        lowrank,
        distributed,
        conv,
        sys.modules["ev3_distill.students.families.conv4"],
    ]
    rooms += [Recipe, Training, begun, variables_of, _annealed, _optimizer, _advance, _blocks, likelihood]
    text = "".join(inspect.getsource(room) for room in rooms) + f"{LAYERS} {SHAPE} {recipe} {seed} {jax.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _keep(directory: Path, state: Training, log: list[dict[str, float]]) -> None:
    if not distributed.first():
        return
    directory.mkdir(parents=True, exist_ok=True)
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    with atomic_write(directory / "state.npz") as file:
        np.savez(file, log=json.dumps(log), **leaves)  # type: ignore[arg-type]  # as numpy's stub has it


def _restored(kept: bytes, like: Training) -> tuple[Training, list[dict[str, float]]]:
    leaves, treedef = jax.tree.flatten(like)
    with np.load(io.BytesIO(kept)) as saved:
        return jax.tree.unflatten(treedef, [saved[f"leaf{i}"] for i in range(len(leaves))]), json.loads(
            str(saved["log"])
        )


# What is told.


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's accuracies, and the seconds that it trained."""
    return {**{test: accuracy for test, (accuracy, _) in row["accuracy"].items()}, "seconds": row["log"][-1]["seconds"]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracies on unseen characters, and each population's gap to its twin."""
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    tests = [f"{way}-way {shot}-shot" for way, shot in TESTS]
    found = {name: [row for row in rows if row["contender"] == name] for name in contenders}
    body = [
        [name, f"{of[0]['parameters']:,}", f"{of[0]['recipe']['generations']:,}", f"{_mean(of, 'seconds'):,.0f}",
         *[_accuracy(of, test) for test in tests]]
        for name, of in found.items()
    ]  # fmt: skip
    told = []
    for name, of in found.items():
        twin = found.get(name.replace("evolution", "backprop"))
        if name.startswith("evolution") and twin is not None:
            gap = statistics.paired(*[[row["accuracy"][tests[0]][0] for row in side] for side in (twin, of)])
            verdict = statistics.verdict(gap._replace(center=-gap.center, low=-gap.high, high=-gap.low), -GAP)
            told.append(
                f"{name}: {statistics.percent(gap, 2)} points behind its twin, at most {100 * GAP:g}: {verdict}"
            )
    for name, target in HEADLINE.items():
        if name in found:
            accuracy = statistics.mean([row["accuracy"][tests[0]][0] for row in found[name]])
            told.append(f"{name}: target ≥ {100 * target:g} %: {statistics.verdict(accuracy, target)}")
        else:
            told.append(
                f"{name}: target ≥ {100 * target:g} %: unproven, no accelerator was at hand{_guessed(found, name)}"
            )
    header = ["contender", "parameters", "generations", "seconds", *[f"{test}, %" for test in tests]]
    episodes = rows[0]["episodes"]
    return "\n\n".join(
        [
            f"Accuracy on characters that training never saw, {episodes:,} episodes (95 % interval over episodes, of the mean "
            "over seeds):",
            statistics.markdown(header, body),
            "; ".join(told) + ".",
        ]
    )


def _guessed(found: Mapping[str, Sequence[dict[str, Any]]], name: str) -> str:
    """What the two widest networks of the kind let one expect of a wider one, where there are two."""
    kind, _, width = name.partition(", width ")
    known = {int(other.split()[-1]): rows for other, rows in found.items() if other.startswith(kind)}
    if len(known) < 2:
        return ""
    narrow, wide = sorted(known)[-2:]
    guess = extrapolated(
        {w: _error(known[w], f"{TESTS[0][0]}-way {TESTS[0][1]}-shot") for w in (narrow, wide)}, int(width)
    )
    return (
        f"; if the share of errors fell with width as a power, as from {narrow} to {wide}, it would have "
        f"{statistics.percent(guess, 1)} (interval over episodes alone; that a power goes on so far is an assumption)"
    )


def extrapolated(errors: Mapping[int, tuple[float, float]], width: int) -> statistics.Interval:
    """The accuracy at a width, if the error is a power of it through two that are known.

    error(w) = e_2 (w / w_2)^b with b = log(e_2 / e_1) / log(w_2 / w_1): log error is linear in those known, which gives its
    standard error by theirs.

    Args:
      errors: by width, two of them: the share of queries that are wrong, and half its 95 % interval.
      width: asked for.
    """
    (w1, (e1, half1)), (w2, (e2, half2)) = sorted(errors.items())
    reach = np.log(width / w2) / np.log(w2 / w1)
    center = np.log(e2) + reach * np.log(e2 / e1)
    half = float(np.hypot((1 + reach) * half2 / e2, reach * half1 / e1))
    low, middle, high = (1 - float(np.exp(center + sign * half)) for sign in (1, 0, -1))
    return statistics.Interval(middle, low, high, 2, statistics.CONFIDENCE)


def _error(rows: Sequence[dict[str, Any]], test: str) -> tuple[float, float]:
    """The share of wrong answers, the mean over seeds, and half its interval over episodes."""
    centers, halves = zip(*[row["accuracy"][test] for row in rows], strict=True)
    return 1 - float(np.mean(centers)), float(np.sqrt(np.square(halves).sum()) / len(rows))


def _mean(rows: Sequence[dict[str, Any]], field: str) -> float:
    return sum(row["log"][-1][field] for row in rows) / len(rows)


def _accuracy(rows: Sequence[dict[str, Any]], test: str) -> str:
    error, half = _error(rows, test)
    return f"{100 * (1 - error):.2f} ± {100 * half:.2f}"
