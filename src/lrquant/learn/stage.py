"""A stage: a part of learning that goes through units in order, and can be gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Stage(Protocol):
    """Units of consecutive blocks, each kept in the run folder, under the stage's name.

    A unit that is kept is passed through: what stands before the next one moves on all the same.
    """

    @property
    def name(self) -> str:
        """The folder in a run's of what it learns."""

    @property
    def units(self) -> Sequence[range]:
        """The blocks of each unit, in order."""

    def kept(self) -> int:
        """How many units, from the first on, need not be learned any more."""

    def learn(self, unit: range) -> None:
        """Learn a unit, keep it, and move on."""

    def pass_through(self, unit: range) -> None:
        """Move on through a unit that is kept."""


def carry_out(stage: Stage) -> None:
    """Go through all units of a stage."""
    kept = stage.kept()
    for number, unit in enumerate(stage.units):
        if number < kept:
            stage.pass_through(unit)
        else:
            stage.learn(unit)


def units_of(blocks: int, length: int) -> list[range]:
    """`blocks` blocks in units of `length`, the last one perhaps shorter."""
    return [range(first, min(first + length, blocks)) for first in range(0, blocks, length)]
