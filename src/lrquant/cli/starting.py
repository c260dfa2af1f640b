"""The seconds in which libraries are imported: Ctrl-C ends a command in one line then too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path


@contextmanager
def starting() -> Iterator[None]:
    """Around the imports; in another program that imports this package, Ctrl-C is left alone."""
    try:
        yield
    except KeyboardInterrupt:
        if not _is_command(sys.orig_argv):
            raise
        if sys.stderr is not None:
            print("lrquant: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _is_command(words: list[str]) -> bool:
    """Whether the process is `lrquant …` or `python -m lrquant …`."""
    as_module = any(pair == ("-m", "lrquant") for pair in pairwise(words))
    return as_module or any(Path(word).name == "lrquant" for word in words[:2])
