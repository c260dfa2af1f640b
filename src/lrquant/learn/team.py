"""A team: the processes that learn one model together, each on its share of the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lrquant.errors import LRQuantError

T = TypeVar("T")


class Team(Protocol):
    """What its members say to each other; each call is made by all of them, in the same order.

    All get the same answer, where the value was and in its dtype.
    """

    @property
    def size(self) -> int:
        """How many members there are."""

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all members' values."""

    def maximum(self, values: Tensor) -> Tensor:
        """The largest of all members' values, element by element."""

    def first(self, make: Callable[[], T]) -> T:
        """What the first member makes, for all; no other calls `make`.

        So the run folder is read and written by one process, and no other needs to have it.
        """


class Alone:
    """A team of one: everything is as it is."""

    size = 1
    rank = 0

    def sum(self, values: Tensor) -> Tensor:
        return values

    def maximum(self, values: Tensor) -> Tensor:
        return values

    def first(self, make: Callable[[], T]) -> T:
        return make()


ALONE = Alone()


def holds_for_all(team: Team, condition: bool) -> bool:
    """Whether a condition holds for every member."""
    return not team.maximum(torch.tensor(float(not condition)))


def require_even(team: Team, batches: int) -> None:
    """Refuse shares of different numbers of batches: a step is of one batch of every member."""
    most, fewest = team.maximum(torch.tensor([batches, -batches])).abs().tolist()
    if most != fewest:
        raise LRQuantError(
            f"the samples of one process are {most} batches, those of another {fewest}; give every "
            "process as many samples, with as many of each shape"
        )
