"""The words of a command line: the commands, and which one is asked for with which options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lrquant.cli.flags import ALL, Parser, require_flags, require_words, with_dashes
from lrquant.cli.subcommands import (
    add_evaluate,
    add_export,
    add_knowledge,
    add_readers,
    add_runs,
    add_stats,
    add_talk,
)
from lrquant.errors import LRQuantError, nearest
from lrquant.team.launch import Launch
from lrquant.version import __version__


def carry_out(words: Sequence[str]) -> int:
    """Run the command that these words are, and say its exit code.

    Of several processes the first alone speaks, and alone does what they do not do together.
    """
    options = parsed(words)
    if Launch.of_environment().rank:
        if not options.together:
            return 0
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    from lrquant.cli.screen import Screen, log_to  # not for --version and --help, which end above

    screen = Screen()
    log_to(screen, quiet=options.quiet, verbose=options.verbose)
    code: int | None = options.command(options, screen)
    screen.require_whole()
    return code or 0


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The command that these words are, as `command`, with its options; LRQuantError for others."""
    require_words(words)
    words = with_dashes(words)
    top, by_name = parsers(every=ALL in words)
    name = words[0] if words and not words[0].startswith("-") else None
    if name in by_name:
        require_flags(name, by_name[name], words[1:])
    elif name is not None:
        mend = nearest(name, by_name) or "; see lrquant --help"
        raise LRQuantError(f"{name}: no such command{mend}")
    return top.parse_args(words)


def parsers(every: bool) -> tuple[Parser, dict[str, Parser]]:
    """The whole parser, and that of each command; the help of `every` flag, or of the first."""
    top = Parser(
        prog="lrquant", description="Quantise language models with LRQuant.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"lrquant {__version__}")
    top.set_defaults(together=False)
    subparsers = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    add_runs(subparsers, every)
    add_evaluate(subparsers, every)
    add_export(subparsers, every)
    add_talk(subparsers)
    add_readers(subparsers)
    add_stats(subparsers, every)
    add_knowledge(subparsers)
    subparsers.choices["completion"].set_defaults(parsers=parsers)
    return top, dict(subparsers.choices)
