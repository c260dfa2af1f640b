"""Experts of one parameter that are all on one grid: many go through it at once, to the same bits.

A matrix by itself is a few dozen launches of a device, which take longer than what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.architectures.matrix import Matrix
from lrquant.blocks.assembly import by_expert, in_order
from lrquant.ingredients.base.block import MatrixShape
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.weights import Extremes, fake_quantize_weight

MOST = 1 << 24  # weights at once: a few float32 copies of them are made


@dataclass(frozen=True)
class Batch:
    """Experts from `first` up to `last` of a parameter: their matrices, as they lie there."""

    parameter: str
    first: int
    last: int
    matrices: tuple[str, ...]
    grid: Grid

    def weights(
        self,
        stored: Tensor,
        recipes: Sequence[Recipe],
        extremes: Sequence[Extremes | None],
        dtype: torch.dtype,
        compiled: bool,
    ) -> Tensor | None:
        """Their weights (experts, out, in) out of the `stored` ones of all experts.

        None where the recipes are not alike, or not by row.
        """
        recipe = Recipe.stacked(recipes)
        if recipe is None:
            return None
        own = stored[self.first : self.last]
        rest = self.grid, dtype, _stacked(extremes)
        return fake_quantize_weight(own.flatten(0, 1), recipe, *rest, compiled=compiled).view_as(
            own
        )


def batches_of(
    matrices: Mapping[str, Matrix], shapes: Mapping[str, MatrixShape], stored: Mapping[str, Tensor]
) -> dict[str, list[Batch]]:
    """Those of each parameter of experts on one grid whose matrices lie one below the other."""
    batches: dict[str, list[Batch]] = {}
    for name, experts in by_expert(matrices).items():
        every = [matrix for own in experts.values() for matrix in own]
        grids = {shapes[matrix.name].grid for matrix in every}
        (grid,) = grids if len(grids) == 1 else (None,)
        if grid is None or any(matrix.transposed for matrix in every):
            continue
        count, step = len(experts), max(1, MOST // stored[name][0].numel())
        batches[name] = [
            Batch(name, start, end, tuple(_names(experts, start, end)), grid)
            for start in range(0, count, step)
            for end in [min(start + step, count)]
        ]
    return batches


def _names(experts: Mapping[int, list[Matrix]], start: int, end: int) -> list[str]:
    numbers = range(start, end)
    return [matrix.name for number in numbers for matrix in in_order(experts[number])]


def _stacked(extremes: Sequence[Extremes | None]) -> Extremes | None:
    pairs = [pair for pair in extremes if pair is not None]
    if not pairs or len(pairs) < len(extremes):
        return None
    low, high = zip(*pairs, strict=True)
    return Extremes(torch.cat(low), torch.cat(high))
