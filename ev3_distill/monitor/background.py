"""Pages of reports, written beside the next training or at the end: drawing takes Python alone, as compiling does."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

from ev3_distill.monitor import report
from ev3_distill.runtime.preload import at_next_training

_WRITER: ContextVar["_Writer | None"] = ContextVar("pages that are being written", default=None)


class _Writer:
    """Writes one page after another in a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pages")
        self._waiting: list[Path] = []
        self._pages: list[Future[Path]] = []

    def write(self, run_dir: Path) -> None:
        """Writes the page of a finished run when the next training begins, or at the end."""
        if not self._waiting:
            at_next_training(self._start)
        self._waiting.append(run_dir)

    def _start(self) -> None:
        while self._waiting:
            self._pages.append(self._thread.submit(report.write_html, self._waiting.pop(0)))

    def finish(self) -> None:
        """Waits for all pages. Raises what went wrong with the first one that could not be written."""
        self._start()
        self._thread.shutdown()
        for page in self._pages:
            page.result()


@contextlib.contextmanager
def pages() -> Iterator[None]:
    """Within this block `write_page` returns at once. All pages are complete at its end, and after an error, too."""
    writer = _Writer()
    token = _WRITER.set(writer)
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            writer.finish()
        raise
    else:
        writer.finish()
    finally:
        _WRITER.reset(token)


def write_page(run_dir: Path) -> None:
    """Writes the page of a finished run: at once, or in the background of a `pages` block."""
    writer = _WRITER.get()
    if writer is None:
        report.write_html(run_dir)
    else:
        writer.write(run_dir)
