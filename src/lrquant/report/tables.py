"""Plain-text tables of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = {
    "full_precision": "full precision",
    "round_to_nearest": "round-to-nearest",
    "quantized": "LRQuant",
    "test_time_adapted": "adapted to this text (TTA)",
}
AGREEMENT = {"kl_mean": "mean KL", "kl_p99": "KL p99", "same_top": "same top token"}


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
    """Perplexities side by side, one row a set, and agreements; empty if nothing was measured."""
    labels = {**COLUMNS, "quantized": results.get("method_name", COLUMNS["quantized"])}
    tables = [_perplexities(results, labels), _agreements(results, labels)]
    return "\n\n".join(filter(None, tables))


def _perplexities(results: dict[str, Any], labels: dict[str, str]) -> str:
    perplexities = results.get("perplexity") or {}
    shown = [key for key in labels if any(key in scores for scores in perplexities.values())]
    rows = [
        [name, *(_number(scores.get(key)) for key in shown)]
        for name, scores in perplexities.items()
    ]
    if not rows:
        return ""
    return table([f"perplexity, {results['scheme']}", *(labels[key] for key in shown)], rows)


def _agreements(results: dict[str, Any], labels: dict[str, str]) -> str:
    rows = [
        [f"{name}, {labels[variant]}", *(f"{scores[key]:.4f}" for key in AGREEMENT)]
        for name, variants in (results.get("agreement") or {}).items()
        for variant, scores in variants.items()
        if variant in labels
    ]
    return table(["agreement with full precision", *AGREEMENT.values()], rows) if rows else ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"
