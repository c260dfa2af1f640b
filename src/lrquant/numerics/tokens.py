"""Activations on a grid: dynamic scales, one a token, or one a group of a token's channels."""

from __future__ import annotations

import torch
from torch import Tensor

from lrquant.numerics.chunks import equality_mask, row_chunks, spread_
from lrquant.numerics.compiled import call_compiled
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


def encode_tokens(values: Tensor, grid: Grid, clip: Tensor | None = None) -> tuple[Tensor, Scales]:
    """Codes float32 of values (tokens, channels), and the scales of each token."""
    codes = values.to(torch.float32, copy=True)
    scales, _ = token_scales(codes, grid, clip)
    return grid.encode_(codes, scales), scales


def fake_quantize_tokens(
    values: Tensor,
    grid: Grid,
    dtype: torch.dtype = torch.float32,
    clip: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """Values (..., channels) on the grid of each token's, or token's group's, range and back.

    The range always contains 0.  Returns `dtype`, same shape; differentiable in `values` and in
    `clip`, how much of the smallest and of the largest value it spans, (2,) float32.  The same bit
    for bit where it is `compiled`, which integers can be.
    """
    flat = values.reshape(-1, grid.size(values.shape[-1]))
    if isinstance(grid, IntegerGrid):
        quantized = _FakeQuantizedTokens.apply if torch.is_grad_enabled() else _round_trips
        return quantized(flat, clip, grid, dtype, compiled).view(values.shape)
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
    """The path of integers, a few tokens at a time, with its gradient by hand."""

    @staticmethod
    def forward(
        ctx,
        values: Tensor,
        clip: Tensor | None,
        grid: IntegerGrid,
        dtype: torch.dtype,
        compiled: bool,
    ) -> Tensor:
        ctx.save_for_backward(values, clip)
        ctx.grid, ctx.compiled = grid, compiled
        return _round_trips(values, clip, grid, dtype, compiled)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        values, clip = ctx.saved_tensors
        rest = clip, ctx.grid, gradient
        if ctx.compiled:
            result, to_clip = call_compiled(_gradients, values, *rest, by_size=False)
            return result, to_clip, None, None, None
        result = torch.empty_like(values)
        to_clip = None if clip is None else torch.zeros_like(clip)
        for rows in row_chunks(values):
            result[rows], own = _gradients(values[rows], clip, ctx.grid, gradient[rows])
            if to_clip is not None and own is not None:
                to_clip += own
        return result, to_clip, None, None, None


def _round_trips(
    values: Tensor, clip: Tensor | None, grid: IntegerGrid, dtype: torch.dtype, compiled: bool
) -> Tensor:
    """Values (tokens, channels) on their grids and back, a few tokens at a time."""
    if compiled:
        return call_compiled(_round_trip, values, clip, grid, dtype, by_size=False)
    chunks = row_chunks(values)
    if len(chunks) == 1:
        return _round_trip(values, clip, grid, dtype)
    output = torch.empty(values.shape, dtype=dtype, device=values.device)
    for rows in chunks:
        output[rows] = _round_trip(values[rows], clip, grid, dtype)
    return output


def _round_trip(
    values: Tensor, clip: Tensor | None, grid: IntegerGrid, dtype: torch.dtype
) -> Tensor:
    """Values (tokens, channels) on their grids and back, without their gradient."""
    codes, scales = encode_tokens(values, grid, clip)
    return grid.decode_(codes, scales).to(dtype)


def _gradients(
    values: Tensor, clip: Tensor | None, grid: IntegerGrid, gradient: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Those to values (tokens, channels) and to the clipping."""
    chunk = values.to(torch.float32, copy=True)
    scales, (low, high) = token_scales(chunk, grid, clip)
    at_low, at_high = equality_mask(chunk, low), equality_mask(chunk, high)
    to_scale, to_values, _ = grid.round_trip_gradient(chunk, gradient.float(), scales)
    below, above = low.clamp(max=0), high.clamp(min=0)
    strengths = (1.0, 1.0) if clip is None else (clip[0], clip[1])
    to_low, to_high = grid.range_gradient(
        to_scale, below * strengths[0], above * strengths[1], scales
    )
    to_clip = None
    if clip is not None:
        to_clip = torch.stack([(to_low * below).sum(), (to_high * above).sum()])
    spread_(to_values, at_low, to_low.mul_(strengths[0]).mul_(low < 0))
    spread_(to_values, at_high, to_high.mul_(strengths[1]).mul_(high > 0))
    return to_values.to(values.dtype), to_clip
