"""Zero-shot scores side by side: differences with standard errors, means, and the verdict."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import fmean, stdev
from typing import Any

from transformers import PreTrainedModel

from lrquant.config.config import Config
from lrquant.data.prompts import Reader
from lrquant.measures.shares import of_how_many
from lrquant.measures.task_list import Tasks
from lrquant.measures.zero_shot import TaskScores, score_tasks
from lrquant.runs.folder import RunFolder

logger = logging.getLogger("lrquant")
PUBLISHED_TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
ACCURACIES = {"acc": ("acc",), "acc_norm": ("acc_norm", "acc")}  # the first that a task has


class TaskBoard:
    """The scores of one model and of those that it is compared with, on the same items.

    The first variant that is added is compared with each later one.  With a `folder`, what the
    harness says of each goes to its tasks/VARIANT_DATE.json.
    """

    def __init__(self, tasks: Tasks, config: Config, folder: RunFolder | None = None) -> None:
        self.tasks, self.config, self.folder = tasks, config, folder
        self.scores: dict[str, TaskScores] = {}

    def add(self, variant: str, module: PreTrainedModel, reader: Reader) -> dict[str, Any]:
        """Score one more model; what results.json says of all so far."""
        scores = self.scores[variant] = score_tasks(self.tasks, module, reader, self.config)
        if self.folder is not None:
            date = datetime.now().isoformat(timespec="seconds").replace(":", "-")
            self.folder.write_text(f"tasks/{variant}_{date}.json", scores.to_json())
        results = compared(self.tasks, self.scores, self.config.max_drop)
        for name in self.tasks.names:
            metrics = results["tasks"][name][variant]
            about = [name, variant.replace("_", " ")]
            about += filter(None, [of_how_many(results["tasks"][name].get("items"))])
            logger.info("task %s: %s", ", ".join(about), _words(metrics))
        return results


def compared(
    tasks: Tasks, scores: Mapping[str, TaskScores], max_drop: float | None = None
) -> dict[str, Any]:
    """What results.json says of tasks: scores, and differences of the first variant from others.

    `tasks` has every task and group, `task_means` the mean over those that were asked for and over
    the six published ones if they are among them; `max_drop` says whether the mean accuracy (that
    normalised by length where a task has it) fell by more than that from full precision or base.
    """
    results: dict[str, Any] = {"tasks": {}, "task_means": {}}
    for name in next(iter(scores.values())).results:
        entry: dict[str, Any] = {"data": tasks.sets[name]} if name in tasks.sets else {}
        entry |= _of_what(tasks, [name], next(iter(scores.values())))
        if name in tasks.parents:
            entry["part_of"] = tasks.parents[name]
        entry |= {variant: found.results[name] for variant, found in scores.items()}
        differences = _against_others(tasks, name, scores)
        results["tasks"][name] = entry | ({"differences": differences} if differences else {})
    averaged = {f"mean of {len(tasks.names)} tasks": tasks.names}
    if set(PUBLISHED_TASKS) == set(tasks.names):
        averaged.clear()
    if set(PUBLISHED_TASKS) <= set(tasks.names):
        averaged["mean of the six published tasks"] = PUBLISHED_TASKS
    for label, names in averaged.items():
        if len(names) > 1:
            means = _means(names, results["tasks"], list(scores))
            about = _of_what(tasks, names, next(iter(scores.values())))
            results["task_means"] |= {label: means | about}
    if max_drop is not None and len(scores) > 1:
        results["max_drop"] = _verdict(tasks, results["tasks"], list(scores), max_drop)
    return {key: value for key, value in results.items() if value}


def _of_what(tasks: Tasks, names: Sequence[str], scores: TaskScores) -> dict[str, Any]:
    """Of how many items, with how many examples in the prompt, as far as the harness tells."""
    members = [part for name in names for part in tasks.members.get(name, (name,))]
    shots = sorted({scores.output.get("n-shot", {}).get(part, 0) for part in members})
    told = {
        "items": scores.items_of(members),
        "num_fewshot": shots[0] if len(shots) == 1 else shots,
    }
    return {name: value for name, value in told.items() if value is not None}


def accuracy_of(metrics: Mapping[str, Any], kind: str) -> str | None:
    """The metric ("acc_norm,none") that is a task's accuracy of this kind, if it has one."""
    for metric in ACCURACIES[kind]:
        found = [key for key in metrics if key.startswith(f"{metric},")]
        if found:
            return found[0]
    return None


def _against_others(
    tasks: Tasks, name: str, scores: Mapping[str, TaskScores]
) -> dict[str, dict[str, Any]]:
    first, *others = scores
    return {other: _differences(tasks, name, scores[first], scores[other]) for other in others}


def _differences(
    tasks: Tasks, name: str, left: TaskScores, right: TaskScores
) -> dict[str, dict[str, Any]]:
    """Every metric's left - right: paired item by item where it is a mean over the same items."""
    found: dict[str, dict[str, Any]] = {}
    for metric, value in left.results[name].items():
        other = right.results[name].get(metric)
        if not _is_score(metric, value) or not _is_score(metric, other):
            continue
        paired = _paired(tasks, name, metric, left, right)
        if paired is None:
            error = _joint([side.results[name].get(_stderr_name(metric)) for side in (left, right)])
            paired = {"stderr": error, "paired": False}
        found[metric] = {"difference": value - other, **paired}
    return found


def _paired(
    tasks: Tasks, name: str, metric: str, left: TaskScores, right: TaskScores
) -> dict[str, Any] | None:
    """Standard error of the mean paired difference, ``s / sqrt(n)``; of groups by their weights.

    None where the metric is not the mean of what its items have.
    """
    errors, sizes = [], []
    for member in tasks.members.get(name, (name,)):
        sides = [_item_scores(scores, member, metric) for scores in (left, right)]
        if sides[0] is None or sides[1] is None or len(sides[0]) != len(sides[1]):
            return None
        pairs = [a - b for a, b in zip(*sides, strict=True)]
        errors.append(stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None)
        sizes.append(len(pairs))
    weighted = name in tasks.weighted
    shares = [size / sum(sizes) if weighted else 1 / len(sizes) for size in sizes]
    weighed = [None if e is None else share * e for share, e in zip(shares, errors, strict=True)]
    return {"stderr": _joint(weighed), "paired": True, "items": sum(sizes)}


def _item_scores(scores: TaskScores, task: str, metric: str) -> Sequence[float] | None:
    values = scores.items.get(task, {}).get(metric, [])
    reported = scores.results[task].get(metric)
    numbers = bool(values) and all(isinstance(value, float | int) for value in values)
    mean = numbers and isinstance(reported, float) and math.isclose(fmean(values), reported)
    return values if mean else None


def _means(
    names: Sequence[str], entries: Mapping[str, Any], variants: Sequence[str]
) -> dict[str, Any]:
    """Unweighted means of the accuracies over tasks, each with its standard error."""
    first, *others = variants
    means: dict[str, Any] = {}
    for kind in ACCURACIES:
        metrics = [accuracy_of(entries[name][first], kind) for name in names]
        chosen = [(entries[n], m) for n, m in zip(names, metrics, strict=True) if m is not None]
        if len(chosen) < len(names):
            continue
        mean: dict[str, Any] = {"tasks": list(names), "metrics": [metric for _, metric in chosen]}
        for variant in variants:
            errors = [entry[variant].get(_stderr_name(metric)) for entry, metric in chosen]
            mean[variant] = {
                "mean": fmean(entry[variant][metric] for entry, metric in chosen),
                "stderr": _joint(errors, len(chosen)),
            }
        for other in others:
            parts = [entry["differences"][other][metric] for entry, metric in chosen]
            mean.setdefault("differences", {})[other] = {
                "difference": fmean(part["difference"] for part in parts),
                "stderr": _joint([part["stderr"] for part in parts], len(parts)),
            }
        means[kind] = mean
    return means


def _joint(errors: Sequence[Any], count: int = 1) -> float | None:
    """``sqrt(sum of squared errors) / count`` of independent values; None if one is not known."""
    known = [error for error in errors if isinstance(error, float)]
    return math.hypot(*known) / count if len(known) == len(errors) else None


def _verdict(
    tasks: Tasks, entries: Mapping[str, Any], variants: Sequence[str], allowed: float
) -> dict[str, Any]:
    """Whether the mean accuracy fell by at most `allowed`; every task has one, by `load_tasks`."""
    against = "base" if "base" in variants else "full_precision"
    mean = _means(tasks.names, entries, [variants[0], against])
    found = mean["acc_norm"]["differences"][against]
    drop = -found["difference"]
    return {
        "allowed": allowed,
        "against": against,
        "drop": drop,
        "stderr": found["stderr"],
        "acceptable": bool(drop <= allowed),
        "tasks": list(tasks.names),
    }


def _is_score(metric: str, value: Any) -> bool:
    number = isinstance(value, float | int) and not isinstance(value, bool)
    return number and "," in metric and "_stderr," not in metric


def _stderr_name(metric: str) -> str:
    """acc,none -> acc_stderr,none."""
    name, _, kept = metric.partition(",")
    return f"{name}_stderr,{kept}"


def _words(metrics: Mapping[str, Any]) -> str:
    parts = []
    for metric, value in metrics.items():
        if _is_score(metric, value):
            error = metrics.get(_stderr_name(metric))
            spread = f" ± {error:.4f}" if isinstance(error, float) and error > 0 else ""
            parts.append(f"{metric.removesuffix(',none')} {value:.4f}{spread}")
    return ", ".join(parts)
