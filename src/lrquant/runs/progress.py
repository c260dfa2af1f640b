"""What a person sees while a run is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lrquant.runs.folder import BlockRecord


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
