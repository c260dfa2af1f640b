"""The settings of tasks."""

from __future__ import annotations

from dataclasses import dataclass

from lrquant.config.settings import setting
from lrquant.errors import LRQuantError

LARGEST_BATCH = 2**16


@dataclass(frozen=True)
class TaskSettings:
    """The tasks, and how they are asked and judged."""

    tasks: str = setting("", "zero-shot tasks of lm-evaluation-harness, separated by commas")
    num_fewshot: int = setting(
        0, "examples in the prompt of a task, whatever the task says", limits=(0, 1000)
    )
    task_batch_size: str = setting(
        "auto", "requests of a task at once; auto: what fits on a GPU, 8 on a CPU"
    )
    max_drop: float | None = setting(
        None, "exit with 1 if the tasks' mean accuracy falls by more than this (0.01: one point)"
    )

    def __post_init__(self) -> None:
        size = self.task_batch_size
        if size != "auto" and not (size.isdecimal() and 0 < int(size[:9]) <= LARGEST_BATCH):
            raise LRQuantError(
                f"task_batch_size {size!r}: use auto or a whole number from 1 to {LARGEST_BATCH}"
            )
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise LRQuantError(
                f"max_drop {self.max_drop}: use a share of accuracy from 0 to 1 (0.01: one point)"
            )
        if self.tasks and not self.tasks.replace(",", " ").strip():
            raise LRQuantError(f"tasks {self.tasks!r}: names no task; leave it out for none")
