"""Plain-text tables of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = {
    "full_precision": "full precision",
    "round_to_nearest": "round-to-nearest",
    "quantized": "LRQuant",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up: first column left, the others right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        aligned = [first.ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def results_table(results: dict[str, Any]) -> str:
    """Perplexities side by side, one row a set; empty if nothing was measured."""
    perplexities = results.get("perplexity") or {}
    shown = [key for key in COLUMNS if any(key in scores for scores in perplexities.values())]
    rows = [
        [name, *(_number(scores.get(key)) for key in shown)]
        for name, scores in perplexities.items()
    ]
    if not rows:
        return ""
    return table([f"perplexity, {results['scheme']}", *(COLUMNS[key] for key in shown)], rows)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"
