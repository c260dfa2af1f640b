"""A share: the samples of one member of a team, and how its batches lie among all of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import TypeVar

from torch import Tensor

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.workbench import Workbench
from lrquant.data.feeds import Feed
from lrquant.errors import LRQuantError
from lrquant.team.team import ALONE, Team

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What a member of a `team` has of every step.

    A step's batches lie in the order of samples, first those of the first member, then the
    second's.  `counts` (steps, members) says how many each has, `weights` how much each of this
    member's batches is of its step: of all tokens, as they count.
    """

    team: Team
    counts: Sequence[Sequence[int]]
    weights: Sequence[float]

    @classmethod
    def alone(cls, batches: int) -> Share:
        """Each batch a step of its own, all of one process."""
        return cls(ALONE, [[1]] * batches, [1.0] * batches)

    @cached_property
    def steps(self) -> list[range]:
        """This member's own batches of each step."""
        own = (counts[self.team.rank] for counts in self.counts)
        return [range(*ends) for ends in pairwise(accumulate(own, initial=0))]

    def in_order(self, own: Sequence[T]) -> list[T]:
        """What every member has of each of its batches, of all in the order of samples.

        Tensors among it are on the CPU.
        """
        members = [iter(each) for each in self.team.each(list(own))]
        return [
            value
            for counts in self.counts
            for member, count in zip(members, counts, strict=True)
            for value in islice(member, count)
        ]

    def weighing(self, entry: BlockInputs) -> Share:
        """The same, with the weights of the batches of `entry`."""
        own = [entry.count(batch) for batch in range(len(entry.batches))]
        every = iter(self.in_order(own))
        totals = [sum(islice(every, sum(counts))) for counts in self.counts]
        pairs = zip(self.steps, totals, strict=True)
        weights = [own[batch] / total for batches, total in pairs for batch in batches]
        return replace(self, weights=weights)

    def step_sum(self, rows: Tensor, step: int) -> Tensor:
        """The sum (values,) of a step's rows, one a batch, in the order of samples."""
        return self.team.ordered_sum(rows, self.counts[step])


def share_of(feed: Feed, batch_size: int, together: int, team: Team = ALONE) -> tuple[Feed, Share]:
    """This member's samples of a feed, and how they lie in steps of `batch_size` samples.

    `together` of them, of the same shapes, go through a block at once, and form a batch.
    """
    feed = feed if together == 1 else feed.grouped()
    batches, size = feed.slices(together), max(1, batch_size // together)
    counts, own = [], []
    for start in range(0, len(batches), size):
        step = batches[start : start + size]
        ends = [len(step) * member // team.size for member in range(team.size + 1)]
        counts.append([end - first for first, end in pairwise(ends)])
        own += step[ends[team.rank] : ends[team.rank + 1]]
    have = [sum(count[member] for count in counts) for member in range(team.size)]
    if not all(have):
        raise LRQuantError(
            f"{len(feed)} samples in steps of {batch_size}, {together} at once, are too few for "
            f"{team.size} processes; start fewer, or use a larger --batch_size and more samples"
        )
    samples = [index for each in own for index in range(each.start, each.stop)]
    return feed.only(samples), Share(team, counts, [])


def require_steps(batch_size: int, together: int, processes: int) -> None:
    """Refuse steps in which some of so many processes would never have a sample."""
    if batch_size // together < processes:
        at_once = f" and --micro_batch_size {together}" if together > 1 else ""
        raise LRQuantError(
            f"--batch_size {batch_size}{at_once}: too few samples a step for {processes} "
            f"processes; use --batch_size {processes * together} or a multiple of it"
        )


def shared_inputs(
    workbench: Workbench, feed: Feed, batch_size: int, together: int, team: Team = ALONE
) -> tuple[BlockInputs, Share]:
    """What enters the blocks of this member's samples, and its share: see `share_of`."""
    own, share = share_of(feed, batch_size, together, team)
    entry = BlockInputs(workbench.model, own, together, workbench.device)
    return entry, share.weighing(entry)
