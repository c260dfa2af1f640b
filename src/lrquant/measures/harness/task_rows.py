"""Rows of tasks and of their means, with their differences, and the verdict on the loss."""

from __future__ import annotations

from collections.abc import Mapping

from lrquant.measures.numbers import NOT_FINITE, spread
from lrquant.measures.rows import COLUMNS, named
from lrquant.runs.results import Entry, Json, Results, figure, record

_MEANS = ("acc", "acc_norm")


def task_rows(results: Results, labels: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """The columns of measures, and rows of which the first cell is the task and its metric."""
    rows = [
        (f"{name} {metric.removesuffix(',none')}{about}", _cells(entry, metric))
        for name, about, entry in named(results, "tasks")
        if "part_of" not in entry
        for metric in _metrics(entry)
    ]
    rows += [
        (f"{name}, {_mean_words(kind, record(means[kind]))}{about}", _mean_cells(means[kind]))
        for name, about, means in named(results, "task_means")
        for kind in _MEANS
        if kind in means
    ]
    measured = {key for _, cells in rows for key in cells}
    shown = {key: label for key, label in labels.items() if key in measured}
    shown |= {f"- {key}": f"from {COLUMNS[key]}" for key in labels if f"- {key}" in measured}
    lines = [[name, *(_spread(cells.get(key), key) for key in shown)] for name, cells in rows]
    return list(shown.values()), lines


def verdict(results: Results) -> str:
    """Whether the loss of accuracy is within what `--max-drop` allows; empty if not asked."""
    told = record(results.get("max_drop"))
    if not told:
        return ""
    word = "within" if told["acceptable"] else "MORE than"
    tasks = told.get("tasks")
    of = f" of {', '.join(map(str, tasks))}" if isinstance(tasks, list) else ""
    drop = figure(told["drop"])
    lost = "" if drop is None else spread(drop, figure(told["stderr"]))
    allowed = figure(told["allowed"])
    shown = f"{allowed:g}" if isinstance(allowed, float | int) else str(allowed)
    return (
        f"mean accuracy{of} lost against {COLUMNS[str(told['against'])]}: {lost}, {word} the "
        f"{shown} allowed"
    )


def is_score(metric: str, value: Json) -> bool:
    """Whether it is a metric's own number ("acc,none"), not its error and not a word."""
    number = isinstance(value, float | int) and not isinstance(value, bool)
    return number and "," in metric and "_stderr," not in metric


def stderr_name(metric: str) -> str:
    """acc,none -> acc_stderr,none."""
    name, _, kept = metric.partition(",")
    return f"{name}_stderr,{kept}"


def score_words(metrics: Entry) -> str:
    """Every score of a task with its standard error, for the log."""
    texts = []
    for metric, value in metrics.items():
        if is_score(metric, value):
            error = metrics.get(stderr_name(metric))
            beside = f" ± {error:.4f}" if isinstance(error, float) and error > 0 else ""
            texts.append(f"{metric.removesuffix(',none')} {value:.4f}{beside}")
    return ", ".join(texts)


def _mean_words(kind: str, mean: Entry) -> str:
    """acc_norm, and that it is acc of some of the tasks."""
    metrics = mean.get("metrics")
    names = map(str, metrics) if isinstance(metrics, list) else ()
    mixed = any(not name.startswith(f"{kind},") for name in names)
    return f"{kind} (acc where a task has none)" if mixed else kind


def _mean_cells(mean: Json) -> dict[str, Entry]:
    values = record(mean)
    return {key: record(values[key]) for key in COLUMNS if key in values} | _changes(values)


def _metrics(entry: Entry) -> list[str]:
    """Metrics ("acc,none") of a task's entry, errors apart."""
    scores = record(next(entry[key] for key in COLUMNS if key in entry))
    return [
        key
        for key, value in scores.items()
        if "," in key and "_stderr," not in key
        if isinstance(value, float | int) or value in NOT_FINITE
    ]


def _cells(entry: Entry, metric: str) -> dict[str, Entry]:
    """{"mean", "stderr"} of each variant, {"difference", "stderr"} from each other one."""
    scores = {key: record(entry[key]) for key in COLUMNS if key in entry}
    cells: dict[str, Entry] = {
        key: {"mean": own[metric], "stderr": own.get(stderr_name(metric))}
        for key, own in scores.items()
        if metric in own
    }
    return cells | _changes(entry, metric)


def _changes(entry: Entry, metric: str | None = None) -> dict[str, Entry]:
    """Differences from each other model: of one metric, or of a mean."""
    differences = {
        f"- {other}": record(changes) if metric is None else record(record(changes).get(metric))
        for other, changes in record(entry.get("differences")).items()
    }
    return {key: change for key, change in differences.items() if change}


def _spread(cell: Entry | None, key: str) -> str:
    if cell is None:
        return ""
    signed = key.startswith("- ")
    value = figure(cell["difference" if signed else "mean"])
    return "" if value is None else spread(value, figure(cell["stderr"]), signed=signed)
