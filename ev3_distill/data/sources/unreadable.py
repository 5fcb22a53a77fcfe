"""The error of an example that cannot be read."""


class Unreadable(Exception):
    """An example cannot be read; the message gives a short reason."""
