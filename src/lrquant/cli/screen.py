"""The screen: what a command writes on standard output, also on one that is full or closed."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress

from rich.console import Console

from lrquant.cli.tables import fitted
from lrquant.errors import LRQuantError, visible


class Screen(Console):
    """Standard output: a line that can't be written stops nothing, and is told of at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._lost: str | None = None

    def log_line(self, line: str) -> None:
        """A line above the progress bars, never folded."""
        try:
            self.print(visible(line), soft_wrap=True, markup=False, highlight=False)
        except OSError as error:
            self._lose(error)

    def say(self, text: str) -> None:
        """What was asked for; in a terminal, tables that are too wide for it row by row."""
        text = fitted(text, self.width) if self.is_terminal else text
        try:
            print(visible(text), flush=True)
        except OSError as error:
            self._lose(error)

    def part(self, text: str) -> None:
        """A part of what was asked for, as it comes."""
        try:
            print(visible(text), end="", flush=True)
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


class _ScreenHandler(logging.Handler):
    """Log lines above the progress bars."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.log_line(self.format(record))


def log_to(screen: Screen, *, quiet: bool = False, verbose: bool = False) -> None:
    """Show what the package logs; warnings alone if `quiet`, with the time of day if `verbose`."""
    logger, handler = logging.getLogger("lrquant"), _ScreenHandler(screen)
    if verbose:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
