"""Entry points: the words of a command to its exit code, an error or Ctrl-C to one line."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from lrquant.errors import LRQuantError, visible


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what was asked, 2 with one line on standard error if not.

    1 is the answer of `--max-drop`: more accuracy was lost than it allows; 130 that of Ctrl-C, also
    in the seconds in which libraries are imported.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _mend_streams()
        from lrquant.cli.parsing import carry_out

        return carry_out(words)
    except LRQuantError as error:
        if "--verbose" in words:
            traceback.print_exc()
        _complain(str(error))
        return 2
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _complain(f"{error.strerror or error}{where}")
        return 2
    except KeyboardInterrupt as interrupt:  # what it may say is how to go on
        _complain("; ".join(("interrupted", *map(str, interrupt.args))))
        return 130


def quantize_main(arguments: Sequence[str] | None = None) -> int:
    """The published tool's main.py: `lrquant quantize`, with its statistics files if present."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return main(["quantize", "--published-statistics", *words])


def statistics_main(arguments: Sequence[str] | None = None) -> int:
    """The published tool's generate_act_scale_shift.py: `lrquant stats`."""
    return main(["stats", *(sys.argv[1:] if arguments is None else arguments)])


def _mend_streams() -> None:
    """Standard output and error that exist, and that take any character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _complain(text: str) -> None:
    """One line on standard error, if it takes one."""
    with suppress(OSError, ValueError):
        print(f"lrquant: {visible(text)}", file=sys.stderr, flush=True)
