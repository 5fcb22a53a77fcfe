"""Fixed recipes: a grid of losses, optimizers and rates, each of which trains a student from start to end, without EV3.

Hyperparameters are data. Recipes of one optimizer train in one program, vectorized over the recipes, on common batches; a
convolutional student trains with one recipe after another, as XLA is slow on batched kernels. Every recipe proposes the
average of its iterates, as EV3's arms do, and is scored at marks along the training.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ev3_distill import students
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.arms.optimizers import adamw, muon, sgd
from ev3_distill.arms.zoo import is_convolutional, up_and_down
from ev3_distill.config import EV3
from ev3_distill.core.assess import outputs_of
from ev3_distill.core.explore import draw_from
from ev3_distill.data import batches
from ev3_distill.runtime.compile import jit
from ev3_distill.tasks.classification import losses
from ev3_distill.types import Arm, Network, PyTree, Stretch, Variables


class Recipe(NamedTuple):
    """A loss, an optimizer and a rate. The loss is a sum of terms, with these weights."""

    ce: float = 0.0  # cross-entropy with the labels
    kd: float = 0.0  # distillation at `temperature`
    mse: float = 0.0  # squared error of logits
    trusted: float = 0.0  # `losses.trusted_kd`
    temperature: float = 4.0
    smoothing: float = 0.0  # of labels
    balance: float = 0.0  # power of the class weights: 0 none, 1 equal weight for every class
    rate: float = 1e-2
    optimizer: str = "adamw"


SGD_RATE, MUON_RATE = 0.1, 0.05
RECIPES: dict[str, Recipe] = {
    "ce": Recipe(ce=1),
    "ce@3e-3": Recipe(ce=1, rate=3e-3),
    "ce-smooth": Recipe(ce=1, smoothing=0.1),
    "ce-balanced": Recipe(ce=1, balance=1),
    "ce-sgd": Recipe(ce=1, optimizer="sgd", rate=SGD_RATE),
    "ce-muon": Recipe(ce=1, optimizer="muon", rate=MUON_RATE),
    "kd1": Recipe(kd=0.9, ce=0.1, temperature=1),
    "kd2": Recipe(kd=0.9, ce=0.1, temperature=2),
    "kd4": Recipe(kd=0.9, ce=0.1),
    "kd4@3e-3": Recipe(kd=0.9, ce=0.1, rate=3e-3),
    "kd4@3e-2": Recipe(kd=0.9, ce=0.1, rate=3e-2),
    "kd4-half": Recipe(kd=0.5, ce=0.5),
    "kd4-balanced": Recipe(kd=0.9, ce=0.1, balance=1),
    "kd2-sgd": Recipe(kd=0.9, ce=0.1, temperature=2, optimizer="sgd", rate=SGD_RATE),
    "kd4-muon": Recipe(kd=0.9, ce=0.1, optimizer="muon", rate=MUON_RATE),
    "mse": Recipe(mse=1),
    "trust4": Recipe(trusted=1),
}
PLAIN = "kd4"  # the usual recipe


OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {"adamw": adamw, "sgd": sgd, "muon": muon}


def _arm(network: Network, optimizer: str, values: Mapping[str, jax.Array]) -> Arm:
    """The arm of a recipe whose hyperparameters may be traced."""
    temperature, smoothing = values["temperature"], values["smoothing"]
    terms = {
        "ce": losses.cross_entropy(label_smoothing=smoothing),
        "kd": losses.kd(temperature=temperature),
        "mse": losses.logit_mse(),
        "trusted": losses.trusted_kd(temperature=temperature, label_smoothing=smoothing),
    }
    mixed = losses.mix(*((values[name], term) for name, term in terms.items()))
    anneal = up_and_down if optimizer == "muon" else None
    loss = losses.balanced(mixed, power=values["balance"])  # type: ignore[arg-type]
    return gradient_arm("recipe", network.apply, loss, OPTIMIZERS[optimizer](values["rate"]), anneal=anneal)


class Programs(NamedTuple):
    """The compiled parts of a grid, for recipes of one optimizer. A row is a recipe."""

    begin: Callable[..., PyTree]  # (seed, hyperparameters) -> arm states
    advance: Callable[
        ..., tuple[PyTree, Variables]
    ]  # (arm states, hyperparameters, pool, seed, stretch) -> states, averages
    predict: Callable[..., jax.Array]  # (averages, inputs) -> classes [R, N]


@functools.cache
def _programs(student: str, input_shape: tuple[int, ...], classes: int, optimizer: str) -> Programs:
    network = students.from_name(student, input_shape, classes)
    config = EV3()

    def begin(seed: jax.Array, values: Mapping[str, jax.Array]) -> PyTree:
        return _arm(network, optimizer, values).init(network.init(jax.random.split(jax.random.key(seed))[0]))

    def advance(
        state: PyTree, values: Mapping[str, jax.Array], pool: PyTree, seed: jax.Array, stretch: Stretch
    ) -> tuple[PyTree, Variables]:
        key = jax.random.split(jax.random.key(seed))[1]
        draw = draw_from(pool, batches.sampler(batch_size=config.batch_size), key)
        return _arm(network, optimizer, values).propose(state, draw, stretch)

    def predict(variables: Variables, inputs: jax.Array) -> jax.Array:
        return outputs_of(network.apply, variables, inputs, batch_size=config.eval_batch_size).argmax(-1)

    if is_convolutional(network.spec):  # one at a time
        return Programs(*(jit(_on_one_row(function, rows)) for function, rows in _batched(begin, advance, predict)))
    return Programs(*(jit(jax.vmap(function, in_axes=rows)) for function, rows in _batched(begin, advance, predict)))


def _batched(begin: Any, advance: Any, predict: Any) -> list[tuple[Any, tuple[int | None, ...]]]:
    """The functions with the axes of their arguments that number recipes."""
    return [(begin, (None, 0)), (advance, (0, 0, None, None, None)), (predict, (0, None))]


def _on_one_row(function: Callable[..., Any], rows: Sequence[int | None]) -> Callable[..., Any]:
    """What `vmap` over a single row would compute, without batched kernels."""

    def on_row(*arguments: Any) -> Any:
        pairs = zip(arguments, rows, strict=True)
        one = [jax.tree.map(lambda leaf: leaf[0], tree) if axis == 0 else tree for tree, axis in pairs]
        return jax.tree.map(lambda leaf: leaf[None], function(*one))

    return on_row


class Stage(NamedTuple):
    """Recipes that train together, at a mark."""

    names: list[str]  # [R]
    steps: int
    averages: Variables  # leaves [R, ...]
    predict: Callable[..., jax.Array]  # (averages, inputs) -> classes [R, N]


def stages(
    student: str,
    classes: int,
    recipes: Mapping[str, Recipe],
    pool: batches.Resident,
    *,
    seed: int,
    marks: Sequence[int],
) -> Iterator[Stage]:
    """Trains a fresh student with each recipe; yields the averages of the iterates at marks.

    Args:
      student: the network, as `--student`.
      classes: K.
      recipes: by name.
      pool: training examples.
      seed: of the initial parameters and the batches, as in an EV3 run.
      marks: steps, increasing; the last is the length of the training.
    """
    shape = tuple(pool.examples.inputs.shape[1:])
    per_step = jnp.float32(1 / marks[-1])
    for optimizer, group in _groups(student, shape, classes, recipes):
        programs = _programs(student, shape, classes, optimizer)
        values = {
            name: jnp.asarray([getattr(recipes[one], name) for one in group], jnp.float32)
            for name in Recipe._fields
            if name != "optimizer"
        }
        state, first = programs.begin(np.int32(seed), values), 0
        for mark in marks:
            stretch = Stretch(jnp.int32(first), jnp.int32(mark - first), first * per_step, per_step)
            state, averages = programs.advance(state, values, pool, np.int32(seed), stretch)
            yield Stage(group, mark, averages, programs.predict)
            first = mark


class Curve(NamedTuple):
    """Predicted classes of a recipe's average at each of M marks."""

    steps: list[int]  # [M]
    held_out: list[np.ndarray]  # [M] of [N], on the examples that may stop a training
    test: list[np.ndarray]  # [M] of [N']


def curves_of(steps: Iterator[Stage], held_out: jax.Array, test: jax.Array) -> dict[str, Curve]:
    """The curves of all recipes of a training, by name.

    Args:
      steps: as `stages` yields them.
      held_out: inputs of the examples that may stop a training.
      test: inputs of the test examples.
    """
    curves: dict[str, Curve] = {}
    for stage in steps:
        on_held, on_test = (np.asarray(stage.predict(stage.averages, inputs), np.int16) for inputs in (held_out, test))
        for row, name in enumerate(stage.names):
            curve = curves.setdefault(name, Curve([], [], []))
            curve.steps.append(stage.steps)
            curve.held_out.append(on_held[row])
            curve.test.append(on_test[row])
    return curves


def _groups(
    student: str, shape: tuple[int, ...], classes: int, recipes: Mapping[str, Recipe]
) -> list[tuple[str, list[str]]]:
    """Names of recipes that train together, with their optimizer."""
    if is_convolutional(students.from_name(student, shape, classes).spec):
        return [(recipe.optimizer, [name]) for name, recipe in recipes.items()]
    return [
        (optimizer, [name for name, recipe in recipes.items() if recipe.optimizer == optimizer])
        for optimizer in dict.fromkeys(recipe.optimizer for recipe in recipes.values())
    ]
