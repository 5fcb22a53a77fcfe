"""Lessons: what a teacher says of the examples, from the cache where it has said it before.

A teacher runs once on each view of each example; runs of other students, seeds and budgets share what it said.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.arms import PEER
from ev3_distill.data.pipeline import Views
from ev3_distill.errors import InputError
from ev3_distill.runtime.counter import Counter
from ev3_distill.teachers import Teacher
from ev3_distill.teachers.cache.output_store import Contents, LogitStore, collect, verify

BATCH = 256  # examples of one forward pass of a teacher, at most

Aside = Callable[[], contextlib.AbstractContextManager[None]]  # hides what else is shown on the terminal


class Lessons:
    """A teacher that runs on the host, through the cache.

    Attributes:
      num_classes: K.
    """

    def __init__(
        self,
        teacher: Teacher,
        dataset: Any,
        *,
        num_classes: int,
        features: Sequence[str] = (),
        precision: str = "float32",
        root: Path | None = None,
        batch_size: int = BATCH,
        warn: Callable[[str], None],
    ):
        """Takes the teacher, what it is run on, and those of its features that are asked for; `root` holds the stores."""
        self._batch_size = batch_size
        self._teacher, self._dataset, self._features = teacher, dataset, tuple(features)
        self.num_classes, self._precision, self._root, self._warn = num_classes, precision, root, warn
        self.aside: Aside = contextlib.nullcontext
        self._stores: dict[str, LogitStore] = {}

    def of(self, views: Views, count: int) -> Callable[..., dict[str, np.ndarray]]:
        """The lesson on the views of an explore split, see `supply.Lesson`; `count` of them are in use."""

        def lesson(
            view: int, positions: np.ndarray, pixels_of: Callable[[np.ndarray], np.ndarray]
        ) -> dict[str, np.ndarray]:
            title = "teacher" if views.augmentation is None else f"teacher, view {view + 1} of {count}"
            return self._said(_described(views, view), title, positions, pixels_of)

        return lesson

    def plain(self, positions: np.ndarray, title: str = "teacher") -> np.ndarray:
        """Logits [n, K] on the examples as they are, by their positions [n] in the data set."""
        return self._said("clean", title, positions, lambda rows: self._dataset.inputs[rows])["logits"]

    def close(self) -> None:
        """Syncs and closes the cache."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def _said(
        self, view: Any, title: str, positions: np.ndarray, pixels_of: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, np.ndarray]:
        store = self._stores.get(str(view))
        if store is None:
            fields = self._fields(pixels_of(positions[:1]))
            store = self._stores[str(view)] = LogitStore(
                Contents(
                    teacher=hashlib.sha256("\n".join([self._teacher.digest, *self._features]).encode()).hexdigest(),
                    data=self._dataset.fingerprint,
                    rows=len(self._dataset.labels),
                    fields=fields,
                    view=view,
                    precision=self._precision,
                    teacher_source=self._teacher.source,
                    data_source=self._dataset.source,
                ),
                root=self._root,
                warn=self._warn,
            )
            verify(self._outputs, pixels_of, store, positions)
        if len(store.missing(positions)):
            with self.aside(), Counter(title, things="examples") as counter:
                collect(
                    self._outputs,
                    pixels_of,
                    positions,
                    store,
                    batch_size=self._batch_size,
                    tell=counter.tell,
                    waiting=counter.line,
                )
        return store.read(positions)

    def _outputs(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """What is asked of what the teacher gives."""
        given = self._teacher.outputs(inputs)
        return {name: given[name] for name in ("logits", *self._features)}

    def _fields(self, example: np.ndarray) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs on one example, and that its logits are of these classes."""
        fields = {name: rows.shape[1:] for name, rows in self._outputs(example).items()}
        if fields["logits"] != (self.num_classes,):
            raise InputError(
                f"a teacher must give one logit per class, {self.num_classes}; {self._teacher.source} gives "
                f"{fields['logits'][0]}: use a teacher of these classes, or name them by --teacher-input.classes"
            )
        return fields


def _described(views: Views, view: int) -> Any:
    """A view as plain data. What is mixed depends on which examples the split has, too."""
    if views.augmentation is None:
        return "clean"
    told: dict[str, Any] = {"augment": views.augmentation.describe(), "view": view}
    if views.augmentation.mix:
        told["among"] = hashlib.sha256(np.asarray(views.index, np.int64).tobytes()).hexdigest()
    return told


class Recorded:
    """A teacher that has run already, on the examples as they are."""

    def __init__(self, logits: np.ndarray):
        """Takes its logits [N, K], in the data set's order."""
        self._logits, self.num_classes = logits, logits.shape[1]
        self.aside: Aside = contextlib.nullcontext

    def of(self, views: Views, count: int) -> Callable[..., dict[str, np.ndarray]]:
        """The lesson on an explore split without augmentation, see `supply.Lesson`."""
        if views.augmentation is not None:
            raise InputError(
                "recorded logits belong to the examples as they are; got an augmentation "
                f"'{views.augmentation.describe()}': give --augment none, or the teacher itself"
            )
        return lambda view, positions, pixels_of: {"logits": self._logits[positions]}

    def plain(self, positions: np.ndarray, title: str = "") -> np.ndarray:
        """Logits [n, K] by positions [n] in the data set."""
        return self._logits[positions]

    def close(self) -> None:
        """Nothing is open."""


class Labels(Recorded):
    """No teacher: labels alone, and blank logits."""

    def __init__(self, examples: int, num_classes: int):
        """Takes N and K."""
        super().__init__(np.broadcast_to(np.zeros(1, np.float32), (examples, num_classes)))

    def of(self, views: Views, count: int) -> Callable[..., dict[str, np.ndarray]]:
        """Blank logits for any view."""
        return lambda view, positions, pixels_of: {"logits": self._logits[positions]}


class WithPeer:
    """Lessons to which a peer, another student, adds what it says: the feature PEER, its logits [B, K]."""

    def __init__(self, lessons: "Lessons | Recorded", peer: Callable[[np.ndarray], np.ndarray], *, batch_size: int):
        """Takes the lessons, and the peer as a function from inputs [B, ...] to logits; `batch_size` bounds B."""
        self._lessons, self._peer, self._batch_size = lessons, peer, batch_size
        self.num_classes, self.plain, self.close = lessons.num_classes, lessons.plain, lessons.close
        self.aside: Aside = contextlib.nullcontext

    def of(self, views: Views, count: int) -> Callable[..., dict[str, np.ndarray]]:
        """The lesson on the views of an explore split, see `supply.Lesson`."""
        lesson = self._lessons.of(views, count)

        def both(
            view: int, positions: np.ndarray, pixels_of: Callable[[np.ndarray], np.ndarray]
        ) -> dict[str, np.ndarray]:
            said = [self._peer(pixels_of(part)) for part in chunked(positions, self._batch_size)]
            return {**lesson(view, positions, pixels_of), PEER: np.concatenate(said)}

        return both


def chunked(positions: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Positions [n] in parts of at most `size`."""
    return (positions[i : i + size] for i in range(0, len(positions), size))
