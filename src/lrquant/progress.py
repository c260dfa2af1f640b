"""What a person sees while a run is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

from lrquant.workdir import BlockRecord

_SPEED_SECONDS = 600  # time left is estimated from the steps of so long


class Progress:
    """Shows nothing; the base of what shows something."""

    @contextmanager
    def blocks(
        self, blocks: int, epochs: int, batches: int, memory: Callable[[], int]
    ) -> Iterator[None]:
        """Around the learning of `blocks` blocks, each of `epochs` times `batches` steps.

        `memory` tells the peak memory so far, in bytes.
        """
        yield

    def stepper(self, block: int) -> Callable[[int, float], None]:
        """A function told (step, loss) after each step of a block."""
        return lambda step, loss: None

    def finished(self, block: int, record: BlockRecord | None) -> None:
        """A block is done; None for the record of one that an earlier start has learned."""

    @contextmanager
    def measuring(
        self, what: str, steps: int, unit: str = "blocks"
    ) -> Iterator[Callable[[int], None]]:
        """Around one measurement over all blocks, or all of another `unit`.

        Yields a function told the index of each one that is finished.
        """
        yield lambda step: None

    def measured(self, results: dict[str, Any]) -> None:
        """Measures as results.json has them."""

    def close(self) -> None:
        """Nothing more will come."""


class BarProgress(Progress):
    """Bars with block, epoch, loss, time left and peak memory; nothing where it is no terminal."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", table_column=Column()),  # alone folds where it must
            console=console,
            disable=not console.is_terminal,
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
                "learning", total=blocks * self._steps, done=f"0/{blocks} blocks", note=""
            )
            yield
            self._bars.remove_task(self._task)

    def stepper(self, block: int) -> Callable[[int, float], None]:
        before = (block - self._skipped) * self._steps

        def step(done: int, loss: float) -> None:
            epoch = -(-done // self._batches)
            note = (
                f"block {block}, epoch {epoch}/{self._epochs}, loss {loss:.4g}, "
                f"peak {decimal(self._memory())}"
            )
            self._bars.update(self._task, completed=before + done, note=note)

        return step

    def finished(self, block: int, record: BlockRecord | None) -> None:
        done = f"{block + 1}/{self._blocks} blocks"
        if record is None:  # took no time to learn: left out of what time is reckoned by
            self._skipped = block + 1
            total = (self._blocks - self._skipped) * self._steps
            self._bars.update(self._task, total=total, done=done)
            return
        completed = (block + 1 - self._skipped) * self._steps
        self._bars.update(self._task, completed=completed, done=done)

    @contextmanager
    def measuring(
        self, what: str, steps: int, unit: str = "blocks"
    ) -> Iterator[Callable[[int], None]]:
        with self._bars:
            task = self._bars.add_task(what, total=steps, done=f"0/{steps} {unit}", note="")
            yield lambda step: self._bars.update(
                task, completed=step + 1, done=f"{step + 1}/{steps} {unit}"
            )
            self._bars.remove_task(task)


class Together(Progress):
    """Several that are told the same."""

    def __init__(self, parts: Sequence[Progress]) -> None:
        self._parts = parts

    @contextmanager
    def blocks(
        self, blocks: int, epochs: int, batches: int, memory: Callable[[], int]
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.blocks(blocks, epochs, batches, memory))
            yield

    def stepper(self, block: int) -> Callable[[int, float], None]:
        steppers = [part.stepper(block) for part in self._parts]

        def step(done: int, loss: float) -> None:
            for told in steppers:
                told(done, loss)

        return step

    def finished(self, block: int, record: BlockRecord | None) -> None:
        for part in self._parts:
            part.finished(block, record)

    @contextmanager
    def measuring(
        self, what: str, steps: int, unit: str = "blocks"
    ) -> Iterator[Callable[[int], None]]:
        with ExitStack() as stack:
            told = [stack.enter_context(part.measuring(what, steps, unit)) for part in self._parts]

            def each(step: int) -> None:
                for one in told:
                    one(step)

            yield each

    def measured(self, results: dict[str, Any]) -> None:
        for part in self._parts:
            part.measured(results)

    def close(self) -> None:
        for part in self._parts:
            part.close()
