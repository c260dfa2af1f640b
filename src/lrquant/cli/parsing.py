"""The words of a command line: the commands, and which one is asked for with which options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lrquant.cli.commands as commands
from lrquant.cli.flags import (
    ALL,
    Parser,
    add_settings,
    command_parser,
    require_flags,
    require_words,
    with_dashes,
)
from lrquant.errors import LRQuantError, nearest
from lrquant.version import __version__


def carry_out(words: Sequence[str]) -> int:
    """Run the command that these words are, and say its exit code."""
    options = parsed(words)
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
    subparsers = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    quantize = command_parser(
        subparsers,
        "quantize",
        "learn a quantised model, write it and measure it",
        "--model PATH --scheme WxAy [flags]",
    )
    quantize.add_argument("--published-statistics", action="store_true", help=argparse.SUPPRESS)
    _add_run(quantize, every)
    quantize.set_defaults(command=commands._quantize)

    check = command_parser(
        subparsers,
        "check",
        "say before a run whether it will work, and what it will take",
        "--model PATH --scheme WxAy [flags of quantize]",
    )
    check.add_argument("--json", action="store_true", help="findings and estimates as JSON")
    _add_run(check, every)
    check.set_defaults(command=commands._check)
    _add_evaluate(subparsers, every)
    _add_export(subparsers, every)
    _add_readers(subparsers)
    _add_stats(subparsers, every)
    return top, dict(subparsers.choices)


def _add_run(parser: Parser, every: bool) -> None:
    """What `quantize` and `check` have alike."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with any settings")
    add_settings(parser, commands.RUN_SETTINGS, every)
    parser.add_argument(
        "--no-save", dest="save", action="store_false", help="a run alone, without a checkpoint"
    )


def _add_evaluate(subparsers: argparse._SubParsersAction[Parser], every: bool) -> None:
    evaluate = command_parser(
        subparsers, "evaluate", "measure a run, a checkpoint or a model", "TARGET [flags]"
    )
    evaluate.add_argument("target", metavar="TARGET", help="run folder, or a model as for --model")
    add_settings(evaluate, commands.EVALUATE_SETTINGS, every)
    evaluate.set_defaults(command=commands._evaluate)


def _add_export(subparsers: argparse._SubParsersAction[Parser], every: bool) -> None:
    export = command_parser(
        subparsers, "export", "write a finished run as a checkpoint", "RUN DIR [flags]"
    )
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument("folder", metavar="DIR", help="folder to make")
    add_settings(export, commands.EXPORT_SETTINGS, every)
    export.set_defaults(command=commands._export)


def _add_readers(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Commands that show what is there."""
    inspect = command_parser(
        subparsers, "inspect", "show what a run folder or checkpoint is", "TARGET"
    )
    inspect.add_argument("target", type=Path, metavar="TARGET", help="run or checkpoint folder")
    inspect.set_defaults(command=commands._inspect)

    report = command_parser(
        subparsers, "report", "write a run's report.html, .md and .json anew", "RUN"
    )
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")
    report.set_defaults(command=commands._report)

    compare = command_parser(
        subparsers, "compare", "show several runs side by side in a page", "RUN [RUN …]"
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    compare.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("compare.html"),
        help="page to write [compare.html]",
    )
    compare.set_defaults(command=commands._compare)


def _add_stats(subparsers: argparse._SubParsersAction[Parser], every: bool) -> None:
    stats = command_parser(
        subparsers, "stats", "gather activation statistics of a model", "--model PATH [flags]"
    )
    stats.add_argument("--num-samples", dest="nsamples", default=None, help=argparse.SUPPRESS)
    stats.add_argument("--seq-len", dest="seqlen", default=None, help=argparse.SUPPRESS)
    add_settings(stats, commands.STATISTICS_SETTINGS, every)
    for what in ("scales", "shifts"):
        stats.add_argument(
            f"--{what}-output-path",
            type=Path,
            metavar="DIR",
            default=Path(f"act_{what}"),
            help=f"folder of the {what} [act_{what}]",
        )
    stats.set_defaults(command=commands._stats)
