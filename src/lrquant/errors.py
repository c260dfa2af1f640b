"""The one error a user can cause: what happened, which value, what would do."""

import pickle
import struct


class LRQuantError(Exception):
    """Bad input or environment; the command line prints it as one line and exits with code 2."""


UNREADABLE = (  # what torch's restricted unpickler raises on damaged files
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, pickle.UnpicklingError, struct.error),
)
