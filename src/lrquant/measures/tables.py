"""Plain-text tables of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from lrquant.measures.numbers import NOT_FINITE, divergence, number, share, spread
from lrquant.measures.shares import of_how_many
from lrquant.runs.results import MEASURES, entries

COLUMNS = {
    "full_precision": "full precision",
    "round_to_nearest": "round-to-nearest",
    "quantized": "LRQuant",
    "test_time_adapted": "adapted to this text (TTA)",
    "base": "base",
}
AGREEMENT = {"kl_mean": "mean KL", "kl_p99": "KL p99", "same_top": "same top token"}
AGREEMENT |= {"perplexity_ratio": "perplexity ratio"}
_IN_DIGITS: dict[str, Callable[[Any], str]] = {"kl_mean": divergence, "kl_p99": divergence}
_MEANS = ("acc", "acc_norm")
SPREAD_NOTE = (
    "± standard error over the items that were measured; ± ? where they tell of none: a single "
    "one, all alike, or a metric without."
)


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
    labels = labels_of(results)
    tables = [_perplexities(results, labels), _agreements(results, labels)]
    head, rows = picture_rows(results, labels)
    tables += [table([f"pictures, {results['scheme']}", *head], rows) if rows else ""]
    tables += [task_table(results, labels), verdict(results)]
    return "\n\n".join(filter(None, tables))


def labels_of(results: dict[str, Any]) -> dict[str, str]:
    """What the columns are called: the learned one by its method, a base by its name.

    Full precision is what it was unpacked from, where the model's weights had been quantised.
    """
    labels = {**COLUMNS, "quantized": results.get("method_name", COLUMNS["quantized"])}
    if results.get("unpacked_from"):
        labels["full_precision"] += f" (unpacked from {results['unpacked_from']})"
    bases = _bases(results)
    if len(bases) == 1:
        labels["base"] += f" ({PurePath(bases.pop()).name})"
    return labels


def _bases(results: dict[str, Any]) -> set[str]:
    measured = [entry for kind in MEASURES for _, entry in entries(results, kind)]
    return {entry["base_model"] for entry in measured if "base_model" in entry}


def named(results: dict[str, Any], kind: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, what else a row must say, entry) of every measure of a kind.

    That is of how many items it is where those are not all, in what it differs from the last
    command's conditions, and of several of one name the size of each.
    """
    measured = list(entries(results, kind))
    names = [name for name, _ in measured]
    several = len(_bases(results)) > 1
    rows = []
    for name, entry in measured:
        items = entry.get("items")
        said = [of_how_many(items)]
        if items and names.count(name) > 1:
            said = [f"{said[0] or items['measured']} {items['unit']}"]
        if entry.get("num_fewshot"):
            said.append(f"{entry['num_fewshot']} examples in the prompt")
        said += [_condition(*each) for each in entry.get("measured_with", {}).items()]
        if several and "base_model" in entry:
            said.append(f"base {PurePath(entry['base_model']).name}")
        rows.append((name, "".join(f", {words}" for words in said if words), entry))
    return rows


def _condition(name: str, value: Any) -> str:
    """What a measure was made with, in words."""
    if name == "threads":
        return f"{value} thread{'' if value == 1 else 's'}"
    words = {"precision": "in", "device": "on", "cpu": "with", "model": "of"}
    return str(value) if name in ("scheme", "method") else f"{words.get(name, name)} {value}"


def _perplexities(results: dict[str, Any], labels: dict[str, str]) -> str:
    measured = named(results, "perplexity")
    shown = [key for key in labels if any(key in scores for *_, scores in measured)]
    rows = [
        [name + about, *(number(scores.get(key)) for key in shown)]
        for name, about, scores in measured
    ]
    if not rows:
        return ""
    return table([f"perplexity, {results['scheme']}", *(labels[key] for key in shown)], rows)


def agreement_rows(results: dict[str, Any], labels: dict[str, str]) -> list[list[str]]:
    """One row a text and model; the first cell says which, and with what it should agree if not
    all are held against the same."""
    held_against = _held_against(results)
    rows = []
    for name, about, variants in named(results, "agreement"):
        against = variants.get("reference", "full_precision")
        other = f", with {labels[against]}" if len(held_against) > 1 else ""
        for key in labels:
            if key in variants:
                cells = (_agreement_cell(part, variants[key].get(part)) for part in AGREEMENT)
                rows.append([f"{name}{about}, {labels[key]}{other}", *cells])
    return rows


def _agreement_cell(part: str, value: float | str | None) -> str:
    if part == "perplexity_ratio" and isinstance(value, float) and value >= 10:
        return number(value)
    return _IN_DIGITS.get(part, share)(value)


def _held_against(results: dict[str, Any]) -> list[str]:
    told = {e.get("reference", "full_precision") for _, e in entries(results, "agreement")}
    return [key for key in COLUMNS if key in told]


def _agreements(results: dict[str, Any], labels: dict[str, str]) -> str:
    rows = agreement_rows(results, labels | {"full_precision": "model"})  # or held against another
    against = " or ".join(labels[key] for key in _held_against(results))
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
    sets = [(kind, *measured) for kind in PICTURE_METRICS for measured in named(results, kind)]
    shown = {key: label for key, label in labels.items() if any(key in e for *_, e in sets)}
    rows = []
    for kind, name, about, entry in sets:
        for metric, words in PICTURE_METRICS[kind].items():
            cells = [_right(entry.get(key, {}), metric) for key in shown]
            if any(cells):
                what = f"{name or 'classes'}, {words}{about}"
                rows.append([what, *(cell or "-" for cell in cells)])
    return list(shown.values()), rows


def _right(scores: dict[str, Any], metric: str) -> str:
    if metric not in scores:
        return ""
    if metric == "same_top":  # no error is told of it
        return share(scores[metric])
    return spread(scores[metric], scores.get(f"{metric}_stderr"))


def task_table(results: dict[str, Any], labels: dict[str, str] = COLUMNS) -> str:
    """Accuracies of the tasks that were asked for and their means, each with its standard error.

    Columns of differences follow where there was something to compare with.
    """
    head, rows = task_rows(results, labels)
    return table([f"tasks, {results['scheme']}", *head], rows) if rows else ""


def task_rows(results: dict[str, Any], labels: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """The columns of measures, and rows of which the first cell is the task and its metric."""
    rows = [
        (f"{name} {metric.removesuffix(',none')}{about}", _cells(entry, metric))
        for name, about, entry in named(results, "tasks")
        if "part_of" not in entry
        for metric in _metrics(entry)
    ]
    rows += [
        (f"{name}, {_mean_words(kind, means[kind])}{about}", _mean_cells(means[kind]))
        for name, about, means in named(results, "task_means")
        for kind in _MEANS
        if kind in means
    ]
    measured = {key for _, cells in rows for key, value in cells.items() if value is not None}
    shown = {key: label for key, label in labels.items() if key in measured}
    shown |= {f"- {key}": f"from {COLUMNS[key]}" for key in labels if f"- {key}" in measured}
    lines = [[name, *(_spread(cells.get(key), key) for key in shown)] for name, cells in rows]
    return list(shown.values()), lines


def _mean_words(kind: str, mean: dict[str, Any]) -> str:
    """acc_norm, and that it is acc of some of the tasks."""
    mixed = any(not metric.startswith(f"{kind},") for metric in mean.get("metrics", ()))
    return f"{kind} (acc where a task has none)" if mixed else kind


def _mean_cells(mean: dict[str, Any]) -> dict[str, Any]:
    return {key: mean.get(key) for key in COLUMNS} | _changes(mean)


def verdict(results: dict[str, Any]) -> str:
    """Whether the loss of accuracy is within what `--max-drop` allows; empty if not asked."""
    told = results.get("max_drop")
    if not told:
        return ""
    word = "within" if told["acceptable"] else "MORE than"
    of = f" of {', '.join(told['tasks'])}" if "tasks" in told else ""
    return (
        f"mean accuracy{of} lost against {COLUMNS[told['against']]}: "
        f"{spread(told['drop'], told['stderr'])}, {word} the {told['allowed']:g} allowed"
    )


def _metrics(entry: dict[str, Any]) -> list[str]:
    """Metrics ("acc,none") of a task's entry, errors apart."""
    scores = next(entry[key] for key in COLUMNS if key in entry)
    return [
        key
        for key, value in scores.items()
        if "," in key and "_stderr," not in key
        if isinstance(value, float | int) or value in NOT_FINITE
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
    if key.startswith("- "):
        return spread(cell["difference"], cell["stderr"], signed=True)
    return spread(cell["mean"], cell["stderr"])
