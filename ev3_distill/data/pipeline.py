"""Supply: brings the explore split to the device part by part, with what the teacher says of each view.

Two ways, the same batches: a split that fits lives there whole and gets its views as the run reaches them; a larger one
comes in windows of a few steps, read ahead by a loader's threads. Teacher outputs are asked for as late as possible.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.data.augment import Augmentation, partner_of, view_of
from ev3_distill.data.batches import Resident, Window, resident
from ev3_distill.data.shuffle import Order, epoch_of, order, rows, steps_per_epoch
from ev3_distill.types import Batch, Variables

Lesson = Callable[[int, np.ndarray, Callable[[np.ndarray], np.ndarray]], dict[str, np.ndarray]]
# (view, positions [n] in the data set, positions -> pixels) -> the teacher's "logits" [n, K] and features [n, ...]

PART = 64  # steps between two signs of life


class Views:
    """The explore split and its views: which pixels they are.

    Attributes:
      index: [N] positions of the split in the data set, in ascending order.
      augmentation: None for the examples as they are, which have one view.
    """

    def __init__(self, dataset: Any, index: np.ndarray, augmentation: Augmentation | None):
        self.dataset, self.index, self.augmentation = dataset, index, augmentation
        if augmentation is not None:
            self._view = jax.jit(functools.partial(view_of, augmentation))
            self._partner = jax.jit(functools.partial(partner_of, augmentation, n=len(index)))

    def pixels(self, view: int, positions: np.ndarray) -> np.ndarray:
        """One view of examples by their positions [n] in the data set."""
        return self.seen(self.dataset.inputs[positions], positions, np.full(len(positions), view, np.int32))[0]

    def seen(self, inputs: np.ndarray, positions: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Views [n] of examples that were read already, and which of them are mixed with others [n] bool."""
        if self.augmentation is None:
            return inputs, np.zeros(len(inputs), bool)
        index, partners = jnp.asarray(positions, jnp.int32), None
        if self.augmentation.mix:
            own = jnp.asarray(np.searchsorted(self.index, positions), jnp.int32)
            partners = self.dataset.inputs[self.index[np.asarray(self._partner(own, views))]]
        pixels, mixed = self._view(inputs, partners, index, views)
        return np.asarray(pixels), np.asarray(mixed)


class ResidentSupply:
    """All of the split on the device; view v is learnt when the run reaches its first epoch."""

    def __init__(
        self,
        views: Views,
        lesson: Lesson,
        *,
        count: int,
        batch_size: int,
        seed: int,
        teacher: Variables | tuple[()] = (),
    ):
        """Takes the views, their teacher, the number V of views that it is asked of, and the seed of the order.

        `teacher` are the variables of a JAX teacher that runs inside the step.
        """
        self._views, self._lesson, self._count, self._teacher = views, lesson, count, teacher
        self._learnt: dict[str, np.ndarray] = {}  # [V, N, ...], filled view by view
        self._known = 0
        self._seed, self._per_epoch = seed, steps_per_epoch(len(views.index), batch_size)
        self._pool: Resident | None = None

    def __call__(self, first: int, last: int) -> Iterator[tuple[Resident, int, int]]:
        """Consecutive parts of the steps [first, last), each with the pool."""
        wanted = min((last - 1) // self._per_epoch + 1, self._count)
        if wanted > self._known:
            self._learn(wanted)
        for begin in range(first, last, PART):
            assert self._pool is not None
            yield self._pool, begin, min(begin + PART, last)

    def whole(self) -> Resident:
        """The pool with all its views."""
        self._learn(self._count)
        assert self._pool is not None
        return self._pool

    def _learn(self, wanted: int) -> None:
        index = self._views.index
        for view in range(self._known, wanted):
            said = self._lesson(view, index, functools.partial(self._views.pixels, view))
            for name, rows_ in said.items():
                blank = self._learnt.setdefault(name, np.zeros((self._count, *rows_.shape), np.float32))
                blank[view] = rows_
        self._known = wanted
        if self._pool is None:
            dataset = self._views.dataset
            pool = resident(dataset.inputs[index], dataset.labels[index], index, self._learnt, seed=self._seed)
            self._pool = pool._replace(teacher=self._teacher)
            return
        fresh = {name: jnp.asarray(said) for name, said in self._learnt.items()}
        logits = fresh.pop("logits")
        examples = self._pool.examples._replace(teacher_logits=logits, teacher_features=fresh)
        self._pool = self._pool._replace(examples=examples)


class WindowSupply:
    """The split window by window; each is read ahead while the one before it is trained on.

    Windows begin at multiples of their number of steps, so a run's parts do not depend on where it was interrupted.
    """

    def __init__(self, views: Views, lesson: Lesson, *, count: int, batch_size: int, seed: int, steps: int):
        """Takes what `ResidentSupply` takes, and the steps W of a window."""
        self._views, self._lesson, self._count = views, lesson, count
        self._batch_size, self._steps = batch_size, steps
        self._visits = _Visits(views, order(len(views.index), seed), count, batch_size, steps)
        self._ahead: Iterator[Any] | None = None
        self._at = -1
        self._window: Window | None = None

    def __call__(self, first: int, last: int) -> Iterator[tuple[Window, int, int]]:
        """Consecutive parts of the steps [first, last), each with the window that holds it."""
        while first < last:
            end = min(last, (first // self._steps + 1) * self._steps)
            yield self._window_of(first // self._steps), first, end
            first = end

    def _window_of(self, number: int) -> Window:
        if number != self._at or self._window is None:
            if self._ahead is None or number != self._at + 1:
                self._ahead = _read_ahead(self._visits, number)
            self._window = self._made(number, *next(self._ahead))
            self._at = number
        return self._window

    def _made(self, number: int, positions: np.ndarray, views: np.ndarray, inputs: np.ndarray) -> Window:
        pixels, mixed = self._views.seen(inputs, positions, views)
        said: dict[str, np.ndarray] = {}
        for view in np.unique(views):
            of_view = views == view
            learnt = self._lesson(int(view), positions[of_view], functools.partial(_at, positions, of_view, pixels))
            for name, rows_ in learnt.items():
                said.setdefault(name, np.zeros((len(views), *rows_.shape[1:]), np.float32))[of_view] = rows_
        examples = Batch(
            inputs=jnp.asarray(pixels),
            labels=jnp.asarray(np.where(mixed, -1, self._views.dataset.labels[positions]), jnp.int32),
            teacher_logits=jnp.asarray(said.pop("logits")),
            index=jnp.asarray(positions, jnp.int32),
            weight=jnp.ones(len(positions), jnp.float32),
            teacher_features={name: jnp.asarray(rows_) for name, rows_ in said.items()},
        )
        return Window(examples, jnp.int32(number * self._steps))


def _at(positions: np.ndarray, of_view: np.ndarray, pixels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The pixels [n, ...] of the wanted positions [n] among those of one view."""
    among = np.flatnonzero(of_view)
    order_of = np.argsort(positions[among])
    found = np.searchsorted(positions[among], wanted, sorter=order_of)
    return np.asarray(pixels[among[order_of[found]]])


class _Visits:
    """Window number -> (positions [W * B], views [W * B], inputs [W * B, ...]): a random access source for the loader."""

    def __init__(self, views: Views, order_: Order, count: int, batch_size: int, steps: int):
        self._views, self._order, self._count, self._steps = views, order_, count, steps
        self._rows = jax.jit(jax.vmap(functools.partial(rows, batch_size=batch_size), in_axes=(None, 0)))
        self._epoch = jax.jit(functools.partial(epoch_of, batch_size=batch_size))
        self._batch_size = batch_size

    def __len__(self) -> int:
        return 2**31 // self._steps

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        steps = np.arange(number * self._steps, (number + 1) * self._steps, dtype=np.int32)
        positions = self._views.index[np.asarray(self._rows(self._order, steps)).reshape(-1)]
        epochs = np.asarray(self._epoch(self._order, steps)) % self._count
        views = np.repeat(epochs.astype(np.int32), self._batch_size)
        return positions, views, self._views.dataset.inputs[positions]


def _read_ahead(visits: _Visits, first: int) -> Iterator[Any]:
    """Windows from `first` on, the next one read by another thread."""
    import grain

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return iter(grain.MapDataset.source(visits)[first:].to_iter_dataset(ahead))
