"""Activations on a grid: dynamic scales, one a token, or one a group of a token's channels."""

from __future__ import annotations

import torch
from torch import Tensor

from lrquant.numerics.chunks import equality_mask, row_chunks, spread_
from lrquant.numerics.grids.grid import Grid, Scales
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.weights import Extremes, straight_levels, with_gradient_of


def token_scales(values: Tensor, grid: Grid, clip: Tensor | None = None) -> tuple[Scales, Extremes]:
    """The scales of each row of float32 values (tokens, channels), and its extremes (tokens, 1).

    The grid spans 0 and the extremes, these times `clip`, (lower, upper), each in (0, 1].
    """
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    below, above = low.clamp(max=0), high.clamp(min=0)
    if clip is not None:
        below, above = below * clip[0], above * clip[1]
    return grid.scales(below, above), Extremes(low, high)


def fake_quantize_tokens(
    values: Tensor, grid: Grid, dtype: torch.dtype = torch.float32, clip: Tensor | None = None
) -> Tensor:
    """Values (..., channels) on the grid of each token's, or token's group's, range and back.

    The range always contains 0.  Returns `dtype`, same shape; differentiable in `values` and in
    `clip`, how much of the smallest and of the largest value it spans, (2,) float32.
    """
    flat = values.reshape(-1, grid.size(values.shape[-1]))
    if isinstance(grid, IntegerGrid):
        return _FakeQuantizedTokens.apply(flat, clip, grid, dtype).view(values.shape)
    return reference_tokens(flat, grid, dtype, clip).view(values.shape)


def reference_tokens(
    values: Tensor, grid: Grid, dtype: torch.dtype, clip: Tensor | None = None
) -> Tensor:
    """By autograd alone, on any grid: values (tokens, channels)."""
    values = values.float()
    scales, _ = token_scales(values, grid, clip)
    surrogate = scales.scale * straight_levels(values, scales, grid)
    with torch.no_grad():
        value = grid.decode_(grid.encode_(values.clone(), scales), scales).to(dtype)
    return with_gradient_of(surrogate, value)


class _FakeQuantizedTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, values: Tensor, clip: Tensor | None, grid: IntegerGrid, dtype: torch.dtype
    ) -> Tensor:
        output = torch.empty(values.shape, dtype=dtype, device=values.device)
        for rows in row_chunks(values):
            chunk = values[rows].to(torch.float32, copy=True)
            scales, _ = token_scales(chunk, grid, clip)
            output[rows] = grid.decode_(grid.encode_(chunk, scales), scales)
        ctx.save_for_backward(values, clip)
        ctx.grid = grid
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        values, clip = ctx.saved_tensors
        grid = ctx.grid
        result = torch.empty_like(values)
        to_clip = None if clip is None else torch.zeros_like(clip)
        for rows in row_chunks(values):
            chunk = values[rows].to(torch.float32, copy=True)
            scales, (low, high) = token_scales(chunk, grid, clip)
            at_low, at_high = equality_mask(chunk, low), equality_mask(chunk, high)
            to_scale, to_values, _ = grid.round_trip_gradient(chunk, gradient[rows].float(), scales)
            below, above = low.clamp(max=0), high.clamp(min=0)
            strengths = (1.0, 1.0) if clip is None else (clip[0], clip[1])
            spanned = below * strengths[0], above * strengths[1]
            to_low, to_high = grid.range_gradient(to_scale, *spanned, scales)
            if to_clip is not None:
                to_clip += torch.stack([(to_low * below).sum(), (to_high * above).sum()])
            spread_(to_values, at_low, to_low.mul_(strengths[0]).mul_(low < 0))
            spread_(to_values, at_high, to_high.mul_(strengths[1]).mul_(high > 0))
            result[rows] = to_values
        return result, to_clip, None, None
