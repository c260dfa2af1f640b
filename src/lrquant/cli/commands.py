"""The commands: flags to configuration, records to text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrquant.config.choices import SettingValues
from lrquant.config.config import (
    Config,
    measured_settings,
    overridden,
    settings_afterwards,
    typed_settings,
)
from lrquant.config.settings import convert, read_yaml
from lrquant.errors import LRQuantError
from lrquant.version import __version__

if TYPE_CHECKING:
    from lrquant.cli.screen import Screen
    from lrquant.runs.results import Results

    _Commands = argparse._SubParsersAction["_Parser"]
    _Function = Callable[[argparse.Namespace, Screen], int | None]

_RESUME_IN_PLACE = ""
_STATISTICS_SETTINGS = (
    *("model", "net", "calib_dataset", "nsamples", "seqlen", "seed", "data_dir", "cache_dir"),
    *("device", "precision", "offload"),
    *("calib_images", "calib_image_share", "image_token_weight", "text_column", "bos"),
)
_EVALUATE_SETTINGS = (
    *(entry.name for kind in measured_settings() for entry in dataclasses.fields(kind)),
    *("compare", "tta", "tta_blocks", "tta_epochs", *settings_afterwards(), "limit", "seqlen"),
    *("data_dir", "cache_dir", "device", "precision", "offload", "output_dir", "report", "log_dir"),
    *("text_column", "bos"),
)
_EXPORT_SETTINGS = ("format", "target", "save_dtype", "model", "device", "overwrite")


def carry_out(words: Sequence[str]) -> int:
    """Run the command that these words are, and say its exit code."""
    options = parsed(words)
    from lrquant.cli.screen import Screen, log_to  # not for --version and --help, which end above

    screen = Screen()
    log_to(screen)
    code = options.command(options, screen) or 0
    screen.require_whole()
    return code


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The command that these words are, as `command`, with its options; LRQuantError for others."""
    _require_words(words)
    return _parser().parse_args(_with_dashes(words))


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are errors like all others: one line."""

    def error(self, message: str) -> typing.NoReturn:
        raise LRQuantError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lrquant", description="Quantise language models with LRQuant.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lrquant {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quantize = _command(commands, "quantize", "learn a quantised model and measure it", _quantize)
    quantize.add_argument("--config", type=Path, help="YAML with any of these settings")
    quantize.add_argument("--published-statistics", action="store_true", help=argparse.SUPPRESS)
    _add_settings(quantize, [entry.name for entry in dataclasses.fields(Config)])

    check = _command(commands, "check", "say before a run whether it will work", _check)
    check.add_argument("--config", type=Path, help="YAML with any of these settings")
    check.add_argument("--json", action="store_true", help="findings and estimates as JSON")
    _add_settings(check, [entry.name for entry in dataclasses.fields(Config)])

    stats = _command(commands, "stats", "gather activation statistics of a model", _stats)
    _add_settings(stats, _STATISTICS_SETTINGS)
    stats.add_argument("--num-samples", dest="nsamples", default=None, help=argparse.SUPPRESS)
    stats.add_argument("--seq-len", dest="seqlen", default=None, help=argparse.SUPPRESS)
    _add_settings(stats, ["overwrite"])
    stats.add_argument("--scales-output-path", type=Path, default=Path("act_scales"))
    stats.add_argument("--shifts-output-path", type=Path, default=Path("act_shifts"))

    evaluate = _command(commands, "evaluate", "measure a run or a model", _evaluate)
    evaluate.add_argument("target", help="run folder, or a model as for --model")
    _add_settings(evaluate, _EVALUATE_SETTINGS)

    export = _command(commands, "export", "write a finished run as a checkpoint", _export)
    export.add_argument("run", help="run folder")
    export.add_argument("folder", help="folder to make")
    _add_settings(export, _EXPORT_SETTINGS)

    report = _command(commands, "report", "write a run's report.html, .md and .json anew", _report)
    report.add_argument("run", type=Path, help="run folder")

    compare = _command(commands, "compare", "show several runs side by side in a page", _compare)
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    compare.add_argument(
        "--output", type=Path, default=Path("compare.html"), help="page to write [compare.html]"
    )

    inspect = _command(commands, "inspect", "show what a run folder or checkpoint is", _inspect)
    inspect.add_argument("target", type=Path, help="run folder or checkpoint folder")
    return parser


def _command(
    commands: _Commands, name: str, text: str, function: _Function
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(command=function)
    return command


def _require_words(arguments: Sequence[str]) -> None:
    """Refuse an empty argument, which would mean a default or the present folder."""
    for before, argument in zip(["lrquant", *arguments], arguments, strict=False):
        flag, _, value = argument.partition("=")
        if not argument.strip() or (flag.startswith("--") and flag != argument and not value):
            raise LRQuantError(f"{flag.strip() or before} '': empty; give a value, or leave it out")


def _with_dashes(arguments: Sequence[str]) -> list[str]:
    """--act_scales and --act-scales alike."""
    result = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            argument = flag.replace("_", "-") + equals + value
        result.append(argument)
    return result


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    hints = typing.get_type_hints(Config)
    entries = {entry.name: entry for entry in dataclasses.fields(Config)}
    for name in names:
        entry, kind = entries[name], hints[name]
        flag = "--" + name.replace("_", "-")
        text = f"{entry.metadata['help']} [{_shown(entry.default)}]"
        if name == "compare":
            parser.add_argument(
                flag, dest=name, nargs="?", const=True, default=None, metavar="BASE", help=text
            )
            parser.add_argument(f"--no-{name}", dest=name, action="store_false", default=None)
        elif bool in (kind, *typing.get_args(kind)):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, dest=name, action=action, default=None, help=text)
        elif name == "scheme_for":
            parser.add_argument(
                flag, dest=name, action="append", metavar="PATTERN=SCHEME", help=text
            )
        elif name == "resume":
            parser.add_argument(
                flag, dest=name, nargs="?", const=_RESUME_IN_PLACE, metavar="RUN", help=text
            )
        else:
            parser.add_argument(flag, dest=name, default=None, help=text.replace("%", "%%"))


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    return "none" if default in (None, "") else str(default).lower()


def _settings(options: argparse.Namespace, names: Sequence[str]) -> SettingValues:
    """The settings that were typed, converted."""
    hints = typing.get_type_hints(Config)
    typed = {name: getattr(options, name) for name in names}
    return {
        name: convert(hints[name], value, "--" + name.replace("_", "-"))
        for name, value in typed.items()
        if value is not None
    }


def _config(settings: SettingValues) -> Config:
    return Config(**typed_settings(settings, "command line"))


def _quantize(options: argparse.Namespace, screen: Screen) -> int:
    from lrquant.cli.bars import BarProgress
    from lrquant.pipeline import run

    settings = _settings_of_a_run(options)
    if options.published_statistics:
        settings = _with_published_statistics(settings)
    try:
        finished = run(settings, progress=BarProgress(screen))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished blocks are kept, go on with --resume") from None
    _print_results(finished.results, screen)
    screen.say(f"run folder: {finished.config.output_dir}")
    return _exit_code(finished.results)


def _settings_of_a_run(options: argparse.Namespace) -> SettingValues:
    """What was typed over what the file of settings says, and where a run is resumed."""
    names = [entry.name for entry in dataclasses.fields(Config)]
    origin = str(options.config)
    from_file = typed_settings(read_yaml(options.config), origin) if options.config else {}
    settings = overridden(from_file, _settings(options, names))
    if settings.get("resume") == _RESUME_IN_PLACE:
        settings["resume"] = settings.get("output_dir", Config.output_dir)
    elif settings.get("resume") and "output_dir" not in settings:
        settings["output_dir"] = settings["resume"]
    return settings


def _check(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.preflight.checks import preflight
    from lrquant.report.preflight import preflight_text, preflight_values

    logging.getLogger("lrquant").setLevel(logging.ERROR)  # what is left out is a finding
    report = preflight(_settings_of_a_run(options))
    if options.json:
        screen.say(json.dumps(preflight_values(report), indent=1))
    else:
        screen.say(preflight_text(report))
    if report.failed:
        what = ", ".join(dict.fromkeys(finding.what for finding in report.failed))
        raise LRQuantError(f"check: {len(report.failed)} of {len(report.findings)} failed: {what}")


def _with_published_statistics(settings: SettingValues) -> SettingValues:
    """Use ./act_scales/NET.pt and ./act_shifts/NET.pt where the published tool leaves them."""
    net = _config(settings).net_name
    files = {name: Path(name) / f"{net}.pt" for name in ("act_scales", "act_shifts")}
    present = {name: str(path) for name, path in files.items() if path.is_file()}
    return {**present, **settings}


def _stats(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.cli.bars import BarProgress
    from lrquant.ingredients.base.statistics import require_replaceable
    from lrquant.pipeline import collect_statistics

    config = _config(_settings(options, (*_STATISTICS_SETTINGS, "overwrite")))
    scales = options.scales_output_path / f"{config.net_name}.pt"
    shifts = options.shifts_output_path / f"{config.net_name}.pt"
    require_replaceable((scales, shifts), config.overwrite)
    statistics = collect_statistics(config, progress=BarProgress(screen))
    statistics.save(scales, shifts)
    screen.say(f"{len(statistics.maxima)} linears: {scales}, {shifts}")


def _evaluate(options: argparse.Namespace, screen: Screen) -> int:
    from lrquant.cli.bars import BarProgress
    from lrquant.pipeline import evaluate

    settings = _settings(options, _EVALUATE_SETTINGS)
    results = evaluate(options.target, progress=BarProgress(screen), **settings)
    _print_results(results, screen)
    return _exit_code(results)


def _export(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.cli.bars import BarProgress
    from lrquant.pipeline import export

    settings = _settings(options, _EXPORT_SETTINGS)
    export(options.run, options.folder, progress=BarProgress(screen), **settings)
    screen.say(f"checkpoint: {options.folder}")


def _report(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.report.writing import write_report
    from lrquant.runs.claims import held
    from lrquant.runs.folder import RunFolder

    folder = RunFolder.open(options.run)
    with held(options.run):
        screen.say(f"report: {write_report(folder)}")


def _compare(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.report.writing import write_comparison

    screen.say(f"comparison: {write_comparison(options.runs, options.output)}")


def _inspect(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.report.inspection import inspect_folder

    screen.say(inspect_folder(options.target))


def _print_results(results: Results, screen: Screen) -> None:
    from lrquant.measures.tables import results_table

    table = results_table(results)
    if table:
        screen.say(table)


def _exit_code(results: Results) -> int:
    verdict = results.get("max_drop")
    return 1 if isinstance(verdict, dict) and not verdict["acceptable"] else 0
