"""A team: the processes that do one command together, each with its share of the samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Team(ABC):
    """What its members say to each other; each call is made by all of them, in the same order.

    There are `size` members; `rank` is which one this is, from 0.
    """

    size: int
    rank: int

    @abstractmethod
    def each(self, value: T) -> list[T]:
        """What every member says, in their order; tensors among it are on the CPU."""

    @abstractmethod
    def first(self, make: Callable[[], T]) -> T:
        """What the first member makes, for all; no other calls `make`.

        So the run folder is read and written by one process, and no other needs to have it.
        """

    @abstractmethod
    def ordered_sum(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The sum (values,) of all members' rows (own, values), one after the other.

        `counts` says how many rows each member has.  However these are dealt out, the sum has the
        same bytes: ``((r1 + r2) + r3) + …`` over the first member's rows, then the second's.
        """


class Alone(Team):
    """A team of one: everything is as it is."""

    size = 1
    rank = 0

    def each(self, value: T) -> list[T]:
        return [value]

    def first(self, make: Callable[[], T]) -> T:
        return make()

    def ordered_sum(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return sum_in_order(rows)


ALONE = Alone()


def sum_in_order(rows: Tensor) -> Tensor:
    """``((r1 + r2) + r3) + …`` of rows (rows, values)."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def holds_for_all(team: Team, condition: bool) -> bool:
    """Whether a condition holds for every member."""
    return all(team.each(condition))
