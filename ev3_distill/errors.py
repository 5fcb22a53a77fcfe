"""The one error that a user's input may raise: the command line prints it alone and ends with exit code 2."""


class InputError(ValueError):
    """Something the user gave breaks a rule. The message names the rule, the value got, and the way out."""
