"""Sets of text that other packages declare, by the entry point group `lrquant.texts`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from lrquant.config.declarations import declarations_of_others
from lrquant.errors import LRQuantError


@dataclass(frozen=True)
class TextSource:
    """A set by its name; `documents` of a split are texts, lists of messages, or rows.

    A split is "train", "validation" or "test"; of one that the set lacks there are none.
    """

    name: str
    documents: Callable[[str], Iterable[object]]


@cache
def text_sources() -> dict[str, TextSource]:
    """Every declared set by name; LRQuantError for two of one name."""
    sources: dict[str, TextSource] = {}
    for source in declarations_of_others("texts", TextSource):
        if source.name in sources:
            raise LRQuantError(
                f"text {source.name!r}: declared by two packages; uninstall one of them"
            )
        sources[source.name] = source
    return sources
