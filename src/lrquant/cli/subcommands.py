"""The commands as parsers: their words, their flags, and what carries them out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import lrquant.cli.commands as commands
import lrquant.cli.knowledge as knowledge
import lrquant.cli.talk as talk
from lrquant.cli.completion import SHELLS
from lrquant.cli.flags import Parser, add_settings, command_parser
from lrquant.cli.listing import KINDS
from lrquant.config.core import TARGETS

if TYPE_CHECKING:
    Subparsers: TypeAlias = argparse._SubParsersAction[Parser]


def add_runs(subparsers: Subparsers, every: bool) -> None:
    """`quantize`, and `check`, which has its flags."""
    quantize = command_parser(
        subparsers,
        "quantize",
        "learn a quantised model, write it and measure it",
        "--model PATH --scheme WxAy [flags]",
    )
    quantize.add_argument("--published-statistics", action="store_true", help=argparse.SUPPRESS)
    _add_run(quantize, every)
    quantize.set_defaults(command=commands._quantize, together=True)

    check = command_parser(
        subparsers,
        "check",
        "say before a run whether it will work, and what it will take",
        "--model PATH --scheme WxAy [flags of quantize]",
    )
    check.add_argument("--json", action="store_true", help="findings and estimates as JSON")
    _add_run(check, every)
    check.set_defaults(command=commands._check)


def _add_run(parser: Parser, every: bool) -> None:
    """What `quantize` and `check` have alike."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with any settings")
    add_settings(parser, commands.RUN_SETTINGS, every)
    parser.add_argument(
        "--no-save", dest="save", action="store_false", help="a run alone, without a checkpoint"
    )


def add_evaluate(subparsers: Subparsers, every: bool) -> None:
    evaluate = command_parser(
        subparsers, "evaluate", "measure a run, a checkpoint or a model", "TARGET [flags]"
    )
    evaluate.add_argument("target", metavar="TARGET", help="run folder, or a model as for --model")
    add_settings(evaluate, commands.EVALUATE_SETTINGS, every)
    evaluate.set_defaults(command=commands._evaluate, together=True)


def add_export(subparsers: Subparsers, every: bool) -> None:
    export = command_parser(
        subparsers, "export", "write a finished run as a checkpoint", "RUN DIR [flags]"
    )
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument("folder", metavar="DIR", help="folder to make")
    add_settings(export, commands.EXPORT_SETTINGS, every)
    export.set_defaults(command=commands._export, together=True)


def add_readers(subparsers: Subparsers) -> None:
    """Commands that show what is there."""
    inspect = command_parser(
        subparsers, "inspect", "show what a run folder or checkpoint is", "TARGET"
    )
    inspect.add_argument("target", type=Path, metavar="TARGET", help="run or checkpoint folder")
    inspect.set_defaults(command=commands._inspect)

    families = command_parser(subparsers, "families", "show every model family with its sites", "")
    families.set_defaults(command=commands._families)

    report = command_parser(
        subparsers, "report", "write a run's report.html, .md and .json anew", "RUN"
    )
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")
    report.set_defaults(command=commands._report)

    compare = command_parser(
        subparsers,
        "compare",
        "show runs, checkpoints and models side by side in a page",
        "TARGET [TARGET …]",
    )
    compare.add_argument(
        "runs",
        nargs="+",
        metavar="TARGET",
        help="run, checkpoint, folder of results, or a model as for --model",
    )
    compare.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("compare.html"),
        help="page to write [compare.html]",
    )
    compare.set_defaults(command=commands._compare)


def add_stats(subparsers: Subparsers, every: bool) -> None:
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


def add_talk(subparsers: Subparsers) -> None:
    """What talks with a checkpoint, and what says how to serve it."""
    for name, text, function in (
        ("chat", "talk with a checkpoint in the terminal", talk.chat),
        ("generate", "let a checkpoint answer, or go on with, one text", talk.generate),
    ):
        words = "DIR [flags]" if name == "chat" else 'DIR "TEXT" [flags]'
        command = command_parser(subparsers, name, text, words)
        command.add_argument("folder", metavar="DIR", help="checkpoint, or a model as for --model")
        if name == "generate":
            command.add_argument("text", metavar="TEXT", help="what to answer")
        command.add_argument(
            "--max-tokens", type=int, metavar="N", default=256, help="of an answer, at most [256]"
        )
        command.add_argument(
            "--temperature",
            type=float,
            metavar="X",
            help="of drawing tokens; 0: none are drawn (default: as the model's settings say)",
        )
        command.add_argument("--seed", type=int, metavar="N", default=0, help="of drawing [0]")
        command.add_argument("--device", metavar="NAME", default="auto", help="as for quantize")
        command.set_defaults(command=function)

    serve = command_parser(
        subparsers, "serve", "say the command by which a runtime serves a checkpoint", "DIR"
    )
    serve.add_argument("folder", type=Path, metavar="DIR", help="checkpoint")
    serve.add_argument("--target", metavar="|".join(TARGETS), default="vllm", help="runtime [vllm]")
    serve.set_defaults(command=talk.serve)


def add_knowledge(subparsers: Subparsers) -> None:
    """What there is, and which of it to take."""
    kinds = "|".join(KINDS)
    lists = command_parser(subparsers, "list", "show what there is", f"{kinds} [WORD]")
    lists.add_argument("kind", metavar=kinds, help="what to list")
    lists.add_argument("word", metavar="WORD", nargs="?", help="of tasks: those that hold it")
    lists.set_defaults(command=knowledge.show_list)

    guide = command_parser(
        subparsers, "guide", "which scheme for which hardware, runtime and model size", ""
    )
    guide.set_defaults(command=knowledge.show_guide)

    shells = "|".join(SHELLS)
    completion = command_parser(
        subparsers, "completion", "print a shell's completion script", shells
    )
    completion.add_argument("shell", metavar=shells, help="the shell")
    completion.set_defaults(command=knowledge.show_completion)
