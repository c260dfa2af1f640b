"""What a person sees while a run is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars


class Progress:
    """Shows nothing; the base of what shows something."""

    @contextmanager
    def blocks(self, blocks: int, steps: int) -> Iterator[None]:
        """Around the learning of `blocks` blocks of `steps` steps each."""
        yield

    def stepper(self, block: int) -> Callable[[int, float], None]:
        """A function told (step, loss) after each step of a block."""
        return lambda step, loss: None

    def finished(self, block: int) -> None:
        """A block is done."""

    @contextmanager
    def measuring(self, what: str, blocks: int) -> Iterator[Callable[[int], None]]:
        """Around one measurement over all blocks; yields a function told each finished block."""
        yield lambda block: None


class BarProgress(Progress):
    """Bars with loss and time left, on a terminal; nothing where output goes to a file."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    @contextmanager
    def blocks(self, blocks: int, steps: int) -> Iterator[None]:
        self._steps = max(steps, 1)
        with self._bars:
            self._task = self._bars.add_task("learning", total=blocks * self._steps, note="")
            yield
            self._bars.remove_task(self._task)

    def stepper(self, block: int) -> Callable[[int, float], None]:
        def step(done: int, loss: float) -> None:
            note = f"block {block} loss {loss:.4g}"
            self._bars.update(self._task, completed=block * self._steps + done, note=note)

        return step

    def finished(self, block: int) -> None:
        self._bars.update(self._task, completed=(block + 1) * self._steps)

    @contextmanager
    def measuring(self, what: str, blocks: int) -> Iterator[Callable[[int], None]]:
        with self._bars:
            task = self._bars.add_task(what, total=blocks, note="")
            yield lambda block: self._bars.update(task, completed=block + 1)
            self._bars.remove_task(task)
