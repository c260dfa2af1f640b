"""The one error a user can cause: what happened, which value, what would do."""

import pickle
import struct
from collections.abc import Iterable
from pathlib import Path

_INVISIBLE = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_INVISIBLE |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_INVISIBLE |= {ord("\n"): "\n", ord("\t"): "\t", 0x2028: " ", 0x2029: " "}


class LRQuantError(Exception):
    """Bad input or environment; the command line prints it as one line and exits with code 2.

    File names and texts of others are in it: it is made one line of visible characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(visible(message).splitlines()))


def visible(text: str) -> str:
    """The text with what could command a terminal, or turn words around, spelled out."""
    return text.translate(_INVISIBLE)


def nearest(word: str, words: Iterable[str]) -> str:
    """ "; the nearest is …" for a word that is none of `words`, empty where none is near."""
    from difflib import get_close_matches

    by_lower = {each.lower(): each for each in words}
    near = get_close_matches(word.lower(), by_lower, 1)
    return f"; the nearest is {by_lower[near[0]]}" if near else ""


def nearest_beside(path: Path) -> str:
    """As `nearest`: what is called alike in the folder of a path that is not there."""
    folder = path.parent
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    near = nearest(path.name, names)
    return near.replace("the nearest is ", f"the nearest is {folder}/") if near else ""


UNREADABLE = (  # what libraries raise on damaged files, torch's restricted unpickler first
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, pickle.UnpicklingError, struct.error, ArithmeticError, MemoryError),
)
