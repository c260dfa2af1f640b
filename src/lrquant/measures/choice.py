"""Every measure, and those that settings ask for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from lrquant.config.declarations import declarations
from lrquant.errors import LRQuantError
from lrquant.measures.measure import Measure, ModuleMeasure, TextMeasure

if TYPE_CHECKING:
    from lrquant.config.groups import MeasureSettings

AnyMeasure: TypeAlias = "Measure[object, object, object]"
AnyText: TypeAlias = "TextMeasure[object, object]"
AnyModule: TypeAlias = "ModuleMeasure[object, object, object]"


@cache
def measures() -> tuple[AnyMeasure, ...]:
    """Every measure in its order: those in this folder, and those that other packages declare."""
    kind: type[AnyMeasure] = Measure  # type: ignore[type-abstract]
    declared = declarations("measures", "lrquant.measures", "MEASURE", kind)
    ordered = sorted(declared, key=lambda measure: measure.order)
    names = [measure.name for measure in ordered]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise LRQuantError(f"measure {twice[0]!r} is declared twice; uninstall one of them")
    return tuple(ordered)


def text_measures() -> list[AnyText]:
    """Those of next-token distributions along texts."""
    return [measure for measure in measures() if isinstance(measure, TextMeasure)]


def module_measures() -> list[AnyModule]:
    """Those of whole modules."""
    return [measure for measure in measures() if isinstance(measure, ModuleMeasure)]


def texts_against_full_precision(measuring: MeasureSettings) -> set[str]:
    """Texts of which a measure is held against full precision."""
    comparing = [measure for measure in text_measures() if measure.against_full_precision]
    return {name for each in comparing for name in each.texts(measuring[each.settings])}


def measures_anything(measuring: MeasureSettings) -> bool:
    """Whether the settings ask for any measure."""
    return any(measure.asked(measuring[measure.settings]) for measure in measures())


def check_measures(measuring: MeasureSettings, compared: bool) -> None:
    """Refuse settings of measures that contradict each other, or what is `compared` or not."""
    for measure in measures():
        measure.check(measuring[measure.settings], compared)


def read_by_measures(measuring: MeasureSettings) -> list[str]:
    """The texts, files and folders that the settings of measures name."""
    return [name for each in measures() for name in each.reads(measuring[each.settings])]
