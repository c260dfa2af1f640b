"""The commands that repeat a run and what was measured of it later, from their settings."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from lrquant.config.config import Config, ingredient_kinds, names_method
from lrquant.errors import LRQuantError
from lrquant.runs.results import ASKED, Results, objects

_NOT_OF_THE_RUN = (
    "resume",
    "overwrite",
    "log_dir",
    "push_to_hub",
    "preset",
)  # a preset is spelled out
_ALWAYS = ("model", "scheme")
_ONE_A_FLAG = ("scheme_for",)  # lists whose flag is repeated; others are joined by commas


def repeating_command(config: Config) -> str:
    """`lrquant quantize …` with few flags that resolve to the same settings.

    Its output goes beside the run's folder and checkpoint, to the same names with "-again".
    """
    places = {
        name: path.rstrip("/") + "-again"
        for name in ("output_dir", "save_dir")
        if (path := getattr(config, name)) is not None
    }
    plain = dataclasses.replace(
        config,
        resume=None,
        overwrite=False,
        log_dir=None,
        push_to_hub=None,
        preset="default",
        **places,
    ).resolved()
    defaults = Config()
    changed = [
        entry.name
        for entry in dataclasses.fields(Config)
        if getattr(plain, entry.name) != getattr(defaults, entry.name)
        and entry.name not in _NOT_OF_THE_RUN
    ]
    names = list(dict.fromkeys([*_ALWAYS, *changed]))
    switches = tuple(kind.switch for kind in ingredient_kinds() if kind.by_default)
    wholes = {entry.metadata["part_of"] for entry in dataclasses.fields(Config)}
    optional = [name for name in names if name not in _ALWAYS]
    single = [(name,) for name in sorted(optional, key=lambda name: name in wholes)]
    for left_out in (switches, *single):
        fewer = [name for name in names if name not in left_out]
        if _say_all(fewer, plain):
            names = fewer
    words = ["lrquant", "quantize"]
    for name in names:
        words += _flag(name, getattr(plain, name))
    if not names_method({name: getattr(plain, name) for name in names}):
        words += ["--recipe", "default"]
    return shlex.join(words)


def measuring_commands(config: Config, results: Results) -> list[str]:
    """`lrquant evaluate …` as it was asked of the run later, of the run that repeats it."""
    place = config.output_dir.rstrip("/") + "-again"
    commands = []
    for asked in objects(results.get(ASKED)):
        words = ["lrquant", "evaluate", place]
        for name, value in asked.items():
            words += _flag(name, tuple(map(str, value)) if isinstance(value, list) else value)
        commands.append(shlex.join(words))
    return commands


def settings_said(config: Config) -> dict[str, str]:
    """Every setting of a run that is not the default, places and how to go on apart, as text."""
    apart = {*_NOT_OF_THE_RUN, "output_dir", "save_dir", "wbits", "abits"}
    return {
        entry.name: _as_text(getattr(config, entry.name))
        for entry in dataclasses.fields(Config)
        if entry.name not in apart and getattr(config, entry.name) != entry.default
    }


def _as_text(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _say_all(names: Sequence[str], config: Config) -> bool:
    """Whether the settings of these names resolve to all of them."""
    try:
        return Config(**{name: getattr(config, name) for name in names}).resolved() == config
    except LRQuantError:
        return False


def _flag(name: str, value: object) -> list[str]:
    """The words that give a setting its value, as the command line reads them."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if not isinstance(value, tuple):
        return _worded(flag, str(value))
    if name in _ONE_A_FLAG:
        return [word for each in value for word in _worded(flag, each)]
    return _worded(flag, ",".join(each.replace(",", r"\,") for each in value))


def _worded(flag: str, text: str) -> list[str]:
    """A flag and its text, in one word where the text would look like a flag."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
