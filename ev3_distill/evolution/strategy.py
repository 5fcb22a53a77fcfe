"""Evolution strategies: a population around the mean, scored by anything that gives a number.

Of n antithetic pairs mean ± sigma E_i with fitness f_i+ and f_i- (higher is better), the gradient of the smoothed objective
E[f(mean + sigma E)] is estimated as g = 1 / (2 n sigma) sum_i (u_i+ - u_i-) E_i, where u is the fitness after shaping; any
optax transformation makes a step of -g. Noise is not kept: `fold_in(key of the generation, pair)` draws it once to score its
members and once more to add them up, chunk by chunk, on the device that the pair belongs to (a population whose noise fits
HOLD_BYTES draws once). Beside one mean and one optimizer state a generation holds that, or a chunk's noise, and less than 16
bytes per member (its fitness, and what ranks it).

A step of a run is a training step, one gradient of one batch, which costs about three forward passes. A generation is 2 n of
these, so an arm makes one in every 2 n / 3 steps: arms beside each other cost the same.

References:
  Salimans et al.: Evolution strategies as a scalable alternative to reinforcement learning. arXiv 1703.03864.
  Nesterov and Spokoiny: Random gradient-free minimization of convex functions. FoCM 17, 2017.
  Sarkar et al.: Evolution strategies at the hyperscale. arXiv 2511.16652, for noise of low rank.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ev3_distill.evolution.noise import Noise, full_rank, low_rank
from ev3_distill.evolution.subspace import Subspace, whole
from ev3_distill.runtime.distributed import LANES, Spread, everywhere, spread_over
from ev3_distill.types import Apply, Arm, Batch, Draw, Objective, PyTree, Stretch, Variables

# Of noise and members at once, if nobody says how many pairs that is; on CPUs what caches hold.
CHUNK_BYTES = {True: 2**20, False: 2**26}
HOLD_BYTES = 32 * 2**20  # of noise that a small population may keep: drawing it is what costs most in a small network
FORWARD_PASSES = 3  # that one training step costs

Fitness = Callable[[PyTree, jax.Array], jax.Array]  # (parameters, key of the pair) -> scalar, higher is better
Shaping = Callable[[jax.Array], jax.Array]  # fitness [n, 2], -inf for what is broken -> u+ - u- [n]


class Report(NamedTuple):
    """What a generation tells, scalars."""

    mean: jax.Array  # float32, fitness over members that have a finite one
    best: jax.Array  # float32, -inf where none has
    std: jax.Array  # float32, its standard deviation over them
    broken: jax.Array  # int32, members without: they rank last


class EvolutionState(NamedTuple):
    """What a trajectory needs to go on."""

    mean: PyTree  # parameters
    opt_state: PyTree
    generation: jax.Array  # int32


class Evolution(NamedTuple):
    """An (init, step) pair, like an optax transformation."""

    init: Callable[[PyTree], EvolutionState]
    step: Callable[[jax.Array, EvolutionState, Fitness], tuple[EvolutionState, Report]]
    # (key of the run, state, fitness) -> (state, report); within `shard_map` where it is spread


def evolution(
    optimizer: optax.GradientTransformation,
    *,
    pairs: int,
    sigma: optax.ScalarOrSchedule,
    shaping: str = "rank",
    rank: int | None = None,
    decay: float = 0.0,
    elitism: bool = False,
    chunk: int | None = None,
    spread: Spread = Spread(),  # noqa: B008  a tuple
) -> Evolution:
    """An evolution strategy.

    Args:
      optimizer: any optax transformation; it sees the mean, so it may decay weights, too.
      pairs: n; the population has 2 n members.
      sigma: standard deviation of the noise, or a schedule of it by generation.
      shaping: of fitness, a name of SHAPINGS.
      rank: of the noise on matrices and kernels; None for full-rank noise.
      decay: share of the mean that each generation takes off it, decoupled from the gradient and its optimizer.
      elitism: whether the generation's best member becomes the mean where it scores higher than the mean that was moved, on the
        member's own data, which costs one evaluation more. For fitness without noise: of noisy ones the best is a lucky one.
      chunk: pairs scored at once; None for as many as CHUNK_BYTES hold, or one of convolutions on CPUs.
      spread: over devices.
    """
    schedule = sigma if callable(sigma) else lambda generation: sigma

    def init(params: PyTree) -> EvolutionState:
        return EvolutionState(params, optimizer.init(params), jnp.int32(0))

    def step(key: jax.Array, state: EvolutionState, fitness: Fitness) -> tuple[EvolutionState, Report]:
        now = jax.random.fold_in(key, state.generation)
        how: dict[str, Any] = {"pairs": pairs, "shaping": shaping, "rank": rank, "chunk": chunk, "spread": spread}
        width = schedule(state.generation)
        gradient, report, scores = _estimated(now, state.mean, fitness, sigma=width, **how)
        descent = optax.tree.scale(-1, gradient)
        updates, opt_state = optimizer.update(descent, state.opt_state, state.mean)
        if decay:
            updates = jax.tree.map(lambda update, x: update - decay * x, updates, state.mean)
        mean = optax.apply_updates(state.mean, updates)
        if elitism:
            elite, of_data = _best(now, state.mean, scores, sigma=width, rank=rank)
            own = fitness(mean, of_data)
            wins = report.best > jnp.where(jnp.isfinite(own), own, -jnp.inf)
            mean = jax.tree.map(lambda ours, theirs: jnp.where(wins, ours, theirs), elite, mean)
        return EvolutionState(mean, opt_state, state.generation + 1), report

    return Evolution(init, step)


def estimate(
    key: jax.Array,
    mean: PyTree,
    fitness: Fitness,
    *,
    pairs: int,
    sigma: jax.typing.ArrayLike,
    shaping: str = "rank",
    rank: int | None = None,
    chunk: int | None = None,
    hold: bool | None = None,
    spread: Spread = Spread(),  # noqa: B008  a tuple
) -> tuple[PyTree, Report]:
    """The gradient of the smoothed objective, to ascend, from one population; arguments as of `evolution`.

    Args:
      key: of the generation.
      mean: parameters, floats.
      fitness: of one member. Both members of a pair get the same key, to draw data from; a fitness that ignores it has all
        members see the same.
      hold: whether noise is kept from scoring to adding up, in place of drawing it once more; None where it fits HOLD_BYTES.

    Returns:
      The estimate, of the mean's structure, and what the population told. Without shaping ("centred") it is unbiased but
      for members that are broken: these count as the worst of all others.
    """
    how: dict[str, Any] = {"shaping": shaping, "rank": rank, "chunk": chunk, "hold": hold, "spread": spread}
    return _estimated(key, mean, fitness, pairs=pairs, sigma=sigma, **how)[:2]


def _estimated(
    key: jax.Array,
    mean: PyTree,
    fitness: Fitness,
    *,
    pairs: int,
    sigma: jax.typing.ArrayLike,
    shaping: str,
    rank: int | None,
    chunk: int | None,
    spread: Spread,
    hold: bool | None = None,
) -> tuple[PyTree, Report, jax.Array]:
    """As `estimate`, and the members' fitness [n, 2], -inf for what is broken."""
    if pairs < 1 or shaping not in SHAPINGS or (chunk is not None and chunk < 1):
        raise ValueError(
            f"evolution needs pairs >= 1, chunk >= 1 if given, and a shaping of {', '.join(SHAPINGS)}; got {pairs}, {chunk}, "
            f"'{shaping}': mend these"
        )
    noise = _noise(mean, rank)
    blocks = spread.devices * spread.parts
    size = min(chunk or _fitting(mean, noise), math.ceil(pairs / blocks))
    chunks = math.ceil(pairs / (blocks * size))  # of each part
    size = math.ceil(pairs / (blocks * chunks))  # as even as can be; the last pairs of the last chunks are too many
    own = spread.parts * chunks * size
    first = spread.place() * own
    at = first + size * jnp.arange(spread.parts * chunks, dtype=jnp.int32)

    held = 4 * noise.size * own <= HOLD_BYTES if hold is None else hold

    def draw(start: jax.Array, count: int = size) -> jax.Array:
        return jax.vmap(lambda pair: noise.draw(jax.random.fold_in(key, 2 * pair)))(start + jnp.arange(count))

    def score(given: tuple[jax.Array, PyTree]) -> jax.Array:
        start, kept = given
        drawn = kept if held else draw(start)
        keys = jax.vmap(lambda pair: jax.random.fold_in(key, 2 * pair + 1))(start + jnp.arange(size))

        def one(member: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            drawn, of_data, sign = member
            return noise.member(lambda params: fitness(params, of_data), drawn, sign * sigma).astype(jnp.float32)

        members = jnp.repeat(drawn, 2, axis=0), jnp.repeat(keys, 2, axis=0), jnp.tile(jnp.array([1.0, -1.0]), size)
        apart = size == 1 and rank is None  # then one after the other, as nothing is shared
        scores = jax.lax.map(one, members) if apart else jax.vmap(one)(members)
        return scores.reshape(size, 2)

    # All at once where all is kept: drawn in the loop over chunks, an MLP's generation took 1.4 times as long on a CPU.
    kept = draw(first, own).reshape(len(at), size, -1) if held else ()
    scores = jax.lax.map(score, (at, kept))
    scores, report = _checked(spread.gather(scores.reshape(own, 2))[:pairs])
    weights = SHAPINGS[shaping](scores) / (2 * pairs * sigma)
    weights = jnp.pad(weights, (0, blocks * chunks * size - pairs))

    def add(total: PyTree, given: tuple[jax.Array, PyTree]) -> tuple[PyTree, None]:
        start, drawn = given
        some = jax.lax.dynamic_slice_in_dim(weights, start, size)
        return jax.tree.map(jnp.add, total, noise.weigh(some, drawn if held else draw(start))), None

    def part(given: tuple[jax.Array, PyTree]) -> PyTree:
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, mean), given)[0]

    by_part = jax.tree.map(lambda leaf: leaf.reshape(spread.parts, chunks, *leaf.shape[1:]), (at, kept))
    return spread.total(jax.lax.map(part, by_part)), report, scores


def _noise(mean: PyTree, rank: int | None) -> Noise:
    return full_rank(mean) if rank is None else low_rank(mean, rank)


def _best(
    key: jax.Array, mean: PyTree, scores: jax.Array, *, sigma: jax.typing.ArrayLike, rank: int | None
) -> tuple[PyTree, jax.Array]:
    """The member with the highest fitness, the first of several, and the key of its data."""
    at = jnp.argmax(scores)
    pair, sign = at // 2, 1.0 - 2.0 * (at % 2)
    noise = _noise(mean, rank)
    drawn = noise.draw(jax.random.fold_in(key, 2 * pair))
    step = noise.weigh(sign[None] * sigma, drawn[None])
    return jax.tree.map(jnp.add, mean, step), jax.random.fold_in(key, 2 * pair + 1)


def _fitting(mean: PyTree, noise: Noise) -> int:
    """Pairs whose noise and members fit; one where a CPU would convolve with kernels of many members, which it does slowly."""
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and any(leaf.ndim > 2 for leaf in jax.tree.leaves(mean)):
        return 1
    members = 2 * sum(leaf.size for leaf in jax.tree.leaves(mean))
    return max(1, CHUNK_BYTES[on_cpu] // (4 * (noise.size + members)))


def _checked(scores: jax.Array) -> tuple[jax.Array, Report]:
    """Scores with -inf for what is not finite, and what they tell."""
    sound = jnp.isfinite(scores)
    count = jnp.maximum(sound.sum(), 1)
    mean = jnp.where(sound, scores, 0).sum() / count
    std = jnp.sqrt(jnp.where(sound, jnp.square(scores - mean), 0).sum() / count)
    scores = jnp.where(sound, scores, -jnp.inf)
    return scores, Report(mean, scores.max(), std, (~sound).sum(dtype=jnp.int32))


def _ranks(scores: jax.Array) -> jax.Array:
    """Differences of ranks in [-1/2, 1/2]; a tie shares the mean of its ranks, so equal members of a pair say nothing."""
    ordered = jnp.sort(scores.reshape(-1))

    def twice(pair: jax.Array) -> jax.Array:
        below = jnp.searchsorted(ordered, pair) + jnp.searchsorted(ordered, pair, side="right")
        return below[0] - below[1]

    apart = jax.lax.map(twice, scores, batch_size=4096)
    return apart / (2 * jnp.maximum(ordered.size - 1, 1))


def _differences(scores: jax.Array) -> jax.Array:
    """Differences of fitness itself: what both members of a pair share, such as the mean, cancels."""
    filled = _filled(scores)
    return filled[:, 0] - filled[:, 1]


def _z_scores(scores: jax.Array) -> jax.Array:
    """Differences in standard deviations of the population; 0 where all are equal."""
    std = _filled(scores).std()
    return jnp.where(std > 0, _differences(scores) / jnp.where(std > 0, std, 1), 0)


def _filled(scores: jax.Array) -> jax.Array:
    """Broken members as the worst of the others."""
    sound = jnp.isfinite(scores)
    worst = jnp.where(sound.any(), jnp.where(sound, scores, jnp.inf).min(), 0)
    return jnp.where(sound, scores, worst)


SHAPINGS: dict[str, Shaping] = {"rank": _ranks, "centred": _differences, "z-score": _z_scores}


class ArmState(NamedTuple):
    """What an arm's trajectory needs to go on."""

    evolution: EvolutionState  # of the parameters that move
    student: Variables  # with the mean put in its place
    owed: jax.Array  # int32, steps that were given and not yet spent on a generation


def evolution_arm(
    name: str,
    apply: Apply,
    objective: Objective | Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    pairs: int,
    sigma: optax.ScalarOrSchedule,
    shaping: str = "rank",
    rank: int | None = None,
    decay: float = 0.0,
    elitism: bool = False,
    subspace: Callable[[PyTree], Subspace] = whole,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    length: float = 1.0,
) -> Arm:
    """An arm that follows the estimated gradient of any objective on explore, differentiable or not.

    Members are scored as the student will be: in evaluation, with its BatchNorm statistics, which stay as they are. All see the
    batch of one step.

    Args:
      name: unique within a run.
      apply: the student's forward pass, or another's that takes its variables, such as one that quantises them first.
      objective: (logits [B, K], batch) -> scores [B] or a scalar, higher is better; the mean is a member's fitness. A metric
        of a whole split comes from `goals.py`, for example goal("worst_class_accuracy", 0).score.
      optimizer: any optax transformation; it sees the parameters that move.
      subspace: which these are, see `subspace.py`.
      mesh: of one axis, over whose devices each population is spread, in fixed order where their number allows.
      length: of the trajectory, relative to the run's.
      pairs, sigma, shaping, rank, decay, elitism, chunk: as of `evolution`.
    """
    spread = Spread() if mesh is None else spread_over(mesh, fixed_order=LANES % mesh.size == 0)
    how: dict[str, Any] = {"shaping": shaping, "rank": rank, "decay": decay, "elitism": elitism}
    strategy = evolution(optimizer, pairs=pairs, sigma=sigma, chunk=chunk, spread=spread, **how)
    cost = max(1, round(2 * pairs / FORWARD_PASSES))  # steps of a generation

    def init(student: Variables) -> ArmState:
        return ArmState(strategy.init(subspace(student.params).moving), student, jnp.int32(0))

    def propose(state: ArmState, draw: Draw, stretch: Stretch) -> tuple[ArmState, Variables]:
        def generation(key: jax.Array, now: EvolutionState, student: Variables, batch: Batch) -> EvolutionState:
            join = subspace(student.params).join

            def fitness(moving: PyTree, _: jax.Array) -> jax.Array:
                logits = apply(Variables(join(moving), student.stats), batch.inputs, train=False)[0]
                return jnp.mean(objective(logits, batch))

            return strategy.step(key, now, fitness)[0]

        step = generation if mesh is None else everywhere(generation, mesh)

        def advance(i: jax.Array, now: EvolutionState) -> EvolutionState:
            batch, key = draw(stretch.start + jnp.minimum(i * cost, stretch.steps - 1))
            moved: EvolutionState = step(key, now, state.student, batch)
            return moved

        given = state.owed + stretch.steps
        now = jax.lax.fori_loop(0, given // cost, advance, state.evolution)
        student = Variables(subspace(state.student.params).join(now.mean), state.student.stats)
        return ArmState(now, student, given % cost), student

    return Arm(name, init, propose, length)
