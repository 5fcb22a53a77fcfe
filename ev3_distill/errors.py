"""What a user is told of a mistake: the one error that he meets, and warnings."""

import sys


class InputError(ValueError):
    """Bad input from a user. The message names the rule, the value and the way out; the CLI exits with code 2."""


def warn(line: str) -> None:
    """A line that a user should not miss."""
    print(f"ev3-distill: warning: {line}", file=sys.stderr)
