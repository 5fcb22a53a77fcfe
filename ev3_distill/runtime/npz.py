"""npz files of the user: named arrays, never unpickled."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ev3_distill.errors import InputError

_READ_ERRORS = (OSError, ValueError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, zlib.error)


def read(
    path: Path, forms: Sequence[Sequence[str]], *, optional: str, option: str, expected: str
) -> dict[str, np.ndarray]:
    """Reads the arrays of the first form that a file has in full, and one optional array.

    Args:
      path: of the file.
      forms: sets of array names; each set belongs together.
      optional: name of an array that is read too if it is present.
      option: the option that named the file, such as `npz:FILE`.
      expected: the forms in words, for the error.

    Raises:
      InputError: the file is missing or damaged, an array holds Python objects, or no form is complete.
    """
    check_file(path, option=option)
    names: list[str] = []
    arrays = {}
    with readable(path), path.open("rb") as file:
        npz = np.load(file, allow_pickle=False)
        if isinstance(npz, np.ndarray):
            raise ValueError("it holds one array without a name")
        names = sorted(npz.files)
        form = next((form for form in forms if set(form) <= set(names)), None)
        for name in [*form, *({optional} & set(names))] if form else []:
            with without_objects(name, path):
                arrays[name] = npz[name]
    if not arrays:
        raise InputError(f"{path} must hold {expected}; got {', '.join(names) or 'no array'}: rename or add arrays")
    return arrays


def check_file(path: Path, *, option: str) -> None:
    """Checks that a file exists.

    Raises:
      InputError: it does not, or is a directory.
    """
    if not path.is_file():
        raise InputError(f"{option} needs a file; got {path}, which does not exist or is not a file: check the path")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Converts what numpy and zipfile raise for a damaged file into one error.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        yield
    except InputError:
        raise
    except _READ_ERRORS as error:
        raise InputError(
            f"{path} must be a complete npz file; got one that cannot be read ({error}): write it again with numpy.savez"
        ) from None


@contextlib.contextmanager
def without_objects(name: str, path: Path) -> Iterator[None]:
    """Converts numpy's refusal to unpickle into an error that names the array.

    Raises:
      InputError: the array holds Python objects.
    """
    try:
        yield
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise InputError(
            f"{path}: arrays must hold numbers or text; got Python objects in {name!r}: save it with a plain dtype"
        ) from None
