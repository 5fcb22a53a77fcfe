"""Work for the time in which a run trains, which leaves Python idle: imports for its end, and pages."""

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable

NEEDED_LATER = (
    "orbax.checkpoint",
    "scipy.special",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "jinja2",
)
_THREADS: list[threading.Thread] = []  # at most one
_WAITING: list[Callable[[], None]] = []


def at_next_training(start: Callable[[], None]) -> None:
    """Calls `start` when the next training begins. It must return at once; a process that trains no more does not call it."""
    _WAITING.append(start)


def preload() -> None:
    """Training begins: starts to import NEEDED_LATER in another thread, once in a process, and what waits for this.

    An import that fails there fails again at its use.
    """
    if not _THREADS and not all(name in sys.modules for name in NEEDED_LATER):
        _THREADS.append(threading.Thread(target=_import, daemon=True, name="imports"))
        _THREADS[0].start()
    while _WAITING:
        _WAITING.pop()()


def _import() -> None:
    for name in NEEDED_LATER:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
