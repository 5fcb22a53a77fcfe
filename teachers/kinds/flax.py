"""`flax:DIR`: a network of this project, such as the student of a run or a teacher from `ev3-distill teach`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from ev3_distill.config import Preprocessing
from ev3_distill.data.class_names import are_ids, are_numbers
from ev3_distill.errors import InputError
from ev3_distill.runtime.compile import jit
from ev3_distill.runtime.digest import leaf_bytes
from ev3_distill.students import count_params, feature_shapes, offset_of
from ev3_distill.teachers.loading import digest_of
from ev3_distill.teachers.preprocessing import IDENTITY, read_preprocessing_file
from ev3_distill.teachers.teacher import Model, Request, Teacher, build_teacher
from ev3_distill.types import Network, Variables


def forward(network: Network, variables: Variables, *, batch_size: int = 1024) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function of NumPy inputs, [N, ...] -> logits [N, K] float32, that runs in batches of `batch_size`."""
    apply = jit(lambda variables, inputs: network.apply(variables, inputs, train=False)[0])

    def logits(inputs: np.ndarray) -> np.ndarray:
        starts = range(0, len(inputs), batch_size)
        return np.concatenate([np.asarray(apply(variables, inputs[i : i + batch_size])) for i in starts])

    return logits


def outputs_of(
    network: Network, variables: Variables, features: Sequence[str], *, batch_size: int = 1024
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Like `forward`, but returns a dictionary of logits and the named features."""
    apply_with_features = network.features
    if not features or apply_with_features is None:
        logits = forward(network, variables, batch_size=batch_size)
        return lambda inputs: {"logits": logits(inputs)}

    @jit
    def apply(variables: Variables, inputs: jax.Array) -> dict[str, jax.Array]:
        (logits, named), _ = apply_with_features(variables, inputs, train=False)
        return {"logits": logits, **{name: named[name] for name in features}}

    def outputs(inputs: np.ndarray) -> dict[str, np.ndarray]:
        parts = [
            jax.device_get(apply(variables, inputs[i : i + batch_size])) for i in range(0, len(inputs), batch_size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return outputs


def flax_teacher(
    network: Network,
    variables: Variables,
    source: str,
    request: Request | None = None,
    *,
    features: Sequence[str] = (),
    file_preprocessing: Preprocessing = IDENTITY,
    class_names: tuple[str, ...] | None = None,
) -> Teacher:
    """Builds a teacher from a network.

    Args:
      network: its spec has `input_shape` and `num_classes`.
      variables: of the network.
      source: name of the teacher.
      request: the data it will run on; by default data like those that it was trained on.
      features: names of the features to return besides the logits.
      file_preprocessing: from the TOML file beside it.
      class_names: of its outputs; None if unknown.

    Returns:
      The teacher. If it needs no preprocessing, it has a `network`, which may run inside the training step.

    Raises:
      InputError: it does not fit the data.
    """
    shape, classes = tuple(network.spec["input_shape"]), network.spec["num_classes"]
    available = feature_shapes(network) if features else {}
    if missing := [name for name in features if name not in available]:
        raise InputError(
            f"a teacher's features are {', '.join(available) or 'none'}; got {missing[0]} of {source}: name one of these"
        )
    model = Model(
        run=outputs_of(network, variables, features),
        digest=_digest(network, variables, features),
        file_preprocessing=file_preprocessing,
        input_shape=shape,
        num_outputs=classes,
        class_names=class_names,
        params=count_params(variables),
        network=network,
        variables=variables,
        classifier=True,
        offset=offset_of(network.spec),
    )
    return build_teacher(model, request or Request(source, IDENTITY, shape, classes, ()))


def saved_teacher(place: str, request: Request) -> Teacher:
    """Loads the network in the directory of a run or of a saved network: `DIR` or `DIR#FEATURE,...`.

    Raises:
      InputError: there is no network, or it does not fit the data.
    """
    if request.load_network is None:
        raise ValueError("a flax: teacher needs load_network=, which reads its directory: pass students.load")
    directory, _, names = place.partition("#")
    network, variables = request.load_network(directory)
    features = tuple(filter(None, names.split(",")))
    file_preprocessing = read_preprocessing_file(Path(directory).expanduser())
    class_names = _class_names(Path(directory).expanduser().absolute(), network.spec["num_classes"])
    if are_numbers(request.class_names) and class_names is not None and not are_ids(class_names):
        class_names = None  # the data number their classes in its order
    return flax_teacher(
        network,
        variables,
        request.source,
        request,
        features=features,
        file_preprocessing=file_preprocessing,
        class_names=class_names,
    )


def _class_names(directory: Path, num_classes: int) -> tuple[str, ...] | None:
    """Class names of a saved network, from the report of its run or the metadata of its export; None if there are none."""
    folders = [directory]
    if directory.name == "student":  # of a run, or of a size NN in a search: sizes/NN/student
        folders += [directory.parents[0], directory.parents[min(2, len(directory.parents) - 1)]]
    for path in (directory / "model.json", *(folder / "report.json" for folder in folders)):
        if path.is_file():
            try:
                content = json.loads(path.read_text())
                names = tuple(map(str, content["classes"] if path.name == "model.json" else content["data"]["classes"]))
            except (OSError, ValueError, KeyError, TypeError):
                return None
            return names if len(names) == num_classes else None
    return None


def _digest(network: Network, variables: Variables, features: Sequence[str]) -> str:
    """SHA-256 of the spec, of path, type and bytes of every leaf, and of the feature names."""
    parts: list[str | bytes] = ["flax", json.dumps(dict(network.spec), sort_keys=True), *features]
    for header, content in leaf_bytes(variables):
        parts += [header, content]
    return digest_of(parts)
