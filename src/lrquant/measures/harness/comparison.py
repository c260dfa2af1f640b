"""Zero-shot scores side by side: differences with standard errors, means, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lrquant.measures.harness.scores import TaskScores
from lrquant.measures.harness.task_list import Tasks
from lrquant.measures.harness.task_rows import is_score, stderr_name
from lrquant.runs.results import Entry, Json, Results

PUBLISHED_TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
ACCURACIES = {"acc": ("acc",), "acc_norm": ("acc_norm", "acc")}  # the first that a task has


@dataclass(frozen=True)
class Difference:
    """One model's metric less another's, with its standard error where that is known.

    `items` is over how many it was paired item by item, None where it was not.
    """

    difference: float
    stderr: float | None
    items: int | None = None

    def as_json(self) -> dict[str, Json]:
        """As results.json has it."""
        paired = self.items is not None
        told: dict[str, Json] = {"difference": self.difference, "stderr": self.stderr}
        told["paired"] = paired
        return told | ({"items": self.items} if paired else {})


Differences = dict[str, dict[str, Difference]]  # by the other model, by metric


@dataclass(frozen=True)
class Mean:
    """The unweighted mean of one accuracy over tasks, of each variant, and its differences."""

    tasks: Sequence[str]
    metrics: Sequence[str]
    means: Mapping[str, tuple[float, float | None]]
    differences: Mapping[str, Difference]

    def as_json(self) -> dict[str, Json]:
        """As results.json has it."""
        told: dict[str, Json] = {"tasks": list(self.tasks), "metrics": list(self.metrics)}
        told |= {
            variant: {"mean": mean, "stderr": error}
            for variant, (mean, error) in self.means.items()
        }
        changes = {
            other: {"difference": change.difference, "stderr": change.stderr}
            for other, change in self.differences.items()
        }
        return told | ({"differences": changes} if changes else {})


def compared(
    tasks: Tasks, scores: Mapping[str, TaskScores], max_drop: float | None = None
) -> Results:
    """What results.json says of tasks: scores, and differences of the first variant from others.

    `tasks` has every task and group, `task_means` the mean over those that were asked for and over
    the six published ones if they are among them; `max_drop` says whether the mean accuracy (that
    normalised by length where a task has it) fell by more than that from full precision or base.
    """
    names = next(iter(scores.values())).results
    differences = {name: _differences(tasks, name, scores) for name in names}
    entries = {name: _entry(tasks, name, scores, differences[name]) for name in names}
    results: dict[str, Json] = {
        "tasks": entries,
        "task_means": {
            label: {
                kind: mean.as_json() for kind, mean in _means(several, scores, differences).items()
            }
            | of_what(tasks, several, next(iter(scores.values())))
            for label, several in _averaged(tasks).items()
        },
    }
    if max_drop is not None and len(scores) > 1:
        results["max_drop"] = _verdict(tasks, scores, differences, max_drop)
    return {key: value for key, value in results.items() if value}


def _entry(
    tasks: Tasks,
    name: str,
    scores: Mapping[str, TaskScores],
    differences: Differences,
) -> dict[str, Json]:
    """What results.json says of one task or group."""
    entry: dict[str, Json] = {"data": tasks.sets[name]} if name in tasks.sets else {}
    entry |= of_what(tasks, [name], next(iter(scores.values())))
    if name in tasks.parents:
        entry["part_of"] = tasks.parents[name]
    entry |= {variant: own.results[name] for variant, own in scores.items()}
    changes = {
        other: {metric: change.as_json() for metric, change in by_metric.items()}
        for other, by_metric in differences.items()
    }
    return entry | ({"differences": changes} if changes else {})


def _averaged(tasks: Tasks) -> dict[str, Sequence[str]]:
    """Over which tasks means are taken, by their labels."""
    averaged: dict[str, Sequence[str]] = {f"mean of {len(tasks.names)} tasks": tasks.names}
    if set(PUBLISHED_TASKS) == set(tasks.names):
        averaged.clear()
    if set(PUBLISHED_TASKS) <= set(tasks.names):
        averaged["mean of the six published tasks"] = PUBLISHED_TASKS
    return {label: names for label, names in averaged.items() if len(names) > 1}


def of_what(tasks: Tasks, names: Sequence[str], scores: TaskScores) -> dict[str, Json]:
    """Of how many items, with how many examples in the prompt, as far as the harness tells."""
    members = [member for name in names for member in tasks.members.get(name, (name,))]
    shots = sorted({scores.shots_of(member) for member in members})
    told: dict[str, Json] = {
        "items": scores.items_of(members),
        "num_fewshot": shots[0] if len(shots) == 1 else shots,
    }
    return {name: value for name, value in told.items() if value is not None}


def accuracy_of(metrics: Entry, kind: str) -> str | None:
    """The metric ("acc_norm,none") that is a task's accuracy of this kind, if it has one."""
    for metric in ACCURACIES[kind]:
        keys = [key for key in metrics if key.startswith(f"{metric},")]
        if keys:
            return keys[0]
    return None


def _differences(tasks: Tasks, name: str, scores: Mapping[str, TaskScores]) -> Differences:
    """Those of the first variant from each other one."""
    first, *others = scores
    return {other: _between(tasks, name, scores[first], scores[other]) for other in others}


def _between(tasks: Tasks, name: str, left: TaskScores, right: TaskScores) -> dict[str, Difference]:
    """Every metric's left - right: paired item by item where it is a mean over the same items."""
    differences: dict[str, Difference] = {}
    for metric, value in left.results[name].items():
        other = right.results[name].get(metric)
        if not is_score(metric, value) or not is_score(metric, other):
            continue
        change = _number(value) - _number(other)
        paired = _paired(tasks, name, metric, left, right)
        if paired is None:
            error = _joint([_error(side, name, metric) for side in (left, right)])
            differences[metric] = Difference(change, error)
        else:
            differences[metric] = Difference(change, *paired)
    return differences


def _number(value: Json) -> float:
    assert isinstance(value, int | float)
    return value


def _error(scores: TaskScores, name: str, metric: str) -> float | None:
    """The standard error that the harness tells of a metric, if it does."""
    error = scores.results[name].get(stderr_name(metric))
    return error if isinstance(error, float) else None


def _paired(
    tasks: Tasks, name: str, metric: str, left: TaskScores, right: TaskScores
) -> tuple[float | None, int] | None:
    """Standard error of the mean paired difference, ``s / sqrt(n)``, and of how many items.

    Of groups it is by their weights.  None where the metric is not the mean of what its items have.
    """
    errors, sizes = [], []
    for member in tasks.members.get(name, (name,)):
        mine, other = (_item_scores(scores, member, metric) for scores in (left, right))
        if mine is None or other is None or len(mine) != len(other):
            return None
        pairs = [a - b for a, b in zip(mine, other, strict=True)]
        errors.append(stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None)
        sizes.append(len(pairs))
    weighted = name in tasks.weighted
    shares = [size / sum(sizes) if weighted else 1 / len(sizes) for size in sizes]
    weighed = [None if e is None else share * e for share, e in zip(shares, errors, strict=True)]
    return _joint(weighed), sum(sizes)


def _item_scores(scores: TaskScores, task: str, metric: str) -> Sequence[float] | None:
    """A task's value of each item, None where the metric is not their mean."""
    told = scores.items.get(task, {}).get(metric, [])
    values = [value for value in told if isinstance(value, float | int)]
    reported = scores.results[task].get(metric)
    if not values or len(values) < len(told) or not isinstance(reported, float):
        return None
    return values if math.isclose(fmean(values), reported) else None


def _means(
    names: Sequence[str],
    scores: Mapping[str, TaskScores],
    differences: Mapping[str, Differences],
) -> dict[str, Mean]:
    """Unweighted means of the accuracies over tasks, each with its standard error."""
    first, *others = scores
    means: dict[str, Mean] = {}
    for kind in ACCURACIES:
        metrics = [accuracy_of(scores[first].results[name], kind) for name in names]
        chosen = [(n, m) for n, m in zip(names, metrics, strict=True) if m is not None]
        if len(chosen) < len(names):
            continue
        changes = {
            other: _mean_change(differences[name][other][metric] for name, metric in chosen)
            for other in others
        }
        averages = {variant: _mean_of(own, chosen) for variant, own in scores.items()}
        means[kind] = Mean(names, [metric for _, metric in chosen], averages, changes)
    return means


def _mean_of(scores: TaskScores, chosen: Sequence[tuple[str, str]]) -> tuple[float, float | None]:
    """The mean of one metric a task, and its standard error."""
    errors = [_error(scores, *each) for each in chosen]
    values = [_number(scores.results[name][metric]) for name, metric in chosen]
    return fmean(values), _joint(errors, len(chosen))


def _mean_change(changes: Iterable[Difference]) -> Difference:
    every = list(changes)
    error = _joint([each.stderr for each in every], len(every))
    return Difference(fmean(each.difference for each in every), error)


def _joint(errors: Sequence[float | None], count: int = 1) -> float | None:
    """``sqrt(sum of squared errors) / count`` of independent values; None if one is not known."""
    told = [error for error in errors if error is not None]
    return math.hypot(*told) / count if len(told) == len(errors) else None


def _verdict(
    tasks: Tasks,
    scores: Mapping[str, TaskScores],
    differences: Mapping[str, Differences],
    allowed: float,
) -> dict[str, Json]:
    """Whether the mean accuracy fell by at most `allowed`; every task has one, by `load_tasks`."""
    against = "base" if "base" in scores else "full_precision"
    change = _means(tasks.names, scores, differences)["acc_norm"].differences[against]
    drop = -change.difference
    return {
        "allowed": allowed,
        "against": against,
        "drop": drop,
        "stderr": change.stderr,
        "acceptable": bool(drop <= allowed),
        "tasks": list(tasks.names),
    }
