"""Settings by name, before they are a Config: out of YAML or a command line, one for another."""

from __future__ import annotations

import os
import re
import types
import typing
import unicodedata
from collections.abc import Hashable, Mapping
from dataclasses import field
from datetime import date
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

from lrquant.config.choices import SettingDict, SettingValue, SettingValues
from lrquant.config.scheme import Scheme
from lrquant.errors import LRQuantError

SPELLED_OUT = {
    **{"wbits": "weight_bits", "abits": "activation_bits", "group_size": "group_size"},
    **{"symmetric": "symmetric", "qkv_bits": "qkv_bits", "weight_grid": "weight_grid"},
    "activation_group_size": "activation_group_size",
    **{"hadamard": "hadamard", "qk_hadamard": "qk_hadamard"},
}


def setting(
    default: Any,
    text: str,
    choices: tuple[str, ...] = (),
    *,
    limits: tuple[float, float] | None = None,
    paper: Any = None,
    fast: Any = None,
    balanced: Any = None,
    best: Any = None,
    part_of: str = "",
) -> Any:
    """A dataclass field that a user may set; `text` is its help.

    `choices` are the values, or the members of a list, that it may have, `limits` the smallest and
    the largest number; `paper`, `fast`, `balanced` and `best` are its values under the presets of
    these names, where they have one, and `part_of` is the setting that stands for it and others.
    """
    presets = {"paper": paper, "fast": fast, "balanced": balanced, "best": best}
    told = {"help": text, "choices": choices, "limits": limits, "presets": presets}
    return field(default=default, metadata={**told, "part_of": part_of})


def spelled_out(scheme: Scheme) -> SettingDict:
    """The settings that say what a scheme's name says."""
    return {name: getattr(scheme, attribute) for name, attribute in SPELLED_OUT.items()}


def require_one_scheme(settings: SettingValues) -> None:
    """Refuse bits, group size or symmetry that contradict the scheme given beside them."""
    if not settings.get("scheme"):
        return
    scheme = Scheme.parse(str(settings["scheme"]))
    for name, attribute in SPELLED_OUT.items():
        named, value = getattr(scheme, attribute), settings.get(name)
        if named not in (None, False) and value not in (None, named):
            raise LRQuantError(
                f"scheme {scheme.name} and {name} {value} disagree; give one of them"
            )


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, which can make a few lines endless, and without a key given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias (*name): write it out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.MarkedYAMLError(problem=f"{twice} twice", problem_mark=node.start_mark)
        return values


def read_yaml(path: Path) -> dict[str, object]:
    """A YAML file that holds a mapping."""
    if path.exists() and not path.is_file():
        raise LRQuantError(f"config {path}: not a file; give a YAML file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise LRQuantError(f"config {path}: cannot be read ({_reason(error)})") from error
    if not isinstance(values, dict):
        raise LRQuantError(f"config {path}: expected `setting: value` lines")
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).splitlines()[0]


def refuse_empty(
    values: Mapping[str, object], defaults: Mapping[str, object], origin: str = ""
) -> None:
    """Refuse an empty text, which would mean a default or the present folder, by its name."""
    for name, value in values.items():
        if isinstance(value, str) and not value.strip() and defaults.get(name) != "":
            where = f"{origin}: {name}" if origin else name
            raise LRQuantError(f"{where} {value!r}: empty; give a value, or leave it out")


def convert(kind: object, value: object, where: str) -> SettingValue:
    """`value` as the annotated type `kind`, from YAML or a command line's text."""
    if kind == bool | str:
        kind = bool if isinstance(value, bool) else str
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = [each for each in typing.get_args(kind) if each is not type(None)]
    if typing.get_origin(kind) is tuple:
        return _list(value, where)
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise LRQuantError(f"{where}: expected true or false, got {shown(value)}")
    if kind is str:
        return _text(value, where)
    assert kind in _KINDS, kind
    return _number(int if kind is int else float, value, where)


def _number(kind: type[int] | type[float], value: object, where: str) -> float:
    wrong = LRQuantError(f"{where}: expected {_KINDS[kind]}, got {shown(value)}")
    if not isinstance(value, str | Real) or isinstance(value, bool):
        raise wrong
    try:
        if isinstance(value, Real):  # numpy's too
            value = int(value) if isinstance(value, Integral) else float(value)
        converted = kind(value)
    except (ValueError, OverflowError) as error:
        raise wrong from error
    if kind is int and isinstance(value, float) and converted != value:
        raise wrong
    return converted


def _list(value: object, where: str) -> tuple[str, ...]:
    r"""A list, or a text whose items are joined by commas; `\,` is a comma of an item's own."""
    items = value
    if isinstance(value, str):
        items = [item.replace(r"\,", ",") for item in re.split(r"(?<!\\),", value)]
    if isinstance(items, dict):
        items = [f"{key}={each}" for key, each in items.items()]
    if not isinstance(items, list | tuple):
        raise LRQuantError(f"{where}: expected a list, got {shown(value)}")
    named = tuple(item for item in (_text(item, where).strip() for item in items) if item)
    if items and not named:
        raise LRQuantError(f"{where} {shown(value)}: names nothing; leave it out for none")
    return named


def _text(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | os.PathLike | Real | date):
        raise LRQuantError(f"{where}: expected text, got {shown(value)}")
    text = str(value)
    odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None)
    if odd is not None:
        raise LRQuantError(
            f"{where}: {shown(text)} holds {odd!r}, which is no character of a text in UTF-8; "
            "rename what it names"
        )
    return text


def shown(value: object) -> str:
    """A value for an error's line."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a whole number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


_SHOWN = 100
_KINDS = {int: "a whole number", float: "a number"}
