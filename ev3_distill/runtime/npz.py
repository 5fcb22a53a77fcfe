"""Reading a user's npz file: named arrays in one of several forms, never unpickled."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ev3_distill.errors import InputError

_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, zlib.error)


def read(
    path: Path, forms: Sequence[Sequence[str]], *, optional: str, option: str, wanted: str
) -> dict[str, np.ndarray]:
    """The arrays of the first form that a file has in full, and an optional one.

    Args:
      path: of the file.
      forms: each a set of array names that belong together.
      optional: name of an array that is also read where it is there.
      option: what the user gave the file to, such as `npz:FILE`.
      wanted: the forms in words.

    Raises:
      InputError: no such file, not a whole npz file, object arrays, or no form in full.
    """
    if not path.is_file():
        raise InputError(f"{option} needs a file; got {path}, which is missing or no file: check the path")
    found, array, arrays = [], "", {}
    try:
        with path.open("rb") as file:
            npz = np.load(file, allow_pickle=False)
            if isinstance(npz, np.ndarray):
                raise ValueError("it holds one array without a name")
            found = sorted(npz.files)
            form = next((form for form in forms if set(form) <= set(found)), None)
            for array in [*form, *({optional} & set(found))] if form else []:
                arrays[array] = npz[array]
    except _UNREADABLE as error:
        if "Object arrays" in str(error):
            raise InputError(
                f"{path}: arrays must hold numbers or text; got Python objects in {array!r}: save it with a plain dtype"
            ) from None
        raise InputError(
            f"{path} must be a whole npz file; got one that cannot be read ({error}): write it again with numpy.savez"
        ) from None
    if not arrays:
        raise InputError(f"{path} must hold {wanted}; got {', '.join(found) or 'no array'}: rename or add arrays")
    return arrays
