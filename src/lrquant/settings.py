"""Settings by name, before they are a Config: out of YAML or a command line, one for another."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import yaml

from lrquant.errors import LRQuantError
from lrquant.presets import PRESETS
from lrquant.scheme import Scheme

_PARTS = ("rotation", "two_branch", "dynamic_weights")
_SPELLED_OUT = {
    **{"wbits": "weight_bits", "abits": "activation_bits", "group_size": "group_size"},
    **{"symmetric": "symmetric", "qkv_bits": "qkv_bits"},
}


def spelled_out(scheme: Scheme) -> dict[str, Any]:
    """The settings that say what a scheme's name says."""
    return {name: getattr(scheme, attribute) for name, attribute in _SPELLED_OUT.items()}


def require_one_scheme(settings: dict[str, Any]) -> None:
    """Refuse bits, group size or symmetry that contradict the scheme given beside them."""
    if not settings.get("scheme"):
        return
    scheme = Scheme.parse(settings["scheme"])
    for name, attribute in _SPELLED_OUT.items():
        named, given = getattr(scheme, attribute), settings.get(name)
        if named not in (None, False) and given not in (None, named):
            raise LRQuantError(
                f"scheme {scheme.name} and {name} {given} disagree; give one of them"
            )


def overridden(settings: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """`settings` with those of `by` in their place; a scheme and its bits replace each other.

    A preset in `by` replaces every value that it names, `lr_plus` its three parts.
    """
    replaced = set(PRESETS["paper"]) if "preset" in by else set()
    replaced |= set(_PARTS) if "lr_plus" in by else set()
    settings = {name: value for name, value in settings.items() if name not in replaced}
    if by.get("scheme"):
        settings = {name: value for name, value in settings.items() if name not in _SPELLED_OUT}
    elif settings.get("scheme") and by.keys() & _SPELLED_OUT.keys():
        scheme = Scheme.parse(settings["scheme"])
        bits = spelled_out(scheme)
        bits = {name: value for name, value in bits.items() if value not in (None, False)}
        settings = {**settings, **bits, "scheme": None}
    return {**settings, **by}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first_line = str(error).splitlines()[0]
        raise LRQuantError(f"config {path}: cannot be read ({first_line})") from error
    if not isinstance(values, dict):
        raise LRQuantError(f"config {path}: expected `setting: value` lines")
    return values


def convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, from YAML or a command line's text."""
    if kind == bool | str:
        kind = bool if isinstance(value, bool) else str
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = [part for part in typing.get_args(kind) if part is not type(None)]
    if typing.get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise LRQuantError(f"{where}: expected a list, got {value!r}")
        return tuple(str(part).strip() for part in parts if str(part).strip())
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise LRQuantError(f"{where}: expected true or false, got {value!r}")
    wrong = LRQuantError(f"{where}: expected {_KINDS[kind]}, got {value!r}")
    if value is None or isinstance(value, bool | list | dict):
        raise wrong
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    if kind is int and isinstance(value, float) and converted != value:
        raise wrong
    return converted


_KINDS = {int: "a whole number", float: "a number", str: "text"}
