"""Residual streams of a token: in line between blocks, stacked for a block that has several."""

from __future__ import annotations

from torch import Tensor


def stacked(states: Tensor, count: int) -> Tensor:
    """States (*shape, count * hidden) as a block of `count` residual streams takes them.

    That is (count, *shape, hidden), or as they are for one.
    """
    return states if count == 1 else states.unflatten(-1, (count, -1)).movedim(-2, 0)


def in_line(states: Tensor, count: int) -> Tensor:
    """The reverse."""
    return states if count == 1 else states.movedim(0, -2).flatten(-2)
