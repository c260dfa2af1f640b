"""Activations on a grid: dynamic scales, one a token, or one a group of a token's channels."""

from __future__ import annotations

import torch
from torch import Tensor

from lrquant.numerics.chunks import equality_mask, row_chunks, spread_
from lrquant.numerics.grids.grid import Grid, Scales
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.weights import Extremes, straight_levels, with_gradient_of


def token_scales(values: Tensor, grid: Grid) -> tuple[Scales, Extremes]:
    """The scales of each row of float32 values (tokens, channels), and its extremes (tokens, 1).

    The grid spans the extremes and 0.
    """
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return grid.scales(low.clamp(max=0), high.clamp(min=0)), Extremes(low, high)


def fake_quantize_tokens(values: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values (..., channels) on the grid of each token's, or token's group's, range and back.

    The range always contains 0.  Returns `dtype`, same shape; differentiable in `values`.
    """
    flat = values.reshape(-1, grid.size(values.shape[-1]))
    if isinstance(grid, IntegerGrid):
        return _FakeQuantizedTokens.apply(flat, grid, dtype).view(values.shape)
    return _reference_tokens(flat, grid, dtype).view(values.shape)


def _reference_tokens(values: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """By autograd alone, on any grid."""
    values = values.float()
    scales, _ = token_scales(values, grid)
    surrogate = scales.scale * straight_levels(values, scales, grid)
    with torch.no_grad():
        value = grid.decode_(grid.encode_(values.clone(), scales), scales).to(dtype)
    return with_gradient_of(surrogate, value)


class _FakeQuantizedTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, grid: IntegerGrid, dtype: torch.dtype) -> Tensor:
        output = torch.empty(values.shape, dtype=dtype, device=values.device)
        for rows in row_chunks(values):
            chunk = values[rows].to(torch.float32, copy=True)
            scales, _ = token_scales(chunk, grid)
            output[rows] = grid.decode_(grid.encode_(chunk, scales), scales)
        ctx.save_for_backward(values)
        ctx.grid = grid
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (values,) = ctx.saved_tensors
        grid = ctx.grid
        result = torch.empty_like(values)
        for rows in row_chunks(values):
            chunk = values[rows].to(torch.float32, copy=True)
            scales, (low, high) = token_scales(chunk, grid)
            at_low, at_high = equality_mask(chunk, low), equality_mask(chunk, high)
            to_scale, to_values, _ = grid.round_trip_gradient(chunk, gradient[rows].float(), scales)
            to_low, to_high = grid.range_gradient(to_scale, low, high, scales)
            spread_(to_values, at_low, to_low.mul_(low < 0))
            spread_(to_values, at_high, to_high.mul_(high > 0))
            result[rows] = to_values
        return result, None, None
