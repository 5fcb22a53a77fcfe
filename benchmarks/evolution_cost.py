"""What does a population cost? Evaluations per second, bytes per member, and memory against reverse mode.

Speed: generations of 64 antithetic pairs. All contenders run in one process and take turns of a second in varying order. The
figure is evaluations of members per second, without compilation.

- `full rank` and `rank 1`: `ev3_distill.evolution.estimate` with its defaults: noise is kept where it fits, and the
  work is spread over all devices of all processes; the other contenders have one device;
- `ask, vmap, tell`: the usual way, written here: all noise and all members at once, [N, P] each, and `vmap` over members;
- `evosax`: Open-ES of that library, if it is installed (it is not a dependency), the same way;
- `no noise`: forward passes of the mean on as many examples as the members see, in batches as large as those of `rank 1`.

Memory of a population: temporary buffers of the compiled generation of a Conv4 with 64 filters, as XLA reports them. The usual
way would hold N P floats of noise and as many of members. The peak resident set is that of a process that runs one
generation.

Memory against reverse mode: temporary buffers of one compiled evaluation of a member, its noise and parameters included,
beside those of the reverse-mode gradient of the same loss, for a Conv4 with 8 filters on 28x28 images. Two tasks grow:

- inner steps: a learner takes T steps of gradient descent on 25 images before its loss on 25 others counts (MAML, arXiv
  1703.03400);
- images: an episode of n images is embedded as a whole with batch statistics, or in parts of 50 with running statistics. An
  evaluation can work in parts. Reverse mode gains nothing from that, because it keeps the activations of all parts.
"""

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from ev3_distill.benchmarks import population_memory, population_speed, statistics
from ev3_distill.types import PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = ("seed", "question", "at")  # identifies a row
TIMED = ("per_s",)  # depend on the machine
REPETITION = "turn"
INTERVALS = (
    "Speeds are medians over turns, with distribution-free intervals between order statistics; ratios are "
    "taken within a turn. Memory is counted once: compiled programs have a fixed size."
)
PAIRS = {"full": 64, "smoke": 4}
STUDENTS: dict[str, dict[str, tuple[int, ...]]] = {
    "full": {"mlp:hidden=64-64": (64,), "conv4:width=8": (28, 28, 1), "conv4:width=64": (28, 28, 1)},
    "smoke": {"mlp:hidden=16": (8,)},
}
MEMBERS = {"full": (1024, 8192, 65536), "smoke": (64, 128)}
STEPS = {"full": (1, 4, 16, 32, 64, 256), "smoke": (2,)}
IMAGES = {"full": (50, 200, 800, 3200), "smoke": (50,)}
TURN_S = {"full": 1.0, "smoke": 0.01}  # approximate seconds of a contender's turn: whole generations
TARGETS = {"full rank": ("ask, vmap, tell", 1.0), "rank 1": ("no noise", 0.7)}
BYTES_PER_MEMBER, AT_MOST = (
    16,
    64 * 2**20,
)  # allowed bytes per member; and of noise and optimizer for the largest population
MANY = 40  # times less memory than reverse mode: the paper's figure


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per turn and student for speed; one per length for memory, which has no seed.

    Args:
      seeds: number of turns.
      size: full, or smoke: tiny problems whose figures mean nothing.
      done: keys of rows to skip.
    """
    yield from _memory(size, done)
    for name in STUDENTS[size]:
        if all((seed, "speed", name) in done for seed in range(seeds)):
            continue
        contenders = population_speed.contenders(name, STUDENTS[size][name], PAIRS[size])
        for work in contenders.values():
            jax.block_until_ready(work(jax.random.key(0)))  # compiles
        times = {name: max(1, round(TURN_S[size] / _seconds(work, 1))) for name, work in contenders.items()}
        for seed in range(seeds):
            if (seed, "speed", name) in done:
                continue
            speed = {}
            for i in range(len(contenders)):
                contender = list(contenders)[(seed + i) % len(contenders)]
                members = 2 * PAIRS[size] * times[contender]
                speed[contender] = round(members / _seconds(contenders[contender], times[contender], seed), 2)
            speed = {contender: speed[contender] for contender in contenders}
            yield {"seed": seed, "question": "speed", "at": name, "per_s": speed, "devices": jax.device_count()}


def _seconds(work: Callable[[jax.Array], PyTree], times: int, seed: int = 0) -> float:
    """Seconds of so many generations."""
    began = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(work(jax.random.key(seed)))
    return time.perf_counter() - began


def _memory(size: str, done: Collection[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    width = 64 if size == "full" else 4
    questions: list[tuple[str, Sequence[int], Callable[[int], dict[str, Any]]]] = [
        ("members", MEMBERS[size], functools.partial(population_memory.of_population, width=width)),
        ("resident", MEMBERS[size][:: len(MEMBERS[size]) - 1], population_memory.of_process),
        ("inner steps", STEPS[size], population_memory.of_unrolled),
        ("images", IMAGES[size], population_memory.of_episode),
    ]
    for question, lengths, measure in questions:
        for length in lengths:
            if (0, question, length) not in done:
                yield {"seed": 0, "question": question, "at": length, **measure(length)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Speeds with the ratios that have targets, and memory by length."""
    parts = [_speeds([row for row in rows if row["question"] == "speed"])]
    parts.append(_populations([row for row in rows if row["question"] in ("members", "resident")]))
    parts.extend(_against(question, rows) for question in ("inner steps", "images"))
    return "\n\n".join(parts)


def _speeds(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["at"] for row in rows))
    speeds = {
        name: {c: [row["per_s"][c] for row in rows if row["at"] == name] for c in rows[0]["per_s"]} for name in names
    }
    body = [
        [f"`{name}`", *[statistics.spread(statistics.median(values), 1) for values in speeds[name].values()]]
        for name in names
    ]
    verdicts = []
    for ours, (other, target) in TARGETS.items():
        for name in names:
            ratios = [a / b for a, b in zip(speeds[name][ours], speeds[name][other], strict=True)]
            ratio = statistics.median(ratios)
            verdicts.append(
                f"`{name}`, {ours} / {other}: {statistics.spread(ratio, 2)}, target ≥ {target:g}: "
                f"{statistics.verdict(ratio, target)}"
            )
    return "\n\n".join(
        [
            f"Evaluations of members per second (medians over turns){_spread(rows[0]['devices'])}:",
            statistics.markdown(["student", *rows[0]["per_s"]], body),
            "\n".join(f"- {verdict}" for verdict in verdicts),
        ]
    )


def _spread(devices: int) -> str:
    return "" if devices == 1 else f", full rank and rank 1 on {devices} devices, the others on one"


def _populations(rows: Sequence[dict[str, Any]]) -> str:
    compiled = [row for row in rows if row["question"] == "members"]
    peaks = {row["at"]: row for row in rows if row["question"] == "resident"}
    body = [
        [
            f"{row['at']:,}",
            _mib(row["bytes"]),
            _mib(row["bytes"] + row["optimizer"]),
            _mib(2 * 4 * row["at"] * row["parameters"]),
            _mib(peaks[row["at"]]["bytes"]) if row["at"] in peaks else "",
        ]
        for row in compiled
    ]
    (first, last), largest = (compiled[0], compiled[-1]), compiled[-1]
    slope = (last["bytes"] - first["bytes"]) / (last["at"] - first["at"])
    few, many = peaks[min(peaks)], peaks[max(peaks)]
    resident_slope = (many["bytes"] - few["bytes"]) / (many["at"] - few["at"])
    held = "held" if slope <= BYTES_PER_MEMBER else "missed"
    state = largest["bytes"] + largest["optimizer"]
    fits = "held" if state <= AT_MOST else "missed"
    header = [
        "members",
        "generation, MiB",
        "with Adam, MiB",
        "all at once, MiB",
        "peak resident set (MLP), MiB",
    ]
    return "\n\n".join(
        [
            f"Buffers of a generation of a Conv4 of {last['parameters']:,} parameters, a member's activations included:",
            statistics.markdown(header, body),
            f"Per member: {slope:.1f} bytes compiled, {resident_slope:.1f} resident, at most {BYTES_PER_MEMBER}: {held}; "
            f"in all {_mib(state)} MiB at {largest['at']:,} members, at most {_mib(AT_MOST)}: {fits}.",
        ]
    )


def _against(question: str, rows: Sequence[dict[str, Any]]) -> str:
    rows = sorted((row for row in rows if row["question"] == question), key=lambda row: row["at"])
    ours = "in parts" if "in parts" in rows[0] else "evaluation"
    body = [
        [
            f"{row['at']:,}",
            *([_mib(row["evaluation"])] if ours == "in parts" else []),
            _mib(row[ours]),
            _mib(row["reverse"]),
            f"{row['reverse'] / row[ours]:.1f}",
        ]
        for row in rows
    ]
    whole = ["evaluation, whole"] if ours == "in parts" else []
    header = [question, *[f"{name}, MiB" for name in (*whole, ours, "reverse mode")], "ratio"]
    reached = [row["at"] for row in rows if row["reverse"] >= MANY * row[ours]]
    where = f"from {reached[0]:,} {question} on" if reached else f"not up to {rows[-1]['at']:,} {question}"
    return f"{statistics.markdown(header, body)}\n\n{MANY} times less than reverse mode: {where}."


def _mib(count: float) -> str:
    return statistics.number(count / 2**20, 2 if count < 2**27 else 0)


def plot(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Memory of an evaluation and of reverse mode over the length of the task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, question in zip(figure.subplots(1, 2), ("inner steps", "images"), strict=True):
        lengths = sorted((row for row in rows if row["question"] == question), key=lambda row: row["at"])
        for name in ("evaluation", "in parts", "reverse"):
            if name in lengths[0]:
                axes.plot(
                    [row["at"] for row in lengths], [row[name] / 2**20 for row in lengths], marker="o", label=name
                )
        axes.set(xlabel=question, ylabel="temporary buffers, MiB", xscale="log", yscale="log")
        axes.legend(fontsize="small", frameon=False)
    return figure
