"""Every setting of a run, and the values that presets give, as they are declared."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator

from lrquant.config.config import Config
from lrquant.config.core import PRESETS
from site_parts.tables import code, table

MANY = 1000  # a limit beyond which it is none that anybody meets


def markdown() -> str:
    """A row a setting: its type, default, choices or limits, meaning."""
    hints = typing.get_type_hints(Config)
    rows = [
        (
            code(entry.name),
            code(_type(hints[entry.name])),
            code(_value(entry.default)),
            _help(entry),
        )
        for entry in dataclasses.fields(Config)
    ]
    return table(("setting", "type", "default", "meaning"), rows)


def presets_markdown() -> str:
    """A row a setting that any preset gives a value."""
    names = [name for name in PRESETS if any(dict(_presets(name)))]
    rows = [
        (code(name), *(code(_value(dict(_presets(preset)).get(name, ""))) for preset in names))
        for name in dict.fromkeys(name for preset in names for name, _ in _presets(preset))
    ]
    return table(("setting", *(code(name) for name in names)), rows)


def _presets(name: str) -> Iterator[tuple[str, object]]:
    for entry in dataclasses.fields(Config):
        value = entry.metadata["presets"].get(name)
        if value is not None:
            yield entry.name, value


def _help(entry: dataclasses.Field[object]) -> str:
    """Its meaning, and its choices or limits where the meaning does not name them."""
    text, choices = str(entry.metadata["help"]), entry.metadata["choices"]
    limits = entry.metadata["limits"]
    if choices and not all(choice in text for choice in choices):
        text += f" ({', '.join(choices)})"
    if limits is not None:
        few = limits[1] <= MANY
        text += f" ({limits[0]:g} to {limits[1]:g})" if few else f" (at least {limits[0]:g})"
    return text


def _type(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
