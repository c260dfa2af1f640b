"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

from lrquant.runs.block_file import BlockRecord
from lrquant.runs.progress import Progress

_SPEED_SECONDS = 600  # time left is estimated from the steps of so long


class BarProgress(Progress):
    """Bars with block, epoch, loss, time left and peak memory, in a terminal or a notebook."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", table_column=Column()),  # alone folds where it must
            console=console,
            disable=not (console.is_terminal or console.is_jupyter),
            transient=True,
            speed_estimate_period=_SPEED_SECONDS,
        )

    @contextmanager
    def blocks(
        self, blocks: int, epochs: int, batches: int, memory: Callable[[], int]
    ) -> Iterator[None]:
        self._blocks, self._epochs, self._batches, self._memory = blocks, epochs, batches, memory
        self._steps = max(epochs * batches, 1)
        self._skipped = 0
        with self._bars:
            self._task = self._bars.add_task(
                "learning", total=blocks * self._steps, count=f"0/{blocks} blocks", note=""
            )
            yield
            self._bars.remove_task(self._task)

    def stepper(self, block: int, together: int = 1) -> Callable[[int, float], None]:
        before = (block - self._skipped) * self._steps

        blocks = f"block {block}" if together == 1 else f"blocks {block} to {block + together - 1}"

        def step(step_count: int, loss: float) -> None:
            epoch = -(-step_count // self._batches)
            note = (
                f"{blocks}, epoch {epoch}/{self._epochs}, loss {loss:.4g}, "
                f"peak {decimal(self._memory())}"
            )
            self._bars.update(self._task, completed=before + together * step_count, note=note)

        return step

    def finished(self, block: int, record: BlockRecord | None) -> None:
        count = f"{block + 1}/{self._blocks} blocks"
        if record is None:  # took no time to learn: left out of what time is reckoned by
            self._skipped = block + 1
            total = (self._blocks - self._skipped) * self._steps
            self._bars.update(self._task, total=total, count=count)
            return
        completed = (block + 1 - self._skipped) * self._steps
        self._bars.update(self._task, completed=completed, count=count)

    @contextmanager
    def measuring(
        self, what: str, steps: int, unit: str = "blocks"
    ) -> Iterator[Callable[[int], None]]:
        with self._bars:
            task = self._bars.add_task(what, total=steps, count=f"0/{steps} {unit}", note="")
            yield lambda step: self._bars.update(
                task, completed=step + 1, count=f"{step + 1}/{steps} {unit}"
            )
            self._bars.remove_task(task)
