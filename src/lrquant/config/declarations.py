"""Declarations: found by looking into a folder of this package, and in others' by entry points."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TypeVar

from lrquant.errors import LRQuantError

T = TypeVar("T")


@dataclass(frozen=True)
class NoSettings:
    """The settings of a declaration that brings none."""


class Declaration:
    """What brings settings: a frozen dataclass of them, whose fields are made with `setting`.

    It is imported whenever settings are, so neither its file nor what that imports needs torch.
    """

    settings: type = NoSettings


def declarations(group: str, folder: str, attribute: str, kind: type[T]) -> list[T]:
    """Every `attribute` of that kind: of the modules in `folder`, then of other packages.

    `folder` is the name of a package here ("lrquant.formats").  Another package declares its own
    under the entry point group `lrquant.<group>`, as `name = "module:OBJECT"`.  Raises LRQuantError
    for an entry point that cannot be loaded, or that is something else.
    """
    path = importlib.import_module(folder).__path__
    modules = [
        importlib.import_module(f"{folder}.{each.name}") for each in pkgutil.iter_modules(path)
    ]
    own = [getattr(module, attribute) for module in modules if hasattr(module, attribute)]
    return [*own, *declarations_of_others(group, kind)]


def declarations_of_others(group: str, kind: type[T]) -> list[T]:
    """Those of other packages alone: under the entry point group `lrquant.<group>`."""
    group = f"lrquant.{group}"
    declared: list[T] = []
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            value = entry.load()
        except (ImportError, AttributeError) as error:
            raise LRQuantError(
                f"entry point {entry.name!r} of {group}: {entry.value} cannot be loaded ({error}); "
                "mend or uninstall the package that declares it"
            ) from error
        if not isinstance(value, kind):
            raise LRQuantError(
                f"entry point {entry.name!r} of {group}: {entry.value} is a "
                f"{type(value).__name__}, not a {kind.__name__}"
            )
        declared.append(value)
    return declared
