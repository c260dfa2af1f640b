"""What a command writes on standard output and error, whatever they are: ASCII, full or closed."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

from rich.console import Console

from lrquant.errors import LRQuantError, visible


class Screen(Console):
    """Standard output: a line that can't be written stops nothing, and is told of at the end."""

    def __init__(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed before Python started
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            elif isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        super().__init__()
        self._lost: str | None = None

    def log_line(self, line: str) -> None:
        """A line above the progress bars, never folded."""
        try:
            self.print(visible(line), soft_wrap=True, markup=False, highlight=False)
        except OSError as error:
            self._lose(error)

    def say(self, text: str) -> None:
        """What was asked for."""
        try:
            print(visible(text), flush=True)
        except OSError as error:
            self._lose(error)

    def on_broken_pipe(self) -> None:
        """Who read the lines has gone; the base class would end the process."""
        self._lose(BrokenPipeError(None, "Broken pipe"))

    def require_whole(self) -> None:
        """Refuse to call a command done of which lines are lost."""
        if self._lost is not None:
            raise LRQuantError(
                f"standard output: {self._lost}; what was asked is done, but not all of it shown: "
                "send it elsewhere"
            )

    def _lose(self, error: OSError) -> None:
        self._lost = error.strerror or str(error)
        with suppress(OSError, ValueError):  # so that the rest, at exit too, goes nowhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def complain(text: str) -> None:
    """One line on standard error, if it takes one."""
    with suppress(OSError, ValueError):
        print(f"lrquant: {visible(text)}", file=sys.stderr, flush=True)
