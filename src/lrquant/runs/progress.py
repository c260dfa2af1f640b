"""Progress: what a person sees while a run is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from lrquant.files.whole import JsonObject
from lrquant.runs.block_file import BlockRecord


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

    def stepper(self, block: int, together: int = 1) -> Callable[[int, float], None]:
        """A function told (step, loss) after each step of a block, or of so many `together`."""
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

    def measured(self, results: JsonObject) -> None:
        """Measures as results.json has them."""

    def close(self) -> None:
        """Nothing more will come."""


class Together(Progress):
    """Several that are told the same."""

    def __init__(self, members: Sequence[Progress]) -> None:
        self._members = members

    @contextmanager
    def blocks(
        self, blocks: int, epochs: int, batches: int, memory: Callable[[], int]
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for member in self._members:
                stack.enter_context(member.blocks(blocks, epochs, batches, memory))
            yield

    def stepper(self, block: int, together: int = 1) -> Callable[[int, float], None]:
        steppers = [member.stepper(block, together) for member in self._members]

        def each(step: int, loss: float) -> None:
            for stepper in steppers:
                stepper(step, loss)

        return each

    def finished(self, block: int, record: BlockRecord | None) -> None:
        for member in self._members:
            member.finished(block, record)

    @contextmanager
    def measuring(
        self, what: str, steps: int, unit: str = "blocks"
    ) -> Iterator[Callable[[int], None]]:
        with ExitStack() as stack:
            steppers = [
                stack.enter_context(member.measuring(what, steps, unit)) for member in self._members
            ]

            def each(step: int) -> None:
                for stepper in steppers:
                    stepper(step)

            yield each

    def measured(self, results: JsonObject) -> None:
        for member in self._members:
            member.measured(results)

    def close(self) -> None:
        for member in self._members:
            member.close()
