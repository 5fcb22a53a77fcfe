"""User-facing errors and warnings."""

import sys

SUMMARY_CHARS = 200  # longest text of another library's error that is repeated in an error of ours


class InputError(ValueError):
    """Invalid user input.

    The message states the rule, the value that breaks it, and how to fix it: "RULE; got VALUE: FIX". The command line
    prints it and exits with code 2.
    """


class RequirementError(Exception):
    """Valid input whose result does not meet a requirement, so that nothing is delivered.

    The message has the form of an InputError's. The command line prints it and exits with code 3.
    """


def check(ok: bool, rule: str, got: object, way_out: str) -> None:
    """Raises InputError with a message of three parts unless `ok`.

    Args:
      ok: whether the input follows the rule.
      rule: what must hold, such as "batch_size must be at least 1".
      got: the offending value.
      way_out: what to do about it, such as "try 128".
    """
    if not ok:
        raise InputError(f"{rule}; got {got}: {way_out}")


def summary(error: BaseException) -> str:
    """Type and first line of an exception, for use inside an error message."""
    line = first_line(str(error))
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def first_line(text: str) -> str:
    """First line of a text that is not blank, cut to `SUMMARY_CHARS`; empty if there is none."""
    lines = text.strip().splitlines()
    return lines[0][:SUMMARY_CHARS] if lines else ""


def warn(line: str) -> None:
    """Prints a warning to stderr."""
    print(f"ev3-distill: warning: {line}", file=sys.stderr)
