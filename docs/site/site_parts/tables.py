"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its cells' bars and line breaks made harmless."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(text: str) -> str:
    """A text that stays in its cell: no bar, no line break, no HTML."""
    words = " ".join(text.split())
    return words.replace("|", "\\|").replace("<", "&lt;").replace("&lt;br>", "<br>")


def code(text: str) -> str:
    """A text as code, or nothing."""
    return f"`{text}`" if text else ""
