"""Tables that are wider than the terminal: each row as lines of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby


def fitted(text: str, columns: int) -> str:
    """The text, with Markdown tables that are wider than `columns` row by row."""
    lines: list[str] = []
    for is_table, part in groupby(text.splitlines(), lambda line: line.startswith("| ")):
        own = list(part)
        wide = is_table and max(map(len, own)) > columns
        lines += _by_rows(own) if wide else own
    return "\n".join(lines)


def _by_rows(lines: Sequence[str]) -> Iterator[str]:
    """The head's first cell, then of each row its first cell and a line for each other one."""
    (title, *heads), _, *rows = (
        [cell.strip() for cell in line[1:-1].split(" | ")] for line in lines
    )
    width = max(map(len, heads), default=0)
    yield title
    for name, *cells in rows:
        yield name
        pairs = zip(heads, cells, strict=True)
        yield from (f"  {head:{width}}  {cell}" for head, cell in pairs if cell)
