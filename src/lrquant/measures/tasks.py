"""Zero-shot tasks of lm-evaluation-harness (the extra `lrquant[eval]`), models side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lrquant.errors import LRQuantError
from lrquant.measures.harness.settings import TaskSettings
from lrquant.measures.harness.task_rows import score_words, task_rows, verdict
from lrquant.measures.measure import ModuleMeasure, Scored, WholeModel
from lrquant.measures.numbers import share
from lrquant.measures.rows import SPREAD_NOTE, RunResults, Table, Tile, beside, named
from lrquant.measures.shares import of_how_many
from lrquant.runs.results import Json, Results, entries, figure, record

if TYPE_CHECKING:
    from lrquant.config.groups import Sources
    from lrquant.measures.harness.scores import TaskScores
    from lrquant.measures.harness.task_list import Tasks
    from lrquant.runs.progress import Progress


class ZeroShot(ModuleMeasure[TaskSettings, "Tasks", "TaskScores"]):
    """The first model of a command is compared with each later one, on the same items."""

    name = "tasks"
    settings = TaskSettings
    asked_by = ("tasks",)
    of_one_command = ("max_drop",)
    order = 50
    shared = True

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("tasks", "task_means")

    def check(self, settings: TaskSettings, compared: bool) -> None:
        """Refuse a limit of the loss where there would be no loss to hold against it."""
        if settings.max_drop is not None and not (settings.tasks and compared):
            needed = "--compare" if settings.tasks else "--tasks"
            raise LRQuantError(
                f"--max_drop {settings.max_drop:g}: says how much accuracy may be lost; give "
                f"{needed} too"
            )

    def set_by_set(self, settings: TaskSettings) -> Iterable[TaskSettings]:
        names = [name.strip() for name in settings.tasks.split(",")]
        return [dataclasses.replace(settings, tasks=name) for name in names if name]

    def read_alone(self, settings: TaskSettings, sources: Sources) -> Mapping[str, Tasks]:
        from lrquant.measures.harness.scores import load_tasks

        return {settings.tasks: load_tasks(settings, sources)} if settings.tasks else {}

    def described(self, asked: Tasks) -> str:
        sets = "".join(f", {asked.sets[name]}" for name in asked.names if name in asked.sets)
        return f"task {','.join(asked.names)}{sets}"

    def score(
        self,
        name: str,
        asked: Tasks,
        model: WholeModel,
        settings: TaskSettings,
        sources: Sources,
        progress: Progress,
    ) -> TaskScores:
        from lrquant.measures.harness.scores import score_tasks

        return score_tasks(asked, model, settings, sources)

    def assist(self, model: WholeModel, settings: TaskSettings, sources: Sources) -> None:
        from lrquant.measures.harness.scores import answer_tasks

        answer_tasks(model, settings, sources)

    def as_json(self, scores: TaskScores) -> Json:
        return scores.results

    def files(self, variant: str, scores: TaskScores) -> Mapping[str, str]:
        return {variant: scores.to_json()}

    def entries(self, scored: Scored[Tasks, TaskScores], settings: TaskSettings) -> Results:
        from lrquant.measures.harness.comparison import compared

        return compared(scored.asked, scored.scores, settings.max_drop)

    def log_lines(self, scored: Scored[Tasks, TaskScores], variant: str) -> Iterable[str]:
        from lrquant.measures.harness.comparison import of_what

        scores = scored.scores[variant]
        first = next(iter(scored.scores.values()))
        for name in scored.asked.names:
            items = record(of_what(scored.asked, [name], first).get("items"))
            about = [name, variant.replace("_", " "), of_how_many(items)]
            words = score_words(record(scores.results[name]))
            yield f"task {', '.join(filter(None, about))}: {words}"

    def rows(
        self, results: Results, labels: Mapping[str, str]
    ) -> tuple[list[str], list[list[str]]]:
        return task_rows(results, labels)

    def tables(self, results: Results, labels: Mapping[str, str]) -> list[str]:
        """Accuracies and their means, differences where there are some, and the verdict."""
        return [*super().tables(results, labels), verdict(results)]

    def report_tables(self, runs: Sequence[RunResults]) -> list[Table]:
        """The harness's numbers with their standard errors, the models side by side."""
        columns: list[str] = []
        cells: dict[str, dict[str, str]] = {}
        for run in runs:
            whose = f"{run.name}: " if run.name else ""
            head, rows = task_rows(run.results, run.labels)
            columns += [whose + label for label in head]
            for first, *values in rows:
                pairs = zip(head, values, strict=True)
                own = {whose + label: value for label, value in pairs}
                cells.setdefault(first, {}).update(own)
        lines = [
            [first, *(own.get(label, "") for label in columns)] for first, own in cells.items()
        ]
        return [Table("Zero-shot tasks", ["task and metric", *columns], lines, _note(runs))]

    def tiles(self, run: RunResults) -> list[Tile]:
        tiles = []
        for label, about, entry in named(run.results, "task_means")[-1:]:
            means = record(entry.get("acc_norm"))  # the plain accuracy where a task has no other
            columns = [key for key in run.labels if key in means]
            values = {key: share(figure(record(means[key])["mean"])) for key in columns}
            if "quantized" in values:
                tile = Tile(f"{label}{about}", values["quantized"], beside(run.labels, values))
                tiles.append(tile)
        return tiles

    def missing(self, results: Results) -> list[str]:
        if any(True for _ in entries(results, self.name)):
            return []
        return ["zero-shot tasks: lrquant evaluate RUN --tasks piqa,arc_easy"]


def _note(runs: Sequence[RunResults]) -> str:
    of_groups = any("part_of" in e for run in runs for _, e in entries(run.results, "tasks"))
    notes = [f"{SPREAD_NOTE} Of differences (from …) it is that of the pairs, item by item."]
    notes += ["The tasks of a group are in report.json."] if of_groups else []
    verdicts = [verdict(run.results) for run in runs]
    return " ".join([*notes, *(f"{text[:1].upper()}{text[1:]}." for text in verdicts if text)])


MEASURE = ZeroShot()
