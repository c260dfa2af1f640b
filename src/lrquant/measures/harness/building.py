"""Building the harness's tasks so that each finds its set; imported only where it is installed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from lrquant.config.groups import Sources
from lrquant.errors import LRQuantError
from lrquant.measures.harness.sets import FAILURES, find_set, one_line, unavailable
from lrquant.measures.harness.settings import TaskSettings
from lrquant.measures.harness.task_list import Tasks, data_folders, require_known


class LocalTask(ConfigurableTask):
    """A task as the harness defines it, whose set is looked for in folders before the hub.

    `config` is the harness's, with `folders` and `cache_dir` of this project beside.  Splits that
    a folder lacks are taken out of the definition; `lacking` names them.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        own = dict(config)
        own.pop("class")
        self._folders: tuple[Path, ...] = own.pop("folders")
        self._cache_dir: str | None = own.pop("cache_dir")
        self.origin = "the hub"
        self.lacking: tuple[str, ...] = ()
        super().__init__(config=own)

    def download(self, dataset_kwargs: dict[str, object] | None = None, **kwargs: object) -> None:
        """Set `dataset`: what a folder has, else what the hub or its cache has."""
        path, name = str(self.DATASET_PATH), self.DATASET_NAME
        try:
            for folder in self._folders:
                pair = find_set(path, name, folder)
                if pair is not None:
                    self.dataset, self.origin = pair
                    self._leave_out_lacking()
                    return
            cached = {} if self._cache_dir is None else {"cache_dir": self._cache_dir}
            super().download({**cached, **(dataset_kwargs or {})}, **kwargs)
        except FAILURES as error:
            first = self._folders[0] if self._folders else None
            raise unavailable(str(self.config.task), path, name, first, error) from error

    def _leave_out_lacking(self) -> None:
        config, shots = self.config, self.fewshot_cfg
        wanted = (config.training_split, config.validation_split, config.test_split, shots.split)
        lacking = {split for split in wanted if split and split not in self.dataset}
        self.lacking = tuple(sorted(lacking))
        for name in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if getattr(config, name) in lacking:
                setattr(config, name, None)
        if shots.split in lacking:
            shots.split = None
        if config.test_split is None and config.validation_split is None:
            raise LRQuantError(
                f"--tasks {config.task}: {self.origin} lacks the split {' and '.join(lacking)} "
                "that is scored; add it"
            )


def build_tasks(names: list[str], settings: TaskSettings, sources: Sources) -> Tasks:
    """Tasks and groups by name, with their sets."""
    manager = _all_tasks()
    require_known(names, manager.all_tasks)
    own = {"class": LocalTask, "folders": data_folders(sources), "cache_dir": sources.cache_dir}
    tops: list[Task | Group] = []
    try:
        for name in names:
            tops += _build(name, manager, own)
        loaded = manager.load(tops)  # refuses a task that is asked for twice
    except (TypeError, *FAILURES) as error:
        raise LRQuantError(
            f"--tasks {settings.tasks}: the harness cannot load them ({one_line(error)})"
        ) from error
    for name, task in loaded["tasks"].items():
        _check(name, task, settings.num_fewshot)
    for top in tops if settings.max_drop is not None else ():
        _require_accuracy(top)
    groups = loaded.get("groups", {})
    parents = {
        member: top.name
        for top in tops
        if isinstance(top, Group)
        for member in (*_tasks_of(top), *(group.name for group in top.get_all_groups()))
    }
    return Tasks(
        names=tuple(top.name if isinstance(top, Group) else top.task_name for top in tops),
        loaded=tuple(tops),
        sets={name: _described(task) for name, task in loaded["tasks"].items()},
        members={name: _tasks_of(group) for name, group in groups.items()},
        parents=parents,
        weighted=frozenset(name for name, group in groups.items() if _weighted(group)),
        with_pictures=frozenset(
            n for n, task in loaded["tasks"].items() if getattr(task, "MULTIMODAL", False)
        ),
    )


@cache
def _all_tasks() -> TaskManager:
    """The harness's index: it reads thousands of files."""
    return TaskManager()


def _build(name: str, manager: TaskManager, own: dict[str, object]) -> list[Task | Group]:
    """The task, group, or tasks of a tag, of that name, as `LocalTask`s.

    Tasks that the harness writes in Python have a class of their own and stay as they are.
    """
    overrides = None if _written_in_python(name, manager) else own
    registry = manager.task_index
    built = TaskFactory().build(registry[name], overrides=overrides, registry=registry)
    return built if isinstance(built, list) else [built]


def _tasks_of(group: Group) -> tuple[str, ...]:
    return tuple(task.task_name for task in group.get_all_tasks())


def _written_in_python(name: str, manager: TaskManager) -> bool:
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name == "PY_TASK":
        return entry is not None
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else []
    names = [each if isinstance(each, str) else each.get("task") for each in members or []]
    names += entry.tags if entry.kind.name == "TAG" else []
    return any(_written_in_python(each, manager) for each in names if isinstance(each, str))


def _check(name: str, task: Task, examples: int) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise LRQuantError(
            f"--tasks {name}: runs generated code, which is not supported; leave it out"
        )
    shots = 0 if task.config.num_fewshot == 0 else examples  # so does the harness
    split = next((s for s in ("train", "dev") if s in getattr(task, "lacking", ())), None)
    if shots and split is not None:
        raise LRQuantError(
            f"--tasks {name} with {shots} examples in the prompt: they come from the split "
            f"{split!r}, which {task.origin} lacks; use --num_fewshot 0, or add the split there"
        )


def _require_accuracy(child: Task | Group) -> None:
    """Without an accuracy nothing can be said of its loss."""
    if isinstance(child, Group):
        name, metrics = child.name, {e.metric for e in child.aggregate_metric_list or ()}
    else:
        name, metrics = child.task_name, set(child.aggregation())
    if not metrics & {"acc", "acc_norm"}:
        raise LRQuantError(
            f"--max_drop with --tasks {name}: it has no accuracy of its own "
            f"({', '.join(sorted(metrics)) or 'no metric'}); leave it out, or name tasks that have"
        )


def _described(task: Task) -> str:
    split = task.config.test_split or task.config.validation_split
    origin = getattr(task, "origin", "the hub")
    text = f"{split}, {len(task.eval_docs)} items, {origin}"
    if "test" in getattr(task, "lacking", ()) and split != "test":
        text += " (the harness scores its test split, which is not there)"
    return text


def _weighted(group: Group) -> bool:
    return all(entry.weight_by_size for entry in group.aggregate_metric_list or ())
