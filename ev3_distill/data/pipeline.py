"""Input pipeline: streams batches of the explore split and the teacher's outputs on them to the device.

There are two pipelines, which give the same batches. `ResidentPipeline` holds the whole split on the device and adds each view
when the run reaches it. `WindowPipeline` is for larger splits: it brings windows of a few steps, which a thread reads ahead.
The teacher runs on a view as late as possible. In the final phase of a run, batches come from all rows of explore, assess and
decide; the teacher runs on views of the latter two only then.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.data.augment import Augmentation, partner_of, view_of
from ev3_distill.data.batches import Resident, Window, make_batch, resident, without_targets
from ev3_distill.data.shuffle import Order, batch_rows, epoch_of, make_order, steps_per_epoch
from ev3_distill.types import PyTree, Variables

TeacherOf = Callable[[int, np.ndarray, Callable[[np.ndarray], np.ndarray]], dict[str, np.ndarray]]
# (view, positions [n] in the data set, positions -> pixels) -> the teacher's outputs and features by name, [n, ...]

PART_STEPS = 64  # steps of one part of a resident split; the host regains control in between


class Views:
    """The augmented views of the examples that batches have, which are those of the explore split before the final phase.

    Attributes:
      targets: of all examples of the data set, leaves [N, ...].
      inputs: of all examples, [N, ...].
      index: [M] positions of these examples in the data set. Examples are mixed among them, by their order.
      augmentation: None for unchanged examples, which have one view.
    """

    def __init__(self, inputs: Any, targets: PyTree, index: np.ndarray, augmentation: Augmentation | None):
        self.inputs, self.targets, self.index, self.augmentation = inputs, targets, index, augmentation
        if augmentation is not None:
            self._sorter = np.argsort(index)
            self._view = jax.jit(functools.partial(view_of, augmentation))
            self._partner = jax.jit(functools.partial(partner_of, augmentation, n=len(index)))

    def pixels(self, view: int, positions: np.ndarray) -> np.ndarray:
        """One view of the examples at positions [n] of the data set."""
        return self.augment(self.inputs[positions], positions, np.full(len(positions), view, np.int32))[0]

    def augment(self, inputs: np.ndarray, positions: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Applies the views [n] to inputs [n, ...].

        Returns:
          The pixels [n, ...], and which examples are mixed with others, [n] bool.
        """
        if self.augmentation is None:
            return inputs, np.zeros(len(inputs), bool)
        index, partners = jnp.asarray(positions, jnp.int32), None
        if self.augmentation.mix:
            own = jnp.asarray(self._sorter[np.searchsorted(self.index, positions, sorter=self._sorter)], jnp.int32)
            partners = self.inputs[self.index[np.asarray(self._partner(own, views))]]
        pixels, mixed = self._view(inputs, partners, index, views)
        return np.asarray(pixels), np.asarray(mixed)

    def targets_at(self, positions: np.ndarray) -> PyTree:
        """Targets of the examples at positions [n], leaves [n, ...]."""
        return jax.tree.map(lambda leaf: leaf[positions], self.targets)


class Source(NamedTuple):
    """What batches are made of in a phase of a run."""

    views: Views
    teacher_of: TeacherOf  # gives the teacher's outputs on them


class ResidentPipeline:
    """Holds the whole split on the device; the teacher runs on view v when the run reaches the first epoch of v.

    For a final phase the pool has the rows of assess and decide from the start, so that its shapes never change. Their teacher
    outputs are zeros until the phase begins.
    """

    def __init__(
        self,
        views: Views,
        teacher_of: TeacherOf,
        *,
        count: int,
        batch_size: int,
        seed: int,
        teacher: Variables | tuple[()] = (),
        final: Source | None = None,
    ):
        """Prepares the pipeline; nothing is computed yet.

        Args:
          views: of the explore split.
          teacher_of: gives the teacher's outputs.
          count: V, the number of views that the teacher runs on.
          batch_size: B.
          seed: of the order in which examples are visited.
          teacher: variables of a JAX teacher that runs inside the training step.
          final: the examples of explore, and then those of assess and decide, in a run with a final phase.
        """
        self._explore, self._last = Source(views, teacher_of), final
        self._count, self._batch_size, self._seed, self._teacher = count, batch_size, seed, teacher
        self._outputs: dict[str, np.ndarray] = {}  # the teacher's, [V, N, ...], filled view by view
        self._ready: set[int] = set()  # views, in the present phase
        self._final = False
        self._pool: Resident | None = None

    def __call__(self, first: int, last: int, final: bool = False) -> Iterator[tuple[Resident, int, int]]:
        """Yields consecutive parts of the steps [first, last) with the pool; `final`: in the final phase."""
        if first >= last:
            return
        per_epoch = steps_per_epoch(len(self._source(final).views.index), self._batch_size)
        epochs = range(first // per_epoch, (last - 1) // per_epoch + 1)[: self._count]
        pool = self._with_views((epoch % self._count for epoch in epochs), final=final)
        if self._last is not None:
            pool = pool._replace(final=jnp.bool_(final))
        for begin in range(first, last, PART_STEPS):
            yield pool, begin, min(begin + PART_STEPS, last)

    def whole(self) -> Resident:
        """The pool of examples that are not augmented, for both phases of a run."""
        return self._with_views(range(self._count), final=self._last is not None)

    def _source(self, final: bool) -> Source:
        if not final:
            return self._explore
        assert self._last is not None
        return self._last

    def _with_views(self, needed: Iterable[int], *, final: bool) -> Resident:
        """The pool with these views at least. Mixed examples have other views in the final phase."""
        if final != self._final:
            self._ready, self._final = set(), final
        missing = sorted(set(needed) - self._ready)
        views, teacher_of = self._source(final)
        rows = len(self._source(self._last is not None).views.index)
        for view in missing:
            outputs = teacher_of(view, views.index, functools.partial(views.pixels, view))
            for name, array in outputs.items():
                shape = self._count, rows, *array.shape[1:]
                self._outputs.setdefault(name, np.zeros(shape, np.float32))[view, : len(array)] = array
            self._ready.add(view)
        if self._pool is None:
            self._pool = self._make_pool()
        elif missing:
            teacher = {name: jnp.asarray(array) for name, array in self._outputs.items()}
            self._pool = self._pool._replace(examples=self._pool.examples._replace(teacher=teacher))
        return self._pool

    def _make_pool(self) -> Resident:
        views = self._source(self._last is not None).views
        examples = views.inputs[views.index], views.targets_at(views.index), views.index, self._outputs
        explored = None if self._last is None else len(self._explore.views.index)
        return resident(*examples, seed=self._seed, explored=explored)._replace(teacher=self._teacher)


class WindowPipeline:
    """Brings the split window by window, and reads the next window while the present one is trained on.

    Windows start at multiples of their length, so a resumed run sees the same windows as an uninterrupted one.
    """

    def __init__(
        self,
        views: Views,
        teacher_of: TeacherOf,
        *,
        count: int,
        batch_size: int,
        seed: int,
        steps: int,
        final: Source | None = None,
    ):
        """Takes the arguments of `ResidentPipeline`, and W, the steps of a window."""
        self._steps = steps
        sources = [Source(views, teacher_of), *([] if final is None else [final])]
        self._phases = [
            (source, _WindowReads(source.views, make_order(len(source.views.index), seed), count, batch_size, steps))
            for source in sources
        ]
        self._ahead: Iterator[Any] | None = None
        self._address = -1, False
        self._window: Window | None = None

    def __call__(self, first: int, last: int, final: bool = False) -> Iterator[tuple[Window, int, int]]:
        """Yields consecutive parts of the steps [first, last) with the window that holds each; `final`: in the final phase."""
        while first < last:
            end = min(last, (first // self._steps + 1) * self._steps)
            yield self._window_at(first // self._steps, final), first, end
            first = end

    def _window_at(self, number: int, final: bool) -> Window:
        """Window `number` of a phase; both phases count windows from global step 0."""
        before, in_final = self._address
        if (number, final) != self._address or self._window is None:
            source, reads = self._phases[final]
            if self._ahead is None or (number, final) != (before + 1, in_final):
                self._ahead = _read_ahead(reads, number)
            self._window = self._make_window(source, number, *next(self._ahead))
            self._address = number, final
        return self._window

    def _make_window(
        self, source: Source, number: int, positions: np.ndarray, views: np.ndarray, inputs: np.ndarray
    ) -> Window:
        pixels, mixed = source.views.augment(inputs, positions, views)
        teacher: dict[str, np.ndarray] = {}
        for view in np.unique(views):
            of_view = views == view
            pixels_at = functools.partial(_pixels_at, positions, of_view, pixels)
            for name, array in source.teacher_of(int(view), positions[of_view], pixels_at).items():
                teacher.setdefault(name, np.zeros((len(views), *array.shape[1:]), np.float32))[of_view] = array
        batch = make_batch(pixels, source.views.targets_at(positions), positions, teacher)
        batch = batch._replace(targets=without_targets(batch.targets, mixed))
        return Window(batch, jnp.int32(number * self._steps))


def _pixels_at(positions: np.ndarray, of_view: np.ndarray, pixels: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The pixels [n, ...] of the queried positions [n] among those of one view."""
    among = np.flatnonzero(of_view)
    sorter = np.argsort(positions[among])
    at = np.searchsorted(positions[among], query, sorter=sorter)
    return np.asarray(pixels[among[sorter[at]]])


class _WindowReads:
    """Window number -> (positions [W * B], views [W * B], inputs [W * B, ...]): random access."""

    def __init__(self, views: Views, order_: Order, count: int, batch_size: int, steps: int):
        self._views, self._order, self._count, self._steps = views, order_, count, steps
        self._rows = jax.jit(jax.vmap(functools.partial(batch_rows, batch_size=batch_size), in_axes=(None, 0)))
        self._epoch = jax.jit(functools.partial(epoch_of, batch_size=batch_size))
        self._batch_size = batch_size

    def __len__(self) -> int:
        return 2**31 // self._steps

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        steps = np.arange(number * self._steps, (number + 1) * self._steps, dtype=np.int32)
        positions = self._views.index[np.asarray(self._rows(self._order, steps)).reshape(-1)]
        epochs = np.asarray(self._epoch(self._order, steps)) % self._count
        views = np.repeat(epochs.astype(np.int32), self._batch_size)
        return positions, views, self._views.inputs[positions]


def _read_ahead(reads: _WindowReads, first: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Windows from `first` on. Another thread reads the next one while the caller trains on this one."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        pending = pool.submit(reads.__getitem__, first)
        for number in range(first + 1, len(reads) + 1):
            window = pending.result()
            pending = pool.submit(reads.__getitem__, number)
            yield window
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
