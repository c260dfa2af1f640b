"""Plain-text tables of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

COLUMNS = {
    "full_precision": "full precision",
    "round_to_nearest": "round-to-nearest",
    "quantized": "LRQuant",
    "test_time_adapted": "adapted to this text (TTA)",
    "base": "base",
}
AGREEMENT = {"kl_mean": "mean KL", "kl_p99": "KL p99", "same_top": "same top token"}
AGREEMENT |= {"perplexity_ratio": "perplexity ratio"}


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
    """Perplexities, agreements and tasks side by side, one row a set; empty if there are none."""
    labels = {**COLUMNS, "quantized": results.get("method_name", COLUMNS["quantized"])}
    tables = [_perplexities(results, labels), _agreements(results, labels)]
    head, rows = picture_rows(results, labels)
    tables += [table([f"pictures, {results['scheme']}", *head], rows) if rows else ""]
    tables += [task_table(results, labels), verdict(results)]
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
    found = results.get("agreement") or {}
    labels = {**labels, "full_precision": "model"}  # measured against another one
    rows = [
        [f"{name}, {labels[variant]}", *(f"{scores.get(key, math.nan):.4f}" for key in AGREEMENT)]
        for name, variants in found.items()
        for variant, scores in variants.items()
        if variant in labels
    ]
    held_against = {variants.get("reference", "full_precision") for variants in found.values()}
    against = " or ".join(COLUMNS[key] for key in COLUMNS if key in held_against)
    return table([f"agreement with {against}", *AGREEMENT.values()], rows) if rows else ""


PICTURE_METRICS = {
    "vqa": {
        "exact_match": "exact match",
        "exact_match_yes_no": "exact match of yes or no",
        "exact_match_number": "exact match of numbers",
        "exact_match_other": "exact match of other answers",
        "vqa_accuracy": "VQA rule",
    },
    "classification": {"accuracy": "accuracy", "same_top": "same class as full precision"},
}


def picture_rows(
    results: dict[str, Any], labels: dict[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Columns of models, and rows of which the first cell is a set of pictures and a metric."""
    sets = [("vqa", name, entry) for name, entry in (results.get("vqa") or {}).items()]
    if results.get("classification"):
        sets.append(("classification", "classes", results["classification"]))
    shown = {key: label for key, label in labels.items() if any(key in e for *_, e in sets)}
    rows = []
    for kind, name, entry in sets:
        for metric, words in PICTURE_METRICS[kind].items():
            cells = [_share(entry.get(key, {}), metric) for key in shown]
            if any(cells):
                rows.append([f"{name}, {words}", *(cell or "-" for cell in cells)])
    return list(shown.values()), rows


def _share(scores: dict[str, Any], metric: str) -> str:
    if metric not in scores:
        return ""
    error = scores.get(f"{metric}_stderr")
    return f"{scores[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def task_table(results: dict[str, Any], labels: dict[str, str] = COLUMNS) -> str:
    """Accuracies of the tasks that were asked for and their means, each with its standard error.

    Columns of differences follow where there was something to compare with.
    """
    head, rows = task_rows(results, labels)
    return table([f"tasks, {results['scheme']}", *head], rows) if rows else ""


def task_rows(results: dict[str, Any], labels: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """The columns of measures, and rows of which the first cell is the task and its metric."""
    rows = [
        (f"{name} {metric.removesuffix(',none')}", _cells(entry, metric))
        for name, entry in (results.get("tasks") or {}).items()
        if "part_of" not in entry
        for metric in _metrics(entry)
    ]
    rows += [
        (f"{label}, {kind}", {key: mean.get(key) for key in COLUMNS} | _changes(mean))
        for label, means in (results.get("task_means") or {}).items()
        for kind, mean in means.items()
    ]
    measured = {key for _, cells in rows for key, value in cells.items() if value is not None}
    shown = {key: label for key, label in labels.items() if key in measured}
    shown |= {
        f"- {key}": f"from {label}" for key, label in labels.items() if f"- {key}" in measured
    }
    lines = [[name, *(_spread(cells.get(key), key) for key in shown)] for name, cells in rows]
    return list(shown.values()), lines


def verdict(results: dict[str, Any]) -> str:
    """Whether the loss of accuracy is within what `--max-drop` allows; empty if not asked."""
    found = results.get("max_drop")
    if not found:
        return ""
    spread = f" ± {found['stderr']:.4f}" if found["stderr"] is not None else ""
    word = "within" if found["acceptable"] else "MORE than"
    return (
        f"mean accuracy lost against {COLUMNS[found['against']]}: {found['drop']:.4f}{spread}, "
        f"{word} the {found['allowed']:g} allowed"
    )


def _metrics(entry: dict[str, Any]) -> list[str]:
    """Metrics ("acc,none") of a task's entry, errors apart."""
    scores = next(entry[key] for key in COLUMNS if key in entry)
    return [
        key
        for key, value in scores.items()
        if "," in key and "_stderr," not in key and isinstance(value, float | int)
    ]


def _cells(entry: dict[str, Any], metric: str) -> dict[str, Any]:
    """{"mean", "stderr"} of each variant, {"difference", "stderr"} from each other one."""
    name, _, kept = metric.partition(",")
    cells = {
        key: {"mean": entry[key][metric], "stderr": entry[key].get(f"{name}_stderr,{kept}")}
        for key in COLUMNS
        if metric in entry.get(key, {})
    }
    return cells | _changes(entry, metric)


def _changes(entry: dict[str, Any], metric: str | None = None) -> dict[str, Any]:
    found = (entry.get("differences") or {}).items()
    return {
        f"- {other}": changes if metric is None else changes.get(metric) for other, changes in found
    }


def _spread(cell: dict[str, Any] | None, key: str) -> str:
    if cell is None:
        return ""
    number = f"{cell['difference']:+.4f}" if key.startswith("- ") else f"{cell['mean']:.4f}"
    return f"{number} ± {cell['stderr']:.4f}" if isinstance(cell["stderr"], float) else number


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"
