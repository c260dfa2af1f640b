"""Flags: the settings of a command in groups, those that matter first; words that are none."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from functools import cache

from lrquant.cli.usual import IN_PLACE
from lrquant.config.choices import SettingValues
from lrquant.config.config import ALSO_CALLED, Config
from lrquant.config.settings import convert
from lrquant.config.titles import grouped
from lrquant.errors import LRQuantError

ALL = "--help-all"
_FIRST = (  # what the short help has
    *("model", "scheme", "preset", "save_dir", "format", "target", "resume", "overwrite"),
    *("calib_dataset", "data_dir", "nsamples", "ppl", "tasks", "compare", "device"),
)
_FEW = 15  # settings of which the short help has all
_ALIKE = 0.75  # how alike a flag must be to be named as the nearest
_USUAL = {  # defaults of a command that makes a run
    "preset": "fast, where nothing that is learned is named",
    **{"save_dir": "./MODEL-SCHEME, where --output-dir is not given", "format": "auto there"},
    **{"output_dir": "SAVE_DIR-run", "epochs": "5 with fast, else 10"},
}
_METAVARS = {
    **{"model": "PATH", "scheme": "WxAy", "vision_scheme": "WxAy", "calib_dataset": "SETS"},
    **{"ppl": "SETS", "agreement": "SETS", "tasks": "NAMES", "loss": "TERMS", "vqa": "FILE"},
    **{"act_scales": "FILE", "act_shifts": "FILE", "calib_images": "PATH"},
    "push_to_hub": "NAME",
    **{"task_batch_size": "N", "resume": "RUN", "compare": "BASE", "scheme_for": "PATTERN=WxAy"},
}


class Parser(argparse.ArgumentParser):
    """Wrong arguments are errors like all others: one line."""

    def error(self, message: str) -> typing.NoReturn:
        raise LRQuantError(f"{message}; see {self.prog} --help")


def command_parser(
    commands: argparse._SubParsersAction[Parser], name: str, text: str, usage: str
) -> Parser:
    """A command, with what every command has."""
    command = commands.add_parser(
        name, help=text, description=text, usage=f"lrquant {name} {usage}", allow_abbrev=False
    )
    command.add_argument(ALL, action="help", help="show every flag and exit")
    screen = command.add_argument_group("screen")
    loud = screen.add_mutually_exclusive_group()
    loud.add_argument("--quiet", action="store_true", help="results and warnings alone")
    loud.add_argument(
        "--verbose", action="store_true", help="the time on every line; where an error came from"
    )
    return command


def add_settings(command: Parser, names: Sequence[str], every: bool) -> None:
    """The flags of settings, in groups; with not `every`, the help has the first of them alone."""
    entries = {entry.name: entry for entry in dataclasses.fields(Config)}
    every = every or len(names) <= _FEW
    for title, members in grouped(names).items():
        group = command.add_argument_group(title)
        for name in members:
            shown = every or name in _FIRST
            usual = _USUAL.get(name) if "save_dir" in names else None
            _add_setting(group, entries[name], shown, usual or _default(entries[name]))
    if "save_dir" in names:
        command.add_argument("--preset", dest="preset", default=None, help=argparse.SUPPRESS)
    hidden = 0 if every else len(set(names) - set(_FIRST))
    if hidden:
        command.epilog = f"{hidden} more settings: {command.prog} {ALL}"


def settings_of(options: argparse.Namespace, names: Sequence[str]) -> SettingValues:
    """The settings that were typed, converted."""
    hints = typing.get_type_hints(Config)
    typed = {name: getattr(options, name) for name in names}
    return {
        name: convert(hints[name], value, flag_of(name))
        for name, value in typed.items()
        if value is not None
    }


def flag_of(name: str) -> str:
    """A setting's flag."""
    return "--" + name.replace("_", "-")


def require_words(arguments: Sequence[str]) -> None:
    """Refuse an empty argument, which would mean a default or the present folder."""
    for before, argument in zip(["lrquant", *arguments], arguments, strict=False):
        flag, _, value = argument.partition("=")
        if not argument.strip() or (flag.startswith("--") and flag != argument and not value):
            raise LRQuantError(f"{flag.strip() or before} '': empty; give a value, or leave it out")


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """--act_scales and --act-scales alike."""
    result = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            argument = flag.replace("_", "-") + equals + value
        result.append(argument)
    return result


def require_flags(command: str, parser: Parser, words: Sequence[str]) -> None:
    """Refuse a flag that a command does not have, with the nearest that it has."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for word in words:
        flag = word.partition("=")[0]
        if word == "--":
            return
        if flag.startswith("--") and flag not in flags:
            near = difflib.get_close_matches(flag, flags, 1, _ALIKE)
            mend = f"the nearest is {near[0]}" if near else f"see lrquant {command} {ALL}"
            raise LRQuantError(f"unrecognized arguments: {flag}; {mend}")


def _add_setting(
    group: argparse._ArgumentGroup, entry: dataclasses.Field[object], shown: bool, default: str
) -> None:
    name, kind = entry.name, _hints()[entry.name]
    flags = [flag_of(other) for other, own in ALSO_CALLED.items() if own == name]
    flags = flags or [flag_of(name)]
    text = entry.metadata["help"] + (f" [{default}]" if default else "")
    text = text.replace("%", "%%") if shown else argparse.SUPPRESS
    metavar = _metavar(entry, kind)
    if name == "compare":
        group.add_argument(
            *flags, dest=name, nargs="?", const=True, default=None, metavar=metavar, help=text
        )
        group.add_argument(
            f"--no-{name}", dest=name, action="store_false", default=None, help=argparse.SUPPRESS
        )
    elif bool in (kind, *typing.get_args(kind)):
        action = argparse.BooleanOptionalAction
        group.add_argument(*flags, dest=name, action=action, default=None, help=text)
    elif name == "resume":
        group.add_argument(*flags, dest=name, nargs="?", const=IN_PLACE, metavar=metavar, help=text)
    else:
        action_name = "append" if name == "scheme_for" else "store"
        group.add_argument(
            *flags, dest=name, action=action_name, default=None, metavar=metavar, help=text
        )


@cache
def _hints() -> dict[str, object]:
    return typing.get_type_hints(Config)


def _metavar(entry: dataclasses.Field[object], kind: object) -> str:
    """What a flag's value is: its choices, a number, a folder, or what is in `_METAVARS`."""
    if entry.metadata["choices"]:
        several = typing.get_origin(kind) is tuple
        return "|".join(entry.metadata["choices"]) + (",…" if several else "")
    if entry.name in _METAVARS:
        return _METAVARS[entry.name]
    kinds = (kind, *typing.get_args(kind))
    if int in kinds or float in kinds:
        return "N" if int in kinds else "X"
    return "DIR" if entry.name.endswith("_dir") else "NAME"


def _default(entry: dataclasses.Field[object]) -> str:
    """A default for the help; empty where there is none, or the text says it."""
    default = entry.default
    if default in (None, "", ()) or "(default:" in entry.metadata["help"]:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(default) if isinstance(default, tuple) else str(default)
