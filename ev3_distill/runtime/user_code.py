"""User code: callables that options name as `MODULE:FUNCTION`, and whose word is enough to import them."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import sha256_of

_TYPED: ContextVar[tuple[str, ...] | None] = ContextVar("texts that may name code; None: any", default=None)
_ANNOUNCE: ContextVar[str] = ContextVar("file that names code, which is announced before it is imported", default="")


@contextlib.contextmanager
def only_typed(texts: Iterable[str], *, trusted: bool) -> Iterator[None]:
    """Context that reads files of a finished run: code is imported only if the user has typed its name.

    Args:
      texts: what the user has typed; a name that is a part of one of them may be imported.
      trusted: whether the user trusts whatever the run names.
    """
    token = _TYPED.set(None if trusted else tuple(texts))
    try:
        yield
    finally:
        _TYPED.reset(token)


def typed() -> tuple[str, ...] | None:
    """The texts of the surrounding `only_typed`; None if any code may be imported."""
    return _TYPED.get()


@contextlib.contextmanager
def announced(file: str) -> Iterator[None]:
    """Context that resumes a run: each import is announced as named by `file`."""
    token = _ANNOUNCE.set(file)
    try:
        yield
    finally:
        _ANNOUNCE.reset(token)


def load_callable(name: str, *, rule: str) -> Callable[..., Any]:
    """Imports the callable that `MODULE:FUNCTION` names.

    The working directory comes first in the search for MODULE. All modules of this package are imported as `ev3_distill.*`, so
    a user's `teachers.py` or `config.py` never hides ours, and ours never hide the user's.

    Args:
      name: `MODULE:FUNCTION`; MODULE may have dots.
      rule: first part of the error message, such as "a metric is MODULE:FUNCTION".

    Raises:
      InputError: the import fails, the module lacks the function, or it is not callable; or a run names it that the user does
        not trust, see `only_typed`.
    """
    module_name, _, attribute = name.partition(":")
    _check_trusted(name)
    if file := _ANNOUNCE.get():
        print(f"ev3-distill: importing {name}, which {file} names", file=sys.stderr)
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory; it stays, because user code may import its neighbors later
    try:
        module = importlib.import_module(module_name)
        _check_not_hidden(module_name, module)
        function = getattr(module, attribute)
    except Exception as error:  # user code may raise anything
        raise InputError(
            f"{rule}; got '{name}', which fails with {summary(error)}: check the name, or run in the folder of the module"
        ) from error
    if not callable(function):
        raise InputError(f"{rule}; got '{name}', which is of type {type(function).__name__}: name a function")
    return function


def _check_trusted(name: str) -> None:
    texts = typed()
    if texts is not None and not any(name in text for text in texts):
        raise InputError(
            f"reading a run imports no code that only the run names; got '{name}': if you trust the run, add --trust-run"
        )


def source_digest(name: str) -> str | None:
    """SHA-256 of the file of MODULE in `MODULE:FUNCTION`, which must be importable; None where it has no file.

    It is a record of what was run, not a proof: the module may import others.
    """
    _check_trusted(name)
    file = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
    return sha256_of(Path(file)) if file and Path(file).is_file() else None


def _check_not_hidden(name: str, module: ModuleType) -> None:
    """Raises ImportError if an installed module that was imported earlier, such as `types`, hides the user's file."""
    path = Path(*name.split("."))
    files = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
    loaded = getattr(module, "__file__", None)
    if not files or (loaded and any(file.samefile(loaded) for file in files)):
        return
    if loaded is None or any(Path(loaded).is_relative_to(folder) for folder in sys.path if folder):
        raise ImportError(f"{files[0]} is hidden by another module, {loaded or 'a built-in one'}; rename your file")
