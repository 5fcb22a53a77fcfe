"""Imports, while a run trains, what it needs at its end: training leaves Python idle, and these imports take half a second."""

import contextlib
import importlib
import sys
import threading

NEEDED_LATER = (
    "scipy.special",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "jinja2",
)
_THREADS: list[threading.Thread] = []  # at most one


def preload() -> None:
    """Starts to import NEEDED_LATER in another thread, once in a process. What fails there fails again at its use."""
    if not _THREADS and not all(name in sys.modules for name in NEEDED_LATER):
        _THREADS.append(threading.Thread(target=_import, daemon=True, name="imports"))
        _THREADS[0].start()


def _import() -> None:
    for name in NEEDED_LATER:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
