"""The 1-dimensional problem of EvoGrad's paper: l(x, lambda) = (x - 1)^2 + lambda x^2 and V(x) = (x - 1/2)^2.

Training to convergence, x* = 1 / (1 + lambda), has the hypergradient (lambda - 1) / (lambda + 1)^3. The published setting
starts from x ~ N(0, 1), with copies of sigma 1 and tau .5. Its mean over both tends to 8 (8 lambda - 7) / (5 + 4 lambda)^3 as
K grows, because weighted copies are then Gaussian with variance 1 / (5 + 4 lambda) and mean (4 + x) / (5 + 4 lambda).

Reference:
  Bohdal et al., EvoGrad: Efficient gradient-based meta-learning and hyperparameter optimization, 2021, section 4.1.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ev3_distill.benchmarks import statistics
from ev3_distill.hypergrad import hypergradient
from ev3_distill.types import PyTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAMBDAS = np.linspace(0.1, 2, 20)
TRIALS = {"full": 200, "smoke": 4}  # per row
COPIES = {"full": (2, 10, 100, 1000), "smoke": (2, 10)}
PUBLISHED: dict[str, Any] = {"method": "evograd", "sigma": 1.0, "tau": 0.5, "noise": "gaussian"}
SHARP = PUBLISHED | {"tau": 0.02}
STARTS = ((-1.8, 0.2), (-0.9, 1.2), (0.9, 0.8), (1.3, 0.2), (1.5, 1.7))  # (x, lambda) of the paper's trajectories
MOVES, RATE = 5, 0.1  # of a trajectory
HORIZON = 100  # steps of rate RATE from a random start

Estimate = Callable[[jax.Array, jax.Array], jax.Array]  # (key, lambda) -> hypergradient


def train_loss(x: PyTree, lam: PyTree, step: Any) -> jax.Array:
    """l(x, lambda)."""
    return (x - 1) ** 2 + lam * x**2


def val_loss(x: PyTree) -> jax.Array:
    """V(x)."""
    return (x - 0.5) ** 2


def truth(lam: Any) -> Any:
    """dV(x*) / dlambda."""
    return (lam - 1) / (lam + 1) ** 3


def closed_form(lam: Any) -> Any:
    """The limit of the published setting as K grows."""
    return 8 * (8 * lam - 7) / (5 + 4 * lam) ** 3


def estimates(size: str) -> dict[str, Estimate]:
    """Contenders by name: the published setting by number of copies, a small tau at x*, and exact methods."""

    def from_anywhere(key: jax.Array, lam: jax.Array, **options: Any) -> jax.Array:
        at, own = jax.random.split(key)
        return hypergradient(own, jax.random.normal(at), lam, train_loss, val_loss, **options)[0]

    def at_optimum(key: jax.Array, lam: jax.Array, **options: Any) -> jax.Array:
        return hypergradient(key, 1 / (1 + lam), lam, train_loss, val_loss, **options)[0]

    def newton(key: jax.Array, lam: jax.Array, method: str) -> jax.Array:  # one step with the rate that leads to x*
        return at_optimum(key, lam, method=method, optimizer=optax.sgd(1 / (2 * (1 + lam))))

    def trained(key: jax.Array, lam: jax.Array, method: str) -> jax.Array:
        return from_anywhere(key, lam, method=method, optimizer=optax.sgd(RATE), steps=HORIZON)

    most = COPIES[size][-1]
    return {
        **{
            f"evograd, K = {k:,}": functools.partial(from_anywhere, **PUBLISHED, copies=k, at_once=k)
            for k in COPIES[size]
        },
        f"evograd at x*, tau .02, K = {most:,}": functools.partial(at_optimum, **SHARP, copies=most, at_once=most),
        **{
            f"{method} at x*, Newton's rate": functools.partial(newton, method=method)
            for method in ("jvp", "guided", "t1t2")
        },
        **{
            f"{method}, {HORIZON} steps": functools.partial(trained, method=method)
            for method in ("unrolled", "forward")
        },
    }


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """A row per seed and contender, with the sum and the sum of squares of its trials at each lambda; then trajectories."""
    contenders = estimates(size)
    for seed in range(seeds):
        for number, (name, estimate) in enumerate(contenders.items()):
            if ("one dimension", name, seed) in done:
                continue
            keys = jax.random.split(jax.random.key(1000 * seed + number), (len(LAMBDAS), TRIALS[size]))
            over = jax.jit(jax.vmap(jax.vmap(estimate, (0, None)), (0, 0)))
            values = np.asarray(over(keys, jnp.asarray(LAMBDAS, jnp.float32)), float)
            yield {
                "question": "one dimension", "contender": name, "seed": seed, "trials": TRIALS[size],
                "sum": values.sum(1).tolist(), "squares": np.square(values).sum(1).tolist(),
            }  # fmt: skip
    for k in COPIES[size][:3]:
        if ("trajectory", f"K = {k}", 0) not in done:
            yield {"question": "trajectory", "contender": f"K = {k}", "seed": 0, **_trajectories(k)}


def _trajectories(copies: int) -> dict[str, Any]:
    """Joint descent in x and lambda from each start, [S, MOVES + 1] each, by evograd and by the true hypergradient."""

    def descend(start: Any, key: jax.Array, of_lambda: Callable[..., jax.Array]) -> list[tuple[float, float]]:
        x, lam = (jnp.float32(value) for value in start)
        path = [(float(x), float(lam))]
        for move in range(MOVES):
            x = x - RATE * jax.grad(train_loss)(x, lam, 0)
            lam = lam - RATE * of_lambda(jax.random.fold_in(key, move), x, lam)
            path.append((float(x), float(lam)))
        return path

    @jax.jit
    def evograd(key: jax.Array, x: jax.Array, lam: jax.Array) -> jax.Array:
        return hypergradient(key, x, lam, train_loss, val_loss, **PUBLISHED, copies=copies, at_once=copies)[0]

    keys = jax.random.split(jax.random.key(1), len(STARTS))
    return {
        "evograd": [descend(start, key, evograd) for start, key in zip(STARTS, keys, strict=True)],
        "truth": [descend(start, keys[0], lambda key, x, lam: truth(lam)) for start in STARTS],
    }


def moments(rows: Sequence[dict[str, Any]], contender: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and standard deviation over all trials at each lambda, and the trials' number."""
    mine = [row for row in rows if row["question"] == "one dimension" and row["contender"] == contender]
    n = sum(row["trials"] for row in mine)
    mean, square = (np.sum([row[of] for row in mine], 0) / n for of in ("sum", "squares"))
    return mean, np.sqrt(np.maximum(square - mean**2, 0)), n


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Each contender's mean against the truth, and its spread."""
    names = list(dict.fromkeys(row["contender"] for row in rows if row["question"] == "one dimension"))
    wanted, closed = truth(LAMBDAS), closed_form(LAMBDAS)
    body, verdicts = [], []
    for name in names:
        mean, std, n = moments(rows, name)
        error = float(np.linalg.norm(mean - wanted) / np.linalg.norm(wanted))
        away = ""
        if name.startswith("evograd, K"):
            away = f"{np.max(np.abs(mean - closed) / (std / np.sqrt(n))):.1f}"
        body.append([name, f"{error:.3f}", f"{std.mean():.3f}", away])
        if name == "evograd, K = 1,000":
            verdicts.append(f"within 3 standard errors of the closed form at K = 1,000: {_held(float(away) <= 3)}")
        if "tau .02" in name:
            verdicts.append(f"at most 0.02 from the truth at x* with tau .02: {_held(error <= 0.02)}")
    header = [
        "1-D problem",
        "error of the mean / truth",
        "spread of one trial",
        "farthest from the closed form, standard errors",
    ]
    trials = f"{moments(rows, names[0])[2]:,} trials at each of {len(LAMBDAS)} lambdas; errors are norms over them."
    return f"{statistics.markdown(header, body)}\n\n{trials} EvoGrad {'; '.join(verdicts) or 'has no target at this size'}."


def _held(holds: bool) -> str:
    return "held" if holds else "missed"


def draw(rows: Sequence[dict[str, Any]], axes: Any) -> None:
    """The paper's two plots, a row of axes each: estimates over lambda, and joint descents, by copies."""
    paths = [row for row in rows if row["question"] == "trajectory"]
    for axis, row in zip(axes[0], paths, strict=False):
        mean, std, _ = moments(rows, f"evograd, {row['contender']}")
        axis.fill_between(LAMBDAS, mean - std, mean + std, alpha=0.2, label="EvoGrad, one standard deviation")
        axis.plot(LAMBDAS, mean, label="EvoGrad, mean")
        axis.plot(LAMBDAS, truth(LAMBDAS), label="truth")
        axis.plot(LAMBDAS, closed_form(LAMBDAS), "k:", label="EvoGrad, K → ∞")
        axis.set(title=row["contender"], xlabel="λ", ylabel="hypergradient", ylim=(-2.2, 1.2))
    axes[0][0].legend(fontsize="small", frameon=False, loc="lower right")
    for axis, row in zip(axes[1], paths, strict=False):
        _draw_paths(axis, row)


def _draw_paths(axis: "Axes", row: dict[str, Any]) -> None:
    for name, color in (("truth", "C1"), ("evograd", "C0")):
        for number, path in enumerate(row[name]):
            x, lam = np.asarray(path).T
            axis.plot(x, lam, "--", color=color, label=name if number == 0 else None)
            axis.plot(x[:1], lam[:1], "o", x[-1:], lam[-1:], "*", color=color)
    axis.axvline(0.5, color="0.5", lw=0.8, ls=":")
    axis.set(title=row["contender"], xlabel="x", ylabel="λ", xlim=(-2, 2), ylim=(0, 2))
    axis.legend(fontsize="small", frameon=False)
