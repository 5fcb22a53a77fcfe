"""`flax:DIR`, a network of this project: a run's student or teacher, or one that `ev3-distill teach` trained."""

import json
from collections.abc import Callable

import jax
import numpy as np

from ev3_distill.config import Preprocessing
from ev3_distill.network import count_params
from ev3_distill.types import Network, Variables
from teachers.place import digest_of
from teachers.preprocessing import IDENTITY, read_beside
from teachers.teacher import Model, Request, Teacher, teacher_of


def forward(network: Network, variables: Variables, *, batch_size: int = 1024) -> Callable[[np.ndarray], np.ndarray]:
    """The network's logits as a function of NumPy inputs [N, ...] -> [N, K] float32, in chunks of `batch_size`."""
    apply = jax.jit(lambda inputs: network.apply(variables, inputs, train=False)[0])

    def logits(inputs: np.ndarray) -> np.ndarray:
        starts = range(0, len(inputs), batch_size)
        return np.concatenate([np.asarray(apply(inputs[i : i + batch_size])) for i in starts])

    return logits


def flax_teacher(
    network: Network,
    variables: Variables,
    source: str,
    request: Request | None = None,
    *,
    beside: Preprocessing = IDENTITY,
) -> Teacher:
    """A network as a teacher.

    Args:
      network: its spec names `input_shape` and `num_classes`.
      variables: its arrays.
      source: what to call it.
      request: what it is for; by default the very data that it was trained on.
      beside: preprocessing from a file beside it.

    Returns:
      The teacher; where it takes the data as they are, with its network, to be run inside the training step.

    Raises:
      InputError: it does not fit the data.
    """
    shape, classes = tuple(network.spec["input_shape"]), network.spec["num_classes"]
    logits = forward(network, variables)
    model = Model(
        run=lambda inputs: {"logits": logits(inputs)},
        digest=_digest(network, variables),
        beside=beside,
        input_shape=shape,
        num_outputs=classes,
        params=count_params(variables),
        network=network,
        variables=variables,
    )
    return teacher_of(model, request or Request(source, IDENTITY, shape, classes, ()))


def saved_teacher(place: str, request: Request) -> Teacher:
    """The teacher in the directory of a run or of a saved network.

    Raises:
      InputError: nothing there, or it does not fit the data.
    """
    from pathlib import Path

    if request.networks is None:
        raise ValueError("a flax: teacher needs networks=, which reads its directory: pass students.load")
    network, variables = request.networks(place)
    return flax_teacher(network, variables, request.source, request, beside=read_beside(Path(place).expanduser()))


def _digest(network: Network, variables: Variables) -> str:
    """Of the spec and of every leaf's path, type and bytes."""
    parts: list[str | bytes] = ["flax", json.dumps(dict(network.spec), sort_keys=True)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.asarray(leaf)
        parts += [f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}", array.tobytes()]
    return digest_of(parts)
