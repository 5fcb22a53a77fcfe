"""A network on disk: spec.json, variables/ as an Orbax checkpoint, and digest.json with the digests of both."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.checkpoint import first_process_options
from ev3_distill.runtime.distributed import is_first_process, read_on_first
from ev3_distill.runtime.files import atomic_directory
from ev3_distill.students import digests
from ev3_distill.students.registry import build
from ev3_distill.students.standardization import STANDARDIZE
from ev3_distill.types import Network, Variables


def save(directory: Path, network: Network, variables: Variables) -> None:
    """Writes a network atomically: the directory appears complete or not at all."""
    with atomic_directory(directory, overwrite=True) as temporary:
        write(temporary, network, variables)


def write(directory: Path, network: Network, variables: Variables) -> None:
    """Writes the files of a network into a directory that exists."""
    (directory / "spec.json").write_text(json.dumps(network.spec, indent=1) + "\n")
    _save_variables(directory / "variables", variables)
    digests.write(directory, network.spec, variables)


def load(directory: str | Path, *, factory: Callable[..., Any] | None = None) -> tuple[Network, Variables]:
    """Loads a network that `save` wrote, and checks that it is unchanged.

    In a run, in a search's `sizes/NN/` and in an export it must also be the one that their certificate, archive or metadata are
    about.

    Args:
      directory: a run directory or its `student/`.
      factory: the user's factory, for a network that was created by one.

    Returns:
      The network and its variables; `network.apply(variables, inputs, train=False)[0]` gives logits [B, K]. Where the spec has
      an offset (`students.offset_of`), inputs are x - offset, computed in float64 and converted to float32.

    Raises:
      InputError: the directory has no network, one that cannot be read, or another one than was saved or certified there.
    """
    directory = Path(directory)
    if not (directory / "spec.json").exists() and (directory / "student" / "spec.json").exists():
        directory = directory / "student"
    try:
        spec = json.loads((directory / "spec.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"a saved network is a directory with spec.json and variables/; {directory} has no readable spec.json ({error}): "
            "name a finished run or its student/ directory"
        ) from None
    digests.check_spec(directory, spec)
    network = build(spec, factory=factory)
    return network, _load_variables(directory / "variables", network)


def _save_variables(directory: Path, variables: Variables) -> None:
    """Writes variables; in a multi-process run, process 0 does."""
    if not is_first_process():
        return
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer(multiprocessing_options=first_process_options()) as checkpointer:
        checkpointer.save(directory.absolute(), _leaves_by_path(jax.device_get(variables)))


def _load_variables(directory: Path, network: Network) -> Variables:
    """Reads variables of the network's structure; in a multi-process run, process 0 reads and broadcasts them."""
    template = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    blank = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _leaves_by_path(template).items()}

    def read() -> bytes:
        digests.check_files(directory.parent)
        leaves = list(_read(directory, network, blank).values())
        digests.check_variables(directory.parent, jax.tree.unflatten(jax.tree.structure(template), leaves))
        return b"".join(leaf.tobytes() for leaf in leaves)

    content, offset, leaves = read_on_first(read), 0, []
    for leaf in blank.values():
        leaves.append(jax.device_put(np.frombuffer(content, leaf.dtype, leaf.size, offset).reshape(leaf.shape)))
        offset += leaf.nbytes
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _read(directory: Path, network: Network, blank: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reads leaves by path, in the order of `blank`."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs each error that it raises
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=first_process_options()) as checkpointer:
            saved = checkpointer.metadata(directory.absolute()).item_metadata.tree
            _check_same_structure(
                saved, blank
            )  # first, because orbax reads in parallel and would fail in several places
            leaves = checkpointer.restore(directory.absolute(), blank)
    except Exception as error:  # orbax and tensorstore raise many kinds of errors for a damaged file
        raise InputError(
            f"saved variables must be intact and match spec.json; those in {directory} cannot be read for a network "
            f"{ {name: of for name, of in network.spec.items() if name != STANDARDIZE} }: {summary(error)}"
        ) from None
    return {name: np.asarray(leaves[name]) for name in blank}


def _check_same_structure(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError if names, shapes or dtypes differ."""
    for name in sorted({*saved, *expected}):
        one, other = (
            f"{tree[name].dtype} {tuple(tree[name].shape)}" if name in tree else "nothing" for tree in (saved, expected)
        )
        if one != other:
            raise ValueError(f"{name} is saved as {one}, the network has {other}")


def _leaves_by_path(variables: Variables) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
