"""Checks that the command line refuses an input, and faulty data."""

import re

import numpy as np


def refused(cli, here, *argv, says):
    """Asserts exit code 2, one error line that matches `says`, no traceback, and no file written."""
    before = _files(here)
    answer = cli(*argv)
    assert answer.code == 2, answer
    assert answer.out == ""
    assert re.search(says, answer.err), answer.err
    assert "Traceback" not in answer.err
    if not says.startswith("tyro:"):
        assert answer.err.startswith("ev3-distill: error: ")
        assert answer.err.count("\n") == 1, answer.err
    assert _files(here) == before
    return answer.err


def save_npz(path, *, rows=60, **changes):
    rng = np.random.default_rng(0)
    arrays = {"inputs": rng.normal(size=(rows, 4)).astype(np.float32), "labels": np.arange(rows) % 3, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def _files(folder):
    """All files below a folder but compiled modules."""
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
