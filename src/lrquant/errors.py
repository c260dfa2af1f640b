"""The one error a user can cause: what happened, which value, what would do."""


class LRQuantError(Exception):
    """Bad input or environment; the command line prints it as one line and exits with code 2."""
