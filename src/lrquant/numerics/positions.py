"""Where weights lie on their grids, in units of their scales: what codes follow from, and learns.

With a scale that is learned by itself, a weight's own value has no other use than to say which code
is its own: so it is kept as a place on the grid, and moved across the borders between codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.numerics.chunks import row_chunks
from lrquant.numerics.grids.grid import Grid, Scales
from lrquant.numerics.recipe import Recipe, scaled_weight
from lrquant.numerics.weights import (
    Extremes,
    Quantized,
    clipped_range,
    group_extremes,
)

_BEYOND = 0.5  # how far outside the grid a position may be
_INSIDE = 0.02  # of the way between two codes, from their border to the one that was chosen


@dataclass(frozen=True)
class Positions:
    """Positions `values` (out, in), float32, and the `codes` (out, in) that they lead to.

    `first` are the codes that they began at, from which a code moves by one at most; `zero_point`
    (out, groups, 1) is of the `grid`.
    """

    values: Tensor
    codes: Tensor
    first: Tensor
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
        ends = [torch.full_like(zero_point, end) for end in grid.code_range]
        low, high = (grid.levels_(end, zero_point) for end in ends)
        start = torch.where(own == other, ratios, border).clamp_(low - _BEYOND, high + _BEYOND)
        led = grid.encode_(start.clone(), Scales(torch.ones_like(zero_point), zero_point))
        values = torch.where(led == chosen, start, own)
        first = quantized.codes
        return cls(values.view(weight.shape), first.clone(), first, zero_point, grid)

    @torch.no_grad()
    def round_(self) -> None:
        """Bring the codes to where the values are now."""
        for rows in row_chunks(self.values):
            zero_point = self.zero_point[rows]
            one = Scales(torch.ones_like(zero_point), zero_point)
            codes = self.grid.encode_(self.grid.grouped(self.values[rows].detach().clone()), one)
            first = self.grid.grouped(self.first[rows].to(torch.float32, copy=True))
            codes.sub_(first).clamp_(-1, 1).add_(first)
            self.codes[rows] = codes.view(self.values[rows].shape).to(self.codes.dtype)

    def shift(self) -> Tensor:
        """By how much each code has moved (out, in), int8: -1, 0 or 1."""
        return (self.codes.to(torch.int16) - self.first.to(torch.int16)).to(torch.int8)

    def weight(self, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in) at a scale (out, groups), differentiable in it and in the values.

        The gradient is that of no rounding.
        """
        return _PositionedWeight.apply(self.values, scale, self, dtype)


class _PositionedWeight(torch.autograd.Function):
    """The weight, a few rows at a time, and its gradient by hand."""

    @staticmethod
    def forward(
        ctx, values: Tensor, scale: Tensor, positions: Positions, dtype: torch.dtype
    ) -> Tensor:
        weight = torch.empty(values.shape, dtype=dtype, device=values.device)
        for rows in row_chunks(weight):
            scales = Scales(scale[rows, :, None], positions.zero_point[rows])
            codes = positions.codes[rows].to(torch.float32, copy=True)
            weight[rows] = positions.grid.decode_(_grouped(codes, scales), scales).view_as(codes)
        ctx.save_for_backward(scale)
        ctx.positions = positions
        return weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        positions, (scale,) = ctx.positions, ctx.saved_tensors
        to_values = torch.empty(gradient.shape, device=gradient.device)
        to_scale = torch.empty_like(scale)
        for rows in row_chunks(to_values):
            scales = Scales(scale[rows, :, None], positions.zero_point[rows])
            codes = positions.codes[rows].to(torch.float32, copy=True)
            levels = positions.grid.levels_(_grouped(codes, scales), scales.zero_point)
            grad = _grouped(gradient[rows].float(), scales)
            to_scale[rows] = torch.linalg.vecdot(grad, levels)
            to_values[rows] = (grad * scales.scale).view_as(codes)
        return to_values, to_scale, None, None


def _grouped(matrix: Tensor, scales: Scales) -> Tensor:
    return matrix.view(*scales.scale.shape[:2], -1)
