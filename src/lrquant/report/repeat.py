"""The command that repeats a run, from its settings."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

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
    flags = {
        entry.name: getattr(plain, entry.name)
        for entry in dataclasses.fields(Config)
        if getattr(plain, entry.name) != getattr(defaults, entry.name)
        and entry.name not in _NOT_OF_THE_RUN
    }
    flags = {"model": plain.model, "scheme": plain.scheme, **flags}
    single = [(name,) for name in flags if name not in _ALWAYS and name != "lr_plus"]
    for names in (("lwc", "let"), *single, ("lr_plus",)):
        fewer = {name: value for name, value in flags.items() if name not in names}
        if _resolves_to(fewer, plain):
            flags = fewer
    parts = ["lrquant", "quantize"]
    for name, value in flags.items():
        parts += _flag(name, value)
    return shlex.join(parts)


def _resolves_to(settings: dict[str, Any], config: Config) -> bool:
    try:
        return Config(**settings).resolved() == config
    except LRQuantError:
        return False


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, tuple):
        return [flag, ",".join(value)]
    return [flag, str(value)]
