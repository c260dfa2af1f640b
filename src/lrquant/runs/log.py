"""The log of a run: run.log, which says what was said while it was under way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

from lrquant.files.whole import LogFile
from lrquant.runs.journal import Journal

_KEPT_LINES = 10_000


@contextmanager
def logged(journal: Journal, logger: logging.Logger, earlier: MemoryHandler) -> Iterator[None]:
    """Write what `logger` says, from INFO on, to run.log too, after what `earlier` kept.

    A log that cannot be written is no reason to stop.
    """
    handler: logging.Handler = logging.NullHandler()
    try:
        handler = LogFile(journal.claim_growing("run.log"), encoding="utf-8")
    except OSError as error:
        logger.warning("run.log cannot be written (%s)", error.strerror)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    earlier.setTarget(handler)
    earlier.flush()
    logger.removeHandler(earlier)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def kept_log(logger: logging.Logger) -> Iterator[MemoryHandler]:
    """Keep the log until there is a run folder to write it to."""
    handler = MemoryHandler(_KEPT_LINES, flushLevel=logging.CRITICAL + 1)
    level = logger.level
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
