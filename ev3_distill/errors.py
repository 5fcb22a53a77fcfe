"""User-facing errors and warnings."""

import sys


class InputError(ValueError):
    """Bad input from a user. The message states the rule, the value and the way out; the command line exits with code 2."""


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


def warn(message: str) -> None:
    """Prints a warning to standard error."""
    print(f"ev3-distill: warning: {message}", file=sys.stderr)
