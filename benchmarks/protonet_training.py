"""Trains and tests a prototypical network, by an evolution strategy or by backpropagation.

A Conv4 embeds drawings. A query belongs to the class with the nearest prototype, the mean embedding of its support drawings,
by squared Euclidean distance. Both methods share everything except the gradient: `estimate_by_blocks`, or `jax.grad`. All
members of a generation see the same episodes; the running statistics of BatchNorm follow the mean network.

Training states are saved and resumed: the log and the weights depend on seed and recipe alone, because sums have a fixed
order.

Reference:
  Snell, Swersky and Zemel: Prototypical networks for few-shot learning. 2017.
"""

import dataclasses
import hashlib
import inspect
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ev3_distill.benchmarks import omniglot
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
from ev3_distill.runtime.files import atomic_write
from ev3_distill.students.layers import conv
from ev3_distill.types import Network, PyTree, Variables

LAYERS = 4
SHAPE = (omniglot.SIDE, omniglot.SIDE, 1)
TEST_QUERIES = 15  # per class
SAVE_S = 30  # seconds between saved states


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an embedding is trained."""

    width: int
    pairs: tuple[int, ...] | None  # population sizes, of the whole network or of each layer; None: backpropagation
    generations: int  # or steps
    rate: float  # initial rate of Adam; falls to zero along half a cosine
    sigma: float = 0.05  # initial; falls to a fifth along with the rate
    rank: int | None = None
    way: int = 5
    shot: int = 5
    query: int = 5
    episodes: int = 1  # per generation, the same for all members
    chunks: tuple[int | None, ...] = (None, None, None, None)  # pairs evaluated at once, per population

    @property
    def contender(self) -> str:
        """The name in a row."""
        return f"{'backprop' if self.pairs is None else 'evolution'}, width {self.width}"


class Training(NamedTuple):
    """A training state that can be resumed."""

    params: PyTree  # the trained ones, by path
    stats: PyTree
    opt_state: PyTree
    generation: jax.Array  # int32


def trained_state(
    recipe: Recipe, seed: int, network: Network, characters: omniglot.Characters, directory: Path
) -> tuple[Training, list[dict[str, float]]]:
    """The state after all generations, and a log with an entry per hundredth of them.

    Args:
      recipe: how to train.
      seed: of initial parameters, episodes and noise.
      network: the embedding.
      characters: the three sets; only `train` is used.
      directory: where states are saved and resumed.
    """
    mesh = distributed.make_mesh()
    advance = _advance(recipe, network, mesh)
    state = jax.tree.map(np.asarray, initial_state(recipe, network, jax.random.key(seed)))
    log: list[dict[str, float]] = []
    path = directory / "state.npz"
    if saved := distributed.broadcast_bytes(
        path.read_bytes() if distributed.is_first_process() and path.exists() else b""
    ):
        state, log = _load(saved, state)
    every = max(1, recipe.generations // 100)
    fixed = distributed.replicate((np.asarray(jax.random.key_data(jax.random.key(seed))), characters.train), mesh)
    state, saved_at, spent = distributed.replicate(state, mesh), time.monotonic(), log[-1]["seconds"] if log else 0.0
    began = time.monotonic() - spent
    while (at := int(state.generation)) < recipe.generations:
        state, likelihood_mean = advance(*fixed, state, np.int32(min(every, recipe.generations - at)))
        seconds = time.monotonic() - began
        score = round(float(likelihood_mean), 5)
        log.append({"generation": int(state.generation), "seconds": round(seconds, 1), "log_likelihood": score})
        last = int(state.generation) == recipe.generations
        if last or time.monotonic() - saved_at > SAVE_S:
            _save(directory, state, log)
            saved_at = time.monotonic()
            if distributed.is_first_process():
                print(f"bench protonet: {recipe.contender}, {log[-1]}", file=sys.stderr, flush=True)
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state), log


def initial_state(recipe: Recipe, network: Network, key: jax.Array) -> Training:
    """The state before the first generation."""
    variables = network.init(key)
    params = parameters_named("convs", "norms")(variables.params).selected
    return Training(params, variables.stats, _optimizer(recipe).init(params), jnp.int32(0))


def variables_of(network: Network, state: Training) -> Variables:
    """All variables of the network. Its head, which an embedding does not need, is zero."""
    shapes = jax.eval_shape(network.init, jax.random.key(0)).params
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return Variables(parameters_named("convs", "norms")(params).join(state.params), state.stats)


def _annealed(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    """A factor from 1 down to 0 along half a cosine."""
    return optax.cosine_decay_schedule(1.0, recipe.generations)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(recipe.rate, recipe.generations))


def _advance(recipe: Recipe, network: Network, mesh: jax.sharding.Mesh) -> Callable[..., tuple[Training, jax.Array]]:
    """(key data, drawings, state, generations) -> (state, mean log-likelihood of the last one); jitted."""
    spread = distributed.spread_over(mesh, fixed_order=True)
    optimizer = _optimizer(recipe)

    def generation(key: jax.Array, drawings: jax.Array, state: Training) -> tuple[Training, jax.Array]:
        now = jax.random.fold_in(key, state.generation)
        data_key, noise_key = jax.random.split(now)
        episodes = jax.vmap(lambda k: omniglot.episode(k, drawings, way=recipe.way, images=recipe.shot + recipe.query))(
            jax.random.split(data_key, recipe.episodes)
        )

        def fitness(params: PyTree, _: jax.Array) -> jax.Array:
            variables = variables_of(network, state._replace(params=params))
            score = [likelihood(network, variables, e, recipe.shot)[0] for e in episodes]
            return sum(score[1:], score[0]) / len(score)

        if recipe.pairs is None:
            mean, gradient = jax.value_and_grad(fitness)(state.params, now)
        else:
            sigma = recipe.sigma * (0.2 + 0.8 * _annealed(recipe)(state.generation))
            blocks = _blocks(recipe, sigma)
            gradient, population_stats = estimate_by_blocks(noise_key, state.params, fitness, blocks, spread=spread)
            mean = population_stats.mean
        updates, opt_state = optimizer.update(optax.tree.scale(-1, gradient), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        moved = likelihood(network, variables_of(network, state._replace(params=params)), episodes[0], recipe.shot)[2]
        return Training(params, moved.stats, opt_state, state.generation + 1), mean

    def advance(key: jax.Array, drawings: jax.Array, state: Training, count: jax.Array) -> tuple[Training, jax.Array]:
        def one(_: jax.Array, now: tuple[Training, jax.Array]) -> tuple[Training, jax.Array]:
            return generation(jax.random.wrap_key_data(key), drawings, now[0])

        moved: tuple[Training, jax.Array] = jax.lax.fori_loop(0, count, one, (state, jnp.float32(0)))
        return moved

    return jax.jit(distributed.on_all_devices(advance, mesh), compiler_options=compiler_options())


def _blocks(recipe: Recipe, sigma: jax.Array) -> list[Block]:
    """The populations: one of the whole network, or one per layer, a convolution with its BatchNorm."""
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
    """Mean log-likelihood and accuracy of an episode's queries, and the variables with updated statistics.

    p(class k) is the softmax over -|embedding - prototype_k|^2.

    Args:
      network: the embedding.
      variables: its variables.
      images: [way, shot + query, H, W, 1].
      shot: number of support images per class.
      train: whether BatchNorm normalizes by the batch.
    """
    assert network.features is not None
    way, count = images.shape[:2]
    (_, features), moved = network.features(variables, images.reshape(-1, *SHAPE), train=train)
    embedded = features["embedding"].reshape(way, count, -1)
    prototypes, queries = embedded[:, :shot].mean(axis=1), embedded[:, shot:]
    # |q - p|^2 without |q|^2, which is the same for all classes
    logits = 2 * queries @ prototypes.T - jnp.square(prototypes).sum(-1)
    own = jnp.arange(way)[:, None, None]
    at_own = jnp.take_along_axis(jax.nn.log_softmax(logits), own, -1)
    hits = jnp.argmax(logits, -1) == own[..., 0]
    return at_own.mean(), hits.mean(), moved


def episode_accuracies(
    network: Network, variables: Variables, drawings: np.ndarray, *, way: int, shot: int, episodes: int
) -> np.ndarray:
    """Accuracy in each of several episodes [episodes], with running statistics; the same episodes for all networks."""

    def one(key: jax.Array) -> jax.Array:
        images = omniglot.episode(key, jnp.asarray(drawings), way=way, images=shot + TEST_QUERIES)
        return likelihood(network, variables, images, shot, train=False)[1]

    keys = jax.random.split(jax.random.key(way * 100 + shot), episodes)
    run = jax.jit(lambda keys: jax.lax.map(one, keys), compiler_options=compiler_options())
    return np.asarray(run(keys), np.float64)


def digest(recipe: Recipe, seed: int) -> str:
    """A hash of everything that determines a training: recipe, seed, JAX's version and the source code that takes part."""
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
    rooms += [Recipe, Training, initial_state, variables_of, _annealed, _optimizer, _advance, _blocks, likelihood]
    text = "".join(inspect.getsource(room) for room in rooms) + f"{LAYERS} {SHAPE} {recipe} {seed} {jax.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _save(directory: Path, state: Training, log: list[dict[str, float]]) -> None:
    if not distributed.is_first_process():
        return
    directory.mkdir(parents=True, exist_ok=True)
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    with atomic_write(directory / "state.npz") as file:
        np.savez(file, log=json.dumps(log), **leaves)  # type: ignore[arg-type]  # numpy's stub lacks this overload


def _load(saved: bytes, like: Training) -> tuple[Training, list[dict[str, float]]]:
    leaves, treedef = jax.tree.flatten(like)
    with np.load(io.BytesIO(saved)) as arrays:
        state = jax.tree.unflatten(treedef, [arrays[f"leaf{i}"] for i in range(len(leaves))])
        return state, json.loads(str(arrays["log"]))
