"""Where weights lie on their grids, in units of their scales: what codes follow from, and learns.

With a scale that is learned by itself, a weight's own value has no other use than to say which code
is its own: so it is kept as a place on the grid, and moved across the borders between codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.numerics.grids.grid import Grid, Scales
from lrquant.numerics.recipe import Recipe, scaled_weight
from lrquant.numerics.weights import (
    Extremes,
    Quantized,
    clipped_range,
    group_extremes,
    with_gradient_of,
)

_BEYOND = 0.5  # how far outside the grid a position may be
_INSIDE = 0.02  # of the way between two codes, from their border to the one that was chosen


@dataclass(frozen=True)
class Positions:
    """Positions `values` (out, in), float32, and the `codes` that they began at.

    A code moves by one at most.  `zero_point` (out, groups, 1) is of the grid.
    """

    values: Tensor
    codes: Tensor
    zero_point: Tensor
    grid: Grid

    @classmethod
    def of(
        cls,
        weight: Tensor,
        recipe: Recipe,
        grid: Grid,
        quantized: Quantized,
        extremes: Extremes | None = None,
    ) -> Positions:
        """Those of a weight (out, in), which lead to the codes that it was `quantized` to.

        A weight with the nearest code lies where it is, one with another code at the border of the
        two, on the side of its own.
        """
        scaled = scaled_weight(weight, recipe)
        scales = grid.scales(*clipped_range(extremes or group_extremes(scaled, grid), recipe))
        zero_point = scales.zero_point
        chosen = grid.grouped(quantized.codes.to(torch.float32, copy=True))
        ratios = grid.grouped(scaled) / scales.scale
        nearest = grid.encode_(grid.grouped(scaled), scales)
        own = grid.levels_(chosen.clone(), zero_point)
        other = grid.levels_(nearest, zero_point)
        border = (own + other) / 2 + _INSIDE * (own - other)
        start = cls(torch.where(own == other, ratios, border), chosen, zero_point, grid)
        start.constrain_()
        led = grid.encode_(start.values.clone(), start._one)
        values = torch.where(led == chosen, start.values, own)
        return cls(values.view(weight.shape), quantized.codes, zero_point, grid)

    @property
    def _one(self) -> Scales:
        return Scales(torch.ones_like(self.zero_point), self.zero_point)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Keep all positions near the grid."""
        ends = [torch.full_like(self.zero_point, end) for end in self.grid.code_range]
        low, high = (self.grid.levels_(end, self.zero_point) for end in ends)
        grouped = self.values.view(*low.shape[:2], -1)
        grouped.clamp_(low - _BEYOND, high + _BEYOND)

    @torch.no_grad()
    def shift(self) -> Tensor:
        """By how much each code has moved (out, in), int8: -1, 0 or 1."""
        codes = self.grid.encode_(self.grid.grouped(self.values.detach().clone()), self._one)
        moved = codes.view(self.codes.shape).sub_(self.codes)
        return moved.clamp_(-1, 1).to(torch.int8)

    def weight(self, scale: Tensor) -> Tensor:
        """The weight (out, in) at a scale (out, groups), differentiable in it and in the values."""
        with torch.no_grad():
            codes = self.codes + self.shift().float()
            levels = self.grid.levels_(self.grid.grouped(codes), self.zero_point)
        levels = with_gradient_of(self.grid.grouped(self.values), levels)
        return (levels * scale[..., None]).view(self.codes.shape)
