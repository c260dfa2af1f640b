"""The command that repeats a run, from its settings."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from lrquant.config import Config
from lrquant.errors import LRQuantError

_NOT_OF_THE_RUN = ("resume", "overwrite", "preset")  # a preset's values are spelled out


def repeating_command(config: Config) -> str:
    """`lrquant quantize …` with no more flags than it takes to resolve to the same settings."""
    plain = dataclasses.replace(config, resume=None, overwrite=False, preset="default").resolved()
    defaults = Config()
    flags = {
        entry.name: getattr(plain, entry.name)
        for entry in dataclasses.fields(Config)
        if getattr(plain, entry.name) != getattr(defaults, entry.name)
        and entry.name not in _NOT_OF_THE_RUN
    }
    for name in sorted(flags, key=lambda name: name in ("model", "scheme", "lr_plus")):
        fewer = {other: value for other, value in flags.items() if other != name}
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
