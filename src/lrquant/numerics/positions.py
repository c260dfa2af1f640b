"""Where weights lie between the codes of their grids: what codes follow from, and learns.

With a scale that is learned by itself, a weight's own value has no other use than to say which code
is its own: so it is kept as a place between codes, in two bytes, and moved across their borders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.numerics.chunks import row_chunks
from lrquant.numerics.grids.grid import Grid, Scales
from lrquant.numerics.recipe import Recipe, scaled_weight
from lrquant.numerics.weights import Extremes, Quantized, clipped_range, group_extremes

_UNITS = 14  # an offset of 2**14 is the way from a code to the next one
_BORDER = 1 << (_UNITS - 1)
_INSIDE = round(0.48 * (1 << _UNITS))  # near the border, on the side of the code that was chosen
_AT_ONCE = 1 << 24  # elements worked on at once on a GPU, which float32 makes 64 MiB each time
_FARTHEST = (1 << _UNITS) + _BORDER - 1  # a code moves by one at most


@dataclass
class Positions:
    """`offsets` (out, in), int16, from the codes that were `first`, in 2**-14 of a code.

    `zero_point` (out, groups, 1) is of the `grid`.  `gradient` (out, in) is that to the weight,
    after a backward pass.
    """

    offsets: Tensor
    first: Tensor
    zero_point: Tensor
    grid: Grid
    gradient: Tensor | None = None

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

        A weight with the nearest code lies where it is, or at the end of the grid; one with another
        code at the border of the two, on the side of its own.
        """
        scaled = scaled_weight(weight, recipe)
        scales = grid.scales(*clipped_range(extremes or group_extremes(scaled, grid), recipe))
        offsets = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
        for rows in row_chunks(offsets, _AT_ONCE):
            own = Scales(scales.scale[rows], scales.zero_point[rows])
            short = _offsets(scaled[rows], quantized.codes[rows], grid, own)
            offsets[rows] = short.view(offsets[rows].shape)
        return cls(offsets, quantized.codes, scales.zero_point, grid)

    def on(self, device: torch.device, first: Tensor) -> Positions:
        """A copy on a device, where the codes that were `first` are already; no gradient."""
        moved = self.offsets.to(device), first, self.zero_point.to(device)
        return Positions(*moved, self.grid)

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """Codes (rows, in) that the offsets lead to, float32."""
        moved = self.offsets[rows] + _BORDER >> _UNITS
        codes = self.first[rows].to(torch.float32, copy=True)
        return codes.add_(moved).clamp_(*self.grid.code_range)

    def shift(self) -> Tensor:
        """By how much each code has moved (out, in), int8: -1, 0 or 1."""
        shift = torch.empty_like(self.offsets, dtype=torch.int8)
        for rows in row_chunks(shift, _AT_ONCE):
            shift[rows] = self.codes(rows).sub_(self.first[rows])
        return shift

    def weight(self, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in) at a scale (out, groups), in which it is differentiable.

        Its own gradient is kept, by which the positions descend.
        """
        return _PositionedWeight.apply(scale, self, dtype)

    def descend_(self, rate: float) -> None:
        """Move all weights by `rate`, in codes, against the sign of the gradient, which is let go.

        The rate is at most 0.5.
        That is the gradient to the offsets, were there no rounding, but for a positive factor.
        """
        assert self.gradient is not None
        step = round(rate * (1 << _UNITS))
        for rows in row_chunks(self.offsets, _AT_ONCE):
            signs = self.gradient[rows].sign().to(torch.int16)
            moved = self.offsets[rows].sub_(signs, alpha=step)
            moved.clamp_(-_FARTHEST, _FARTHEST)
        self.gradient = None


def _offsets(scaled: Tensor, codes: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """Where values (rows, in) with these codes lie, (rows, groups, group_size) float32."""
    codes = grid.grouped(codes.to(torch.float32, copy=True))
    ratios = grid.grouped(scaled) / scales.scale
    nearest = grid.encode_(grid.grouped(scaled), scales)
    below, above = ((codes + step).clamp_(*grid.code_range) for step in (-1, 1))
    count = above - below
    apart = grid.levels_(above, scales.zero_point) - grid.levels_(below, scales.zero_point)
    own = grid.levels_(codes.clone(), scales.zero_point)
    offsets = (ratios - own) / (apart / count) * (1 << _UNITS)
    offsets.round_().clamp_(-_BORDER + 1, _BORDER - 1)
    return torch.where(nearest == codes, offsets, (nearest - codes).sign() * _INSIDE)


class _PositionedWeight(torch.autograd.Function):
    """The weight, a few rows at a time, and the gradient to its scale by hand."""

    @staticmethod
    def forward(ctx, scale: Tensor, positions: Positions, dtype: torch.dtype) -> Tensor:
        shape, grid = positions.offsets.shape, positions.grid
        weight = torch.empty(shape, dtype=dtype, device=scale.device)
        for rows in row_chunks(weight, _AT_ONCE):
            scales = Scales(scale[rows, :, None], positions.zero_point[rows])
            codes = positions.codes(rows)
            weight[rows] = grid.decode_(_grouped(codes, scales), scales).view_as(codes)
        ctx.positions = positions
        ctx.scale_shape = scale.shape
        return weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        positions = ctx.positions
        positions.gradient = gradient
        to_scale = torch.empty(ctx.scale_shape, device=gradient.device)
        for rows in row_chunks(gradient, _AT_ONCE):
            scales = Scales(to_scale[rows, :, None], positions.zero_point[rows])
            codes = _grouped(positions.codes(rows), scales)
            levels = positions.grid.levels_(codes, scales.zero_point)
            grad = _grouped(gradient[rows].float(), scales)
            to_scale[rows] = torch.linalg.vecdot(grad, levels)
        return to_scale, None, None


def _grouped(matrix: Tensor, scales: Scales) -> Tensor:
    return matrix.view(*scales.scale.shape[:2], -1)
