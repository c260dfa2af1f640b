"""A team: the processes that learn one model together, each on its share of the samples."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Team(Protocol):
    """What its members say to each other; each call is made by all of them, in the same order."""

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

    def first(self, value: T) -> T:
        """What the first member has, which decides for all."""


class Alone:
    """A team of one: everything is as it is."""

    size = 1
    rank = 0

    def sum(self, values: Tensor) -> Tensor:
        return values

    def maximum(self, values: Tensor) -> Tensor:
        return values

    def first(self, value: T) -> T:
        return value


ALONE = Alone()
