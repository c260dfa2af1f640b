"""The command that repeats a run, from its settings."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from lrquant.config.config import Config
from lrquant.errors import LRQuantError

_NOT_OF_THE_RUN = ("resume", "overwrite", "log_dir", "preset")  # a preset is spelled out
_ALWAYS = ("model", "scheme")


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
        config, resume=None, overwrite=False, log_dir=None, preset="default", **places
    ).resolved()
    defaults = Config()
    changed = [
        entry.name
        for entry in dataclasses.fields(Config)
        if getattr(plain, entry.name) != getattr(defaults, entry.name)
        and entry.name not in _NOT_OF_THE_RUN
    ]
    names = list(dict.fromkeys([*_ALWAYS, *changed]))
    single = [(name,) for name in names if name not in _ALWAYS and name != "lr_plus"]
    for left_out in (("lwc", "let"), *single, ("lr_plus",)):
        fewer = [name for name in names if name not in left_out]
        if _say_all(fewer, plain):
            names = fewer
    words = ["lrquant", "quantize"]
    for name in names:
        words += _flag(name, getattr(plain, name))
    return shlex.join(words)


def _say_all(names: Sequence[str], config: Config) -> bool:
    """Whether the settings of these names resolve to all of them."""
    try:
        return Config(**{name: getattr(config, name) for name in names}).resolved() == config
    except LRQuantError:
        return False


def _flag(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, tuple):
        return [flag, ",".join(map(str, value))]
    return [flag, str(value)]
