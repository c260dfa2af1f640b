"""Kinds of blocks: those of a part that are made, quantised and learned alike, and their costs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from lrquant.blocks.plan import plan_block
from lrquant.blocks.workbench import Workbench
from lrquant.learn.stage import units_of
from lrquant.preflight.load import Load
from lrquant.preflight.probe import BlockCosts, probe_block

MOST = 4  # kinds that are measured


@dataclass(frozen=True)
class KindCosts:
    """Blocks by index, and what each of them costs.

    `measured` is the block that was probed: the first of them, or where it is none of them one of
    the most expensive kind, in whose place they are counted.
    """

    blocks: tuple[int, ...]
    measured: int
    costs: BlockCosts

    @property
    def own(self) -> bool:
        """Whether it was one of these blocks that was measured."""
        return self.measured in self.blocks

    def behind(self, first: int) -> int:
        """How many of the blocks stand at `first` or after it."""
        return sum(index >= first for index in self.blocks)


def probe_kinds(load: Load) -> list[KindCosts]:
    """Measure the first block of each kind, the most frequent first.

    Of more than `MOST` kinds the others are not read: they count as the most expensive one does.
    """
    kinds = sorted(block_kinds(load), key=len, reverse=True)
    costs = [KindCosts(each, each[0], probe_block(load, each[0])) for each in kinds[:MOST]]
    others = tuple(sorted(index for each in kinds[MOST:] for index in each))
    if others:
        dearest = max(costs, key=lambda each: each.costs.step + each.costs.held)
        costs.append(KindCosts(others, dearest.measured, dearest.costs))
    return costs


def block_kinds(load: Load) -> list[tuple[int, ...]]:
    """Blocks by kind: alike themselves, and in windows of blocks of the same kinds."""
    bench = load.workbench
    count = len(bench.model.blocks)
    alone = [_kind(bench, index) for index in range(count)]
    kinds: dict[Hashable, list[int]] = {}
    for unit in units_of(count, load.learning.window):
        together = frozenset(alone[index] for index in unit)
        for index in unit:
            kinds.setdefault((alone[index], together), []).append(index)
    return [tuple(each) for each in kinds.values()]


def _kind(bench: Workbench, index: int) -> Hashable:
    """Parameters, matrices, sites and schemes of a block."""
    plan = plan_block(bench.model, index, bench.plan.schemes)
    stored = bench.model.blocks[index].state_dict()
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in stored.items())
    matrices = tuple(plan.matrices.values())
    return shapes, matrices, plan.sites, tuple(plan.schemes.values())
