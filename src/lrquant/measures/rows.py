"""Rows and tables of measures as text: what their columns and first cells are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from lrquant.measures.shares import of_how_many
from lrquant.runs.results import Entry, Json, Results, entries, kinds, record

COLUMNS = {
    "full_precision": "full precision",
    "round_to_nearest": "round-to-nearest",
    "quantized": "LRQuant",
    "test_time_adapted": "adapted to this text (TTA)",
    "base": "base",
}
SPREAD_NOTE = (
    "± standard error over the items that were measured; ± ? where they tell of none: a single "
    "one, all alike, or a metric without."
)
ADAPTED_NOTE = (
    "Test-time adaptation learned the last blocks again on the text that it is scored on (never "
    "on labels): not comparable with the other columns."
)


@dataclass(frozen=True)
class Table:
    """Cells as text under a head; `note` says what the numbers are."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """A number that people look for first, at the top of a report."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class RunResults:
    """A run's results for a report: how its columns are called, and of which model they are.

    `name` is the run's, empty where it is the only one.
    """

    results: Results
    labels: Mapping[str, str]
    name: str = ""
    model: str = ""
    weights: str = ""


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


def labels_of(results: Results) -> dict[str, str]:
    """What the columns are called: the learned one by its method, a base by its name.

    Full precision is what it was unpacked from, where the model's weights had been quantised.
    """
    labels = {**COLUMNS, "quantized": str(results.get("method_name", COLUMNS["quantized"]))}
    if results.get("unpacked_from"):
        labels["full_precision"] += f" (unpacked from {results['unpacked_from']})"
    bases = _bases(results)
    if len(bases) == 1:
        labels["base"] += f" ({PurePath(bases.pop()).name})"
    return labels


def _bases(results: Results) -> set[str]:
    measured = [entry for kind in kinds(results) for _, entry in entries(results, kind)]
    return {str(entry["base_model"]) for entry in measured if "base_model" in entry}


def named(results: Results, kind: str) -> list[tuple[str, str, Entry]]:
    """(name, what else a row must say, entry) of every measure of a kind.

    That is of how many items it is where those are not all, in what it differs from the last
    command's conditions, and of several of one name the size of each.
    """
    measured = list(entries(results, kind))
    names = [name for name, _ in measured]
    several = len(_bases(results)) > 1
    rows = []
    for name, entry in measured:
        items = record(entry.get("items"))
        said = [of_how_many(items)]
        if items and names.count(name) > 1:
            said = [f"{said[0] or items['measured']} {items['unit']}"]
        if entry.get("num_fewshot"):
            said.append(f"{entry['num_fewshot']} examples in the prompt")
        said += [_condition(*each) for each in record(entry.get("measured_with")).items()]
        if several and "base_model" in entry:
            said.append(f"base {PurePath(str(entry['base_model'])).name}")
        rows.append((name, "".join(f", {words}" for words in said if words), entry))
    return rows


def _condition(name: str, value: Json) -> str:
    """What a measure was made with, in words."""
    if name == "threads":
        return f"{value} thread{'' if value == 1 else 's'}"
    words = {"precision": "in", "device": "on", "cpu": "with", "gpu": "with", "model": "of"}
    return str(value) if name in ("scheme", "method") else f"{words.get(name, name)} {value}"


def columns_in(labels: Mapping[str, str], scores: Sequence[Entry]) -> dict[str, str]:
    """The columns that at least one of the entries has a value in."""
    measured = {key for each in scores for key, value in each.items() if value is not None}
    return {key: label for key, label in labels.items() if key in measured}


def beside(labels: Mapping[str, str], values: Mapping[str, str]) -> str:
    """Full precision and round-to-nearest, as far as they were measured, for a tile's note."""
    compared = ("full_precision", "round_to_nearest")
    return ", ".join(f"{labels[key]} {values[key]}" for key in compared if values.get(key))
