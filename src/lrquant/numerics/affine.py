"""The affine quantizer: ranges, scales, zero points, codes, and its straight-through gradient.

Symbols follow OmniQuant (ICLR 2024, eq. 2) and LRQuant (ACL 2024): ``h`` is the scale, ``z`` the
zero point, ``Q = 2**bits - 1``.  All arithmetic is float32.  Gradients pass straight through the
rounding and nowhere else: clipped elements move the range, and no gradient reaches ``z``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-5
_CHUNK_ELEMENTS = 1 << 17  # elements worked on at once on a CPU: 512 KiB of float32 stay in cache


Extremes = tuple[Tensor, Tensor]


class Affine(NamedTuple):
    """A grid: ``value = scale * (code - zero_point)`` with code in [code_min, code_max]."""

    scale: Tensor
    zero_point: Tensor
    code_min: int
    code_max: int


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code: [0, 2^b - 1], or [-2^(b-1), 2^(b-1) - 1] for a symmetric grid."""
    if symmetric:
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


def affine_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Affine:
    """The grid that spans [low, high], any shape, float32; requires ``low <= 0 <= high``.

    Asymmetric: ``h = (high - low) / Q``, ``z = round(-low / h)``.  Symmetric: ``h = 2 max(|low|,
    high) / Q`` and ``z = 0``, the grid of compressed-tensors.  ``h`` is at least 1e-5.
    """
    code_min, code_max = code_range(bits, symmetric)
    levels = code_max - code_min
    if symmetric:
        # their order of operations: the largest value lies exactly between two codes
        scale = (torch.maximum(-low, high) / (levels / 2)).clamp_(min=SMALLEST_SCALE)
        return Affine(scale, torch.zeros_like(scale), code_min, code_max)
    scale = ((high - low) / levels).clamp_(min=SMALLEST_SCALE)
    zero_point = torch.round(-low / scale).clamp_(code_min, code_max)
    return Affine(scale, zero_point, code_min, code_max)


def token_grid(values: Tensor, bits: int, symmetric: bool) -> tuple[Affine, Extremes]:
    """The grid of each row of float32 values (tokens, channels), and its extremes (tokens, 1).

    The grid spans the extremes and 0.
    """
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return affine_grid(low.clamp(max=0), high.clamp(min=0), bits, symmetric), (low, high)


def encode_(values: Tensor, grid: Affine) -> Tensor:
    """Overwrite float32 values (..., n) with their codes on a grid of shape (..., 1)."""
    values.div_(grid.scale).round_().add_(grid.zero_point)
    return values.clamp_(grid.code_min, grid.code_max)


def decode_(codes: Tensor, zero_point: Tensor, scale: Tensor) -> Tensor:
    """Overwrite float32 codes (..., n) with ``scale * (code - zero_point)``."""
    return codes.sub_(zero_point).mul_(scale)


def row_chunks(matrix: Tensor) -> list[slice]:
    """Slices of rows that keep a chunk in a CPU's cache; one slice elsewhere."""
    rows, columns = matrix.shape
    on_cpu = matrix.device.type == "cpu"
    step = max(1, _CHUNK_ELEMENTS // columns) if on_cpu else rows
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def fake_quantize_tokens(
    values: Tensor, bits: int, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Dynamic per-token quantization of (..., channels): each last axis on the grid of its range.

    The range always contains 0.  Returns `dtype`, same shape; differentiable in `values`.
    """
    flat = values.reshape(-1, values.shape[-1])
    return _FakeQuantizeTokens.apply(flat, bits, symmetric, dtype).view(values.shape)


def effective_weight(
    weight: Tensor, row_factor: Tensor | None, column_factor: Tensor | None
) -> Tensor:
    """``W * row_factor[:, None] * column_factor`` as a new float32 tensor (out, in)."""
    result = weight.to(torch.float32, copy=True)
    if row_factor is not None:
        result.mul_(row_factor[:, None])
    if column_factor is not None:
        result.mul_(column_factor)
    return result


def group_extremes(weight: Tensor, group_size: int) -> Extremes:
    """Smallest and largest value of each group of a weight (out, in): (out, groups), float32."""
    grouped = weight.view(weight.shape[0], -1, group_size)
    return grouped.amin(-1).float(), grouped.amax(-1).float()


def weight_grid(
    extremes: Extremes, upper: Tensor | None, lower: Tensor | None, bits: int, symmetric: bool
) -> Affine:
    """The grids (out, groups, 1) of a weight's groups, each on its clipped range.

    ``high = upper * max(W)`` and ``low = lower * min(W)`` with clipping strengths (out, groups) in
    (0, 1], or no clipping where they are None; the range always contains 0.
    """
    low, high = extremes[0].clamp(max=0), extremes[1].clamp(min=0)
    low = low if lower is None else low * lower
    high = high if upper is None else high * upper
    return affine_grid(low[..., None], high[..., None], bits, symmetric)


def quantize_weight(
    weight: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    upper: Tensor | None,
    lower: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    extremes: Extremes | None = None,
    gain: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in) float32, scale and zero point (out, groups) of a weight (out, in).

    `extremes` are those of the scaled weight, for a caller who knows them already.  `gain`
    (out, groups) multiplies the scale that is returned and changes no code; that scale is rounded
    to `scale_dtype`, in which a checkpoint stores it.
    """
    effective = effective_weight(weight, row_factor, column_factor)
    grouped = effective.view(weight.shape[0], -1, group_size)
    extremes = extremes or group_extremes(effective, group_size)
    grid = weight_grid(extremes, upper, lower, bits, symmetric)
    codes = encode_(grouped, grid).view(weight.shape)
    scale = grid.scale.squeeze(-1)
    scale = scale if gain is None else scale * gain
    return codes, scale.to(scale_dtype).float(), grid.zero_point.squeeze(-1)


def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``scale * (code - zero_point)`` in float32; codes (out, in), scale and zero (out, groups)."""
    grouped = codes.to(torch.float32, copy=True).view(*scale.shape, -1)
    return decode_(grouped, zero_point[..., None], scale[..., None]).view(codes.shape)


def fake_quantize_weight(
    weight: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    upper: Tensor | None,
    lower: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float32,
    extremes: Extremes | None = None,
    gain: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Quantise and de-quantise ``row_factor * W * column_factor``: (out, in) in `dtype`.

    Differentiable in the factors (out,) and (in,), in the clipping strengths and in the `gain` of
    the de-quantisation scale (out, groups), not in `weight`.  Equals
    `dequantize_weight(*quantize_weight(...))` bit for bit.
    """
    settings = bits, group_size, symmetric, dtype, extremes, scale_dtype
    return _FakeQuantizeWeight.apply(
        weight, row_factor, column_factor, upper, lower, gain, settings
    )


def _round_trip_gradient(
    values: Tensor, gradient: Tensor, grid: Affine
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through gradients of ``h * (clamp(round(v/h) + z) - z)``.

    Returns those to h, shape (..., 1), and to the values, and ``sum g (code - z)``, shape (..., 1).
    With m the mask of values that are not clipped: ``dv = g m`` and
    ``dh = sum g ((code - z) - m v / h)``.  Overwrites `values`.
    """
    ratio = values.div_(grid.scale)
    unclamped = torch.round(ratio).add_(grid.zero_point)
    codes = unclamped.clamp(grid.code_min, grid.code_max)
    passed = torch.eq(codes, unclamped, out=unclamped)
    level_gradient = torch.linalg.vecdot(codes.sub_(grid.zero_point), gradient).unsqueeze(-1)
    ratio.mul_(passed)
    scale_gradient = level_gradient - torch.linalg.vecdot(ratio, gradient).unsqueeze(-1)
    return scale_gradient, passed.mul_(gradient), level_gradient


def _spread_(target: Tensor, where: Tensor, gradient: Tensor) -> None:
    """Add gradient (..., 1), shared evenly by the ones of the mask `where`, as torch.amax does."""
    target.addcmul_(where, gradient / where.sum(-1, keepdim=True))


def _range_gradient(
    scale_gradient: Tensor, low: Tensor, high: Tensor, grid: Affine, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to low and high from the gradient to the scale, all (..., 1)."""
    per_level = scale_gradient.div(grid.code_max - grid.code_min)
    per_level.mul_(grid.scale > SMALLEST_SCALE)
    if symmetric:
        by_high = high >= -low
        return per_level.mul(-2.0).mul_(~by_high), per_level.mul(2.0).mul_(by_high)
    return -per_level, per_level


class _FakeQuantizeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Tensor:
        output = torch.empty(values.shape, dtype=dtype, device=values.device)
        for rows in row_chunks(values):
            chunk = values[rows].to(torch.float32, copy=True)
            grid, _ = token_grid(chunk, bits, symmetric)
            output[rows] = decode_(encode_(chunk, grid), grid.zero_point, grid.scale)
        ctx.save_for_backward(values)
        ctx.settings = bits, symmetric
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (values,) = ctx.saved_tensors
        bits, symmetric = ctx.settings
        result = torch.empty_like(values)
        for rows in row_chunks(values):
            chunk = values[rows].to(torch.float32, copy=True)
            grid, (low, high) = token_grid(chunk, bits, symmetric)
            at_low, at_high = _equal(chunk, low), _equal(chunk, high)
            to_scale, to_values, _ = _round_trip_gradient(chunk, gradient[rows].float(), grid)
            to_low, to_high = _range_gradient(to_scale, low, high, grid, symmetric)
            _spread_(to_values, at_low, to_low.mul_(low < 0))
            _spread_(to_values, at_high, to_high.mul_(high > 0))
            result[rows] = to_values
        return result, None, None, None


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        row_factor: Tensor | None,
        column_factor: Tensor | None,
        upper: Tensor | None,
        lower: Tensor | None,
        gain: Tensor | None,
        settings: tuple[int, int, bool, torch.dtype, Extremes | None, torch.dtype],
    ) -> Tensor:
        bits, group_size, symmetric, dtype, extremes, scale_dtype = settings
        output = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows in row_chunks(weight):
            codes, scale, zero_point = quantize_weight(
                weight[rows],
                _rows(row_factor, rows),
                column_factor,
                _rows(upper, rows),
                _rows(lower, rows),
                bits,
                group_size,
                symmetric,
                _extreme_rows(extremes, rows),
                _rows(gain, rows),
                scale_dtype,
            )
            grouped = codes.view(*scale.shape, group_size)
            output[rows] = decode_(grouped, zero_point[..., None], scale[..., None]).view_as(codes)
        ctx.save_for_backward(weight, row_factor, column_factor, upper, lower, gain)
        ctx.settings = settings
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, row_factor, column_factor, upper, lower, gain = ctx.saved_tensors
        bits, group_size, symmetric, _, known_extremes, _ = ctx.settings
        _, need_row, need_column, need_upper, need_lower, need_gain = ctx.needs_input_grad[:6]
        to_row: Any = torch.empty_like(row_factor) if need_row else None
        to_column: Any = torch.zeros_like(column_factor) if need_column else None
        to_upper: Any = torch.empty_like(upper) if need_upper else None
        to_lower: Any = torch.empty_like(lower) if need_lower else None
        to_gain: Any = torch.empty_like(gain) if need_gain else None

        for rows in row_chunks(weight):
            source = weight[rows].float()
            chunk_row: Any = _rows(row_factor, rows)
            grouped = effective_weight(source, chunk_row, column_factor)
            grouped = grouped.view(grouped.shape[0], -1, group_size)
            extremes = _extreme_rows(known_extremes, rows) or group_extremes(
                grouped.view(source.shape), group_size
            )
            minimum, maximum = extremes[0][..., None], extremes[1][..., None]
            if need_row or need_column:
                at_low, at_high = _equal(grouped, minimum), _equal(grouped, maximum)
            minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
            strength_low = 1.0 if lower is None else lower[rows][..., None]
            strength_high = 1.0 if upper is None else upper[rows][..., None]
            low, high = minimum * strength_low, maximum * strength_high
            grid = affine_grid(low, high, bits, symmetric)
            grad = gradient[rows].float().view(grouped.shape)
            to_scale, to_values, to_levels = _round_trip_gradient(grouped, grad, grid)
            if need_gain:
                to_gain[rows] = to_levels.mul_(grid.scale).squeeze(-1)
            if gain is not None:
                to_scale.mul_(gain[rows][..., None])
                to_values.mul_(gain[rows][..., None])
            to_low, to_high = _range_gradient(to_scale, low, high, grid, symmetric)
            if need_lower:
                to_lower[rows] = (to_low * minimum).squeeze(-1)
            if need_upper:
                to_upper[rows] = (to_high * maximum).squeeze(-1)
            if not (need_row or need_column):
                continue
            _spread_(to_values, at_low, to_low.mul_(strength_low).mul_(minimum < 0))
            _spread_(to_values, at_high, to_high.mul_(strength_high).mul_(maximum > 0))
            product = to_values.view(source.shape).mul_(source)
            if need_row:
                across = product if column_factor is None else product * column_factor
                to_row[rows] = across.sum(-1)
            if need_column:
                if row_factor is not None:
                    product.mul_(chunk_row[:, None])
                to_column.add_(product.sum(0))
        return None, to_row, to_column, to_upper, to_lower, to_gain, None


def _equal(values: Tensor, extremes: Tensor) -> Tensor:
    """Float mask of values == extremes (several times faster on a CPU than a boolean one)."""
    return torch.eq(values, extremes, out=torch.empty_like(values))


def _extreme_rows(extremes: Extremes | None, rows: slice) -> Extremes | None:
    return None if extremes is None else (extremes[0][rows], extremes[1][rows])


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
