"""`flax:DIR`, a network of this project: a run's student or teacher, or one that `ev3-distill teach` trained."""

import json
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.runtime.compile import jit
from ev3_distill.runtime.digest import leaf_bytes
from ev3_distill.students import count_params, feature_shapes
from ev3_distill.teachers.loading import digest_of
from ev3_distill.teachers.preprocessing import IDENTITY, read_beside
from ev3_distill.teachers.teacher import Model, Request, Teacher, teacher_of
from ev3_distill.types import Network, Variables


def forward(network: Network, variables: Variables, *, batch_size: int = 1024) -> Callable[[np.ndarray], np.ndarray]:
    """The network's logits as a function of NumPy inputs [N, ...] -> [N, K] float32, in chunks of `batch_size`."""
    apply = jit(lambda inputs: network.apply(variables, inputs, train=False)[0])

    def logits(inputs: np.ndarray) -> np.ndarray:
        starts = range(0, len(inputs), batch_size)
        return np.concatenate([np.asarray(apply(inputs[i : i + batch_size])) for i in starts])

    return logits


def outputs_of(
    network: Network, variables: Variables, features: Sequence[str], *, batch_size: int = 1024
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """As `forward`, with features of the network by name beside the logits."""
    found = network.features
    if not features or found is None:
        logits = forward(network, variables, batch_size=batch_size)
        return lambda inputs: {"logits": logits(inputs)}

    @jit
    def apply(inputs: jax.Array) -> dict[str, jax.Array]:
        (logits, named), _ = found(variables, inputs, train=False)
        return {"logits": logits, **{name: named[name] for name in features}}

    def outputs(inputs: np.ndarray) -> dict[str, np.ndarray]:
        parts = [jax.device_get(apply(inputs[i : i + batch_size])) for i in range(0, len(inputs), batch_size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return outputs


def flax_teacher(
    network: Network,
    variables: Variables,
    source: str,
    request: Request | None = None,
    *,
    features: Sequence[str] = (),
    beside: Preprocessing = IDENTITY,
) -> Teacher:
    """A network as a teacher.

    Args:
      network: its spec names `input_shape` and `num_classes`.
      variables: its arrays.
      source: what to call it.
      request: what it is for; by default the very data that it was trained on.
      features: names of those that it gives beside its logits.
      beside: preprocessing from a file beside it.

    Returns:
      The teacher; where it takes the data as they are, with its network, to be run inside the training step.

    Raises:
      InputError: it does not fit the data.
    """
    shape, classes = tuple(network.spec["input_shape"]), network.spec["num_classes"]
    shown = feature_shapes(network) if features else {}
    if missing := [name for name in features if name not in shown]:
        raise InputError(
            f"a teacher's features are {', '.join(shown) or 'none'}; got {missing[0]} of {source}: name one of these"
        )
    model = Model(
        run=outputs_of(network, variables, features),
        digest=_digest(network, variables, features),
        beside=beside,
        input_shape=shape,
        num_outputs=classes,
        params=count_params(variables),
        network=network,
        variables=variables,
    )
    return teacher_of(model, request or Request(source, IDENTITY, shape, classes, ()))


def saved_teacher(place: str, request: Request) -> Teacher:
    """The teacher in the directory of a run or of a saved network, `DIR` or `DIR#FEATURE,...`.

    Raises:
      InputError: nothing there, or it does not fit the data.
    """
    from pathlib import Path

    if request.networks is None:
        raise ValueError("a flax: teacher needs networks=, which reads its directory: pass students.load")
    place, _, named = place.partition("#")
    network, variables = request.networks(place)
    features = tuple(filter(None, named.split(",")))
    beside = read_beside(Path(place).expanduser())
    return flax_teacher(network, variables, request.source, request, features=features, beside=beside)


def _digest(network: Network, variables: Variables, features: Sequence[str]) -> str:
    """Of the spec, of every leaf's path, type and bytes, and of the features."""
    parts: list[str | bytes] = ["flax", json.dumps(dict(network.spec), sort_keys=True), *features]
    for header, content in leaf_bytes(variables):
        parts += [header, content]
    return digest_of(parts)
