"""Teacher targets: a teacher's outputs on the examples of a run, read from the cache where it has them.

A teacher runs once on each view of each example. Runs with other students, seeds or budgets share the cached outputs.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from ev3_distill.arms import PEER
from ev3_distill.data.pipeline import TeacherOf, Views
from ev3_distill.errors import InputError
from ev3_distill.runtime.phases import phase
from ev3_distill.runtime.progress import CountProgress
from ev3_distill.tasks.base import Task
from ev3_distill.teachers import Teacher
from ev3_distill.teachers.cache.output_store import Contents, OutputStore, collect, spot_check

BATCH = 256  # largest number of examples in one forward pass of a teacher

PauseDisplay = Callable[[], contextlib.AbstractContextManager[None]]  # hides the progress bar meanwhile


class TeacherTargets(Protocol):
    """Source of a teacher's outputs.

    Attributes:
      pause_display: wraps work that shows a display of its own.
    """

    pause_display: PauseDisplay

    def for_views(self, views: Views, count: int) -> TeacherOf:
        """The teacher's outputs on the views of an explore split, of which `count` are in use."""

    def unchanged(self, positions: np.ndarray, title: str = "teacher") -> Mapping[str, np.ndarray]:
        """Outputs by name [n, ...] on the examples at positions [n] of the data set, without augmentation."""

    def close(self) -> None:
        """Releases what the source holds."""


class CachedTargets:
    """Outputs of a teacher that runs on the host, through the cache."""

    def __init__(
        self,
        teacher: Teacher,
        dataset: Any,
        *,
        task: Task,
        features: Sequence[str] = (),
        precision: str = "float32",
        root: Path | None = None,
        batch_size: int = BATCH,
        warn: Callable[[str], None],
    ):
        """Prepares the cache; the teacher does not run yet.

        Args:
          teacher: gives the task's outputs and features.
          dataset: that the teacher runs on.
          task: says which outputs a teacher gives, and how they are stored.
          features: names of the teacher's features to cache besides the task's outputs.
          precision: of cached outputs.
          root: folder of the stores; by default the cache of the user.
          batch_size: largest number of examples in one forward pass.
          warn: gets a line if cached rows are damaged.
        """
        self._batch_size, self._task = batch_size, task
        self._teacher, self._dataset, self._features = teacher, dataset, tuple(features)
        self._precision, self._root, self._warn = precision, root, warn
        self.pause_display: PauseDisplay = contextlib.nullcontext
        self._stores: dict[str, OutputStore] = {}

    def for_views(self, views: Views, count: int) -> TeacherOf:
        """See `TeacherTargets.for_views`."""

        def teacher_of(
            view: int, positions: np.ndarray, inputs_of: Callable[[np.ndarray], np.ndarray]
        ) -> dict[str, np.ndarray]:
            title = "teacher" if views.augmentation is None else f"teacher, view {view + 1} of {count}"
            return self._cached(_key_of(views, view), title, positions, inputs_of)

        return teacher_of

    def unchanged(self, positions: np.ndarray, title: str = "teacher") -> Mapping[str, np.ndarray]:
        """See `TeacherTargets.unchanged`; without the features."""
        outputs = self._cached("clean", title, positions, lambda rows: self._dataset.inputs[rows])
        return {name: outputs[name] for name in self._task.teacher_spec}

    def close(self) -> None:
        """Syncs and closes the cache."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def _cached(
        self, view: Any, title: str, positions: np.ndarray, inputs_of: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Reads outputs from the store of a view; runs the teacher on the rows that it lacks."""
        store = self._stores.get(str(view))
        if store is None:
            with phase("teacher"):
                store = self._stores[str(view)] = self._open(view, self._fields(inputs_of(positions[:1])))
                spot_check(self._outputs, inputs_of, store, positions)
        if len(store.missing(positions)):
            with phase("teacher"), self.pause_display(), CountProgress(title, things="examples") as progress:
                collect(
                    self._outputs,
                    inputs_of,
                    positions,
                    store,
                    batch_size=self._batch_size,
                    on_progress=progress.update,
                    on_wait=progress.line,
                )
        return store.read(positions)

    def _open(self, view: Any, fields: Mapping[str, tuple[int, ...]]) -> OutputStore:
        contents = Contents(
            teacher=hashlib.sha256("\n".join([self._teacher.digest, *self._features]).encode()).hexdigest(),
            data=self._dataset.fingerprint,
            rows=len(self._dataset.labels),
            fields=fields,
            view=view,
            precision=self._precision,
            codec=self._task.teacher_codec,
            teacher_source=self._teacher.source,
            data_source=self._dataset.source,
        )
        return OutputStore(contents, root=self._root, warn=self._warn)

    def _outputs(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the teacher; keeps the task's outputs and the features in use."""
        outputs = self._teacher.outputs(inputs)
        return {name: outputs[name] for name in (*self._task.teacher_spec, *self._features)}

    def _fields(self, example: np.ndarray) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs for one example, once those of the task are checked."""
        fields = {name: array.shape[1:] for name, array in self._outputs(example).items()}
        for name, leaf in self._task.teacher_spec.items():
            if fields[name] != leaf.shape:
                raise InputError(
                    f"a teacher's {name} must have the shape {list(leaf.shape)} for one example; {self._teacher.source} gives "
                    f"{list(fields[name])}: use a teacher of this task and these classes, or name its outputs with "
                    "--teacher-input.classes"
                )
        return fields


def _key_of(views: Views, view: int) -> Any:
    """A view as plain data. Which examples are mixed depends on the members of the split, too."""
    if views.augmentation is None:
        return "clean"
    key: dict[str, Any] = {"augment": views.augmentation.describe(), "view": view}
    if views.augmentation.mix:
        key["among"] = hashlib.sha256(np.asarray(views.index, np.int64).tobytes()).hexdigest()
    return key


class RecordedTargets:
    """Outputs that were computed before, on examples without augmentation."""

    def __init__(self, outputs: Mapping[str, np.ndarray]):
        """Takes the outputs by name [N, ...], in the data set's order."""
        self._recorded = dict(outputs)
        self.pause_display: PauseDisplay = contextlib.nullcontext

    def for_views(self, views: Views, count: int) -> TeacherOf:
        """See `TeacherTargets.for_views`.

        Raises:
          InputError: the split is augmented.
        """
        if views.augmentation is not None:
            raise InputError(
                "recorded logits belong to examples without augmentation; got "
                f"'{views.augmentation.describe()}': give --augment none, or the teacher itself"
            )
        return lambda view, positions, inputs_of: self._at(positions)

    def unchanged(self, positions: np.ndarray, title: str = "") -> Mapping[str, np.ndarray]:
        """See `TeacherTargets.unchanged`."""
        return self._at(positions)

    def _at(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[positions] for name, array in self._recorded.items()}

    def close(self) -> None:
        """Nothing is open."""


class BlankTargets(RecordedTargets):
    """Zeros in place of a teacher's outputs, for runs that train on the data's own targets alone."""

    def __init__(self, examples: int, teacher_spec: Mapping[str, jax.ShapeDtypeStruct]):
        """Takes N, and the shapes of the outputs for one example, `Task.teacher_spec`."""
        zero = np.zeros(1, np.float32)
        super().__init__({name: np.broadcast_to(zero, (examples, *leaf.shape)) for name, leaf in teacher_spec.items()})

    def for_views(self, views: Views, count: int) -> TeacherOf:
        """Zeros for any view."""
        return lambda view, positions, inputs_of: self._at(positions)


class PeerTargets:
    """Teacher targets with the logits of a peer, another student, as the feature PEER [B, K]."""

    def __init__(self, targets: TeacherTargets, peer: Callable[[np.ndarray], np.ndarray], *, batch_size: int):
        """Takes the teacher's targets, and the peer as a function from inputs [B, ...] to logits; `batch_size` bounds B."""
        self._targets, self._peer, self._batch_size = targets, peer, batch_size
        self.unchanged, self.close = targets.unchanged, targets.close
        self.pause_display: PauseDisplay = contextlib.nullcontext

    def for_views(self, views: Views, count: int) -> TeacherOf:
        """See `TeacherTargets.for_views`."""
        teacher_of = self._targets.for_views(views, count)

        def both(
            view: int, positions: np.ndarray, inputs_of: Callable[[np.ndarray], np.ndarray]
        ) -> dict[str, np.ndarray]:
            logits = [self._peer(inputs_of(part)) for part in chunked(positions, self._batch_size)]
            return {**teacher_of(view, positions, inputs_of), PEER: np.concatenate(logits)}

        return both


def chunked(positions: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Positions [n] in parts of at most `size`."""
    return (positions[i : i + size] for i in range(0, len(positions), size))
