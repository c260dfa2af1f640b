"""Weights on a grid: codes, the way back, and the gradient that learning descends.

All arithmetic is float32.  Gradients pass straight through the rounding and nowhere else: clipped
elements move the range, and no gradient reaches a zero point.  `reference_weight` is the whole path
in plain autograd, for every grid; integers have the same by hand, several times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lrquant.numerics.chunks import equality_mask, row_chunks, spread_
from lrquant.numerics.compiled import call_compiled
from lrquant.numerics.grids.grid import Grid, Scales
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.recipe import Recipe, scaled_weight

R = TypeVar("R")
_GRADIENTS = ("rows", "columns", "upper", "lower", "offset", "gain")
_TENSORS = (*_GRADIENTS, "shift")


class Extremes(NamedTuple):
    """Smallest and largest value of each group of a weight: (out, groups), float32."""

    low: Tensor
    high: Tensor

    def of_rows(self, rows: slice) -> Extremes:
        """Those of some of the rows."""
        return Extremes(self.low[rows], self.high[rows])


class Quantized(NamedTuple):
    """Codes (out, in), scale and zero point (out, groups) of a weight, all float32."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def group_extremes(weight: Tensor, grid: Grid) -> Extremes:
    """Extremes of a weight (out, in) as it is."""
    grouped = grid.grouped(weight)
    return Extremes(grouped.amin(-1).float(), grouped.amax(-1).float())


def clipped_range(extremes: Extremes, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """What the grids of a weight's groups span, (out, groups, 1): 0 and the clipped extremes."""
    low, high = extremes.low.clamp(max=0), extremes.high.clamp(min=0)
    low = low if recipe.lower is None else low * recipe.lower
    high = high if recipe.upper is None else high * recipe.upper
    return low[..., None], high[..., None]


def stored_scale(scale: Tensor, recipe: Recipe, grid: Grid) -> Tensor:
    """A scale with its gain, float32, rounded as a checkpoint will store it."""
    scale = scale if recipe.gain is None else scale * recipe.gain
    return scale.to(grid.scale_dtype).float()


def quantize_weight(
    weight: Tensor, recipe: Recipe, grid: Grid, extremes: Extremes | None = None
) -> Quantized:
    """Codes and scales of a weight (out, in); `dense` of the recipe changes neither.

    `extremes` are those of the scaled weight, for a caller who knows them already.
    """
    scaled = scaled_weight(weight, recipe)
    extremes = extremes or group_extremes(scaled, grid)
    scales = grid.scales(*clipped_range(extremes, recipe))
    offset = None if recipe.offset is None else grid.grouped(recipe.offset)
    codes = grid.encode_(grid.grouped(scaled), scales, offset).view(weight.shape)
    if recipe.shift is not None:
        codes = codes.add_(recipe.shift).clamp_(*grid.code_range)
    scale = stored_scale(scales.scale.squeeze(-1), recipe, grid)
    return Quantized(codes, scale, scales.zero_point.squeeze(-1))


def dequantize_weight(quantized: Quantized, grid: Grid) -> Tensor:
    """The values that codes of any dtype stand for, (out, in) float32."""
    codes, scale, zero_point = quantized
    grouped = codes.to(torch.float32, copy=True).view(*scale.shape, -1)
    scales = Scales(scale[..., None], zero_point[..., None])
    return grid.decode_(grouped, scales).view(codes.shape)


def fake_quantize_weight(
    weight: Tensor,
    recipe: Recipe,
    grid: Grid,
    dtype: torch.dtype = torch.float32,
    extremes: Extremes | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """A weight (out, in) on its grid and back, in `dtype`; differentiable in all of the recipe.

    Equals `dequantize_weight(quantize_weight(...))`, times ``r1 r2``, bit for bit, also where it is
    `compiled`, which integers can be.
    """
    if not isinstance(grid, IntegerGrid):
        return reference_weight(weight, recipe, grid, dtype)
    before = dtype if recipe.dense is None else torch.float32
    tensors = [getattr(recipe, name) for name in _TENSORS]
    inner = _FakeQuantizedWeight.apply(weight, *tensors, _Job(grid, before, extremes, compiled))
    return with_dense(inner, recipe.dense, dtype)


def with_dense(weight: Tensor, factors: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
    """A de-quantised weight (out, in) times ``r1 r2``, where there are such factors, in `dtype`."""
    return (weight if factors is None else weight * torch.mm(*factors)).to(dtype)


def reference_weight(
    weight: Tensor, recipe: Recipe, grid: Grid, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`fake_quantize_weight` by autograd alone, on any grid."""
    scaled = weight.detach().float()
    scaled = scaled if recipe.rows is None else scaled * recipe.rows[:, None]
    scaled = scaled if recipe.columns is None else scaled * recipe.columns
    grouped = grid.grouped(scaled)
    extremes = Extremes(grouped.amin(-1), grouped.amax(-1))
    scales = grid.scales(*clipped_range(extremes, recipe))
    surrogate = scales.scale * straight_levels(grouped, scales, grid, _moved(recipe, grid))
    surrogate = surrogate if recipe.gain is None else surrogate * recipe.gain[..., None]
    with torch.no_grad():
        value = dequantize_weight(quantize_weight(weight, recipe, grid), grid)
    inner = with_gradient_of(surrogate.view(weight.shape), value)
    return with_dense(inner, recipe.dense, dtype)


def straight_levels(
    grouped: Tensor, scales: Scales, grid: Grid, offset: Tensor | None = None
) -> Tensor:
    """Levels of values (..., n), in units of the scale, whose gradient is that of no rounding."""
    ratios = grouped / scales.scale
    ratios = ratios if offset is None else ratios + offset
    with torch.no_grad():
        codes = grid.encode_(grouped.clone(), scales, offset)
        levels = grid.levels_(codes, scales.zero_point)
        mask = grid.unclipped(ratios, scales.zero_point)
    return levels + mask * (ratios - ratios.detach())


def with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of a `surrogate` of its shape."""
    return _StraightThrough.apply(value, surrogate)


def _moved(recipe: Recipe, grid: Grid) -> Tensor | None:
    """All that moves weights on their way to codes, in units of the scale, in groups.

    With a shift as if it came before the rounding: a gradient sees no difference.
    """
    moves = [each for each in (recipe.offset, recipe.shift) if each is not None]
    return grid.grouped(sum(moves[1:], moves[0])) if moves else None


class _StraightThrough(torch.autograd.Function):
    """A value, with the gradient of another one."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.float()


@dataclass(frozen=True)
class _Job:
    """What of a fake quantisation is no tensor that learns."""

    grid: IntegerGrid
    dtype: torch.dtype
    extremes: Extremes | None
    compiled: bool = False

    def extremes_of(self, rows: slice) -> Extremes | None:
        return None if self.extremes is None else self.extremes.of_rows(rows)


class _FakeQuantizedWeight(torch.autograd.Function):
    """The path of integers, a few rows at a time, with its gradient by hand."""

    @staticmethod
    def forward(ctx, weight: Tensor, *rest):
        *tensors, job = rest
        recipe = Recipe(**dict(zip(_TENSORS, tensors, strict=True)))
        ctx.save_for_backward(weight, *tensors)
        ctx.job = job
        if job.compiled:
            return call_compiled(_round_trip, weight, recipe, job.grid, job.dtype, job.extremes)
        output = torch.empty(weight.shape, dtype=job.dtype, device=weight.device)
        for rows in row_chunks(weight):
            own = recipe.of_rows(rows), job.grid, job.dtype, job.extremes_of(rows)
            output[rows] = _round_trip(weight[rows], *own)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, *tensors = ctx.saved_tensors
        recipe = Recipe(**dict(zip(_TENSORS, tensors, strict=True)))
        needed = dict(zip(_TENSORS, ctx.needs_input_grad[1:-1], strict=True))
        wanted = tuple(name for name in _GRADIENTS if needed[name])
        whole = call_compiled if ctx.job.compiled else _called
        gradients = whole(_gradients, weight, recipe, ctx.job, gradient, wanted)
        return None, *(gradients.get(name) for name in _TENSORS), None


def _called(function: Callable[..., R], *arguments: object) -> R:
    return function(*arguments)


def _round_trip(
    weight: Tensor, recipe: Recipe, grid: IntegerGrid, dtype: torch.dtype, extremes: Extremes | None
) -> Tensor:
    """A weight (out, in) on its grid and back, without its gradient."""
    codes, scale, zero_point = quantize_weight(weight, recipe, grid, extremes)
    scales = Scales(scale[..., None], zero_point[..., None])
    return grid.decode_(grid.grouped(codes), scales).view_as(codes).to(dtype)


def _gradients(
    weight: Tensor, recipe: Recipe, job: _Job, gradient: Tensor, wanted: tuple[str, ...]
) -> dict[str, Tensor]:
    """Those of the recipe's tensors that are wanted, from that to the weight on its grid."""
    gradients = {}
    for name in wanted:
        empty = torch.zeros_like if name == "columns" else torch.empty_like
        gradients[name] = empty(getattr(recipe, name))
    for rows in [slice(0, len(weight))] if job.compiled else row_chunks(weight):
        own = recipe.of_rows(rows)
        _row_gradients(weight[rows], own, job, rows, gradient[rows].float(), gradients)
    return gradients


def _row_gradients(
    weight: Tensor,
    recipe: Recipe,
    job: _Job,
    rows: slice,
    gradient: Tensor,
    gradients: dict[str, Tensor],
) -> None:
    """Fill in, of `gradients`, those of some rows; that to the columns is added up."""
    grid = job.grid
    source = weight.float()
    grouped = grid.grouped(scaled_weight(source, recipe))
    extremes = job.extremes_of(rows) or group_extremes(grouped.view(source.shape), grid)
    minimum, maximum = extremes.low[..., None], extremes.high[..., None]
    scaling = "rows" in gradients or "columns" in gradients
    if scaling:
        at_low, at_high = equality_mask(grouped, minimum), equality_mask(grouped, maximum)
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    strength_low = 1.0 if recipe.lower is None else recipe.lower[..., None]
    strength_high = 1.0 if recipe.upper is None else recipe.upper[..., None]
    low, high = minimum * strength_low, maximum * strength_high
    scales = grid.scales(low, high)
    offset = _moved(recipe, grid)
    grad = grid.grouped(gradient)
    to_scale, to_values, to_levels = grid.round_trip_gradient(grouped, grad, scales, offset)
    if "gain" in gradients:
        gradients["gain"][rows] = to_levels.mul_(scales.scale).squeeze(-1)
    if recipe.gain is not None:
        to_scale.mul_(recipe.gain[..., None])
        to_values.mul_(recipe.gain[..., None])
    if "offset" in gradients:
        gradients["offset"][rows] = (to_values * scales.scale).view(source.shape)
    to_low, to_high = grid.range_gradient(to_scale, low, high, scales)
    if "lower" in gradients:
        gradients["lower"][rows] = (to_low * minimum).squeeze(-1)
    if "upper" in gradients:
        gradients["upper"][rows] = (to_high * maximum).squeeze(-1)
    if not scaling:
        return
    spread_(to_values, at_low, to_low.mul_(strength_low).mul_(minimum < 0))
    spread_(to_values, at_high, to_high.mul_(strength_high).mul_(maximum > 0))
    product = to_values.view(source.shape).mul_(source)
    if "rows" in gradients:
        across = product if recipe.columns is None else product * recipe.columns
        gradients["rows"][rows] = across.sum(-1)
    if "columns" in gradients:
        if recipe.rows is not None:
            product.mul_(recipe.rows[:, None])
        gradients["columns"].add_(product.sum(0))
