"""Docstrings that list the settings: in groups, each with its default and its help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from inspect import cleandoc
from textwrap import fill
from typing import ParamSpec, TypeVar

from lrquant.config.config import Config
from lrquant.config.titles import grouped

TITLE = "Settings, as keyword arguments"  # the line that the list begins with
_WIDTH = 96
_ARGUMENTS = ("model", "scheme")  # which have a place of their own

P = ParamSpec("P")
R = TypeVar("R")


def with_settings(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with every setting at the end of its docstring."""
    text = "\n".join(_lines())
    function.__doc__ = f"{cleandoc(function.__doc__ or '')}\n\n{TITLE}\n{text}"
    return function


def _lines() -> Iterator[str]:
    entries = {e.name: e for e in dataclasses.fields(Config) if e.name not in _ARGUMENTS}
    for title, names in grouped(list(entries)).items():
        yield f"\n{title}:"
        for name in names:
            line = f"{name}={entries[name].default!r}: {entries[name].metadata['help']}"
            yield fill(line, _WIDTH, initial_indent="  ", subsequent_indent="      ")
