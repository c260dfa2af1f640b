"""Exact products of small integers: int8 codes in, int32 sums out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.tokens import encode_tokens

EXACT_COLUMNS = 1 << 10  # products of int8 are at most 2**14, and float32 counts up to 2**24
_CUDA_ROWS, _CUDA_MULTIPLE = 32, 8  # torch._int_mm on CUDA: more than 16 rows, sides by eights


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of int8 (tokens, in) and (out, in): int32 (tokens, out), exactly.

    Through the int8 instructions where the device has them, else through float32 products that
    are short enough to be exact.
    """
    if left.device.type == "cuda":
        return padded_product(left, right)
    if left.device.type == "cpu" and _multiplies_int8():
        return torch._int_mm(left, right.t())
    return float_product(left, right)


@torch.compiler.assume_constant_result
def _multiplies_int8() -> bool:
    """Whether the CPU has instructions for products of int8; it does not change."""
    return torch.cpu._is_vnni_supported()


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """The same through float32, `EXACT_COLUMNS` at a time."""
    pieces = zip(left.split(EXACT_COLUMNS, 1), right.split(EXACT_COLUMNS, 1), strict=True)
    sums = [torch.mm(a.float(), b.float().t()).to(torch.int32) for a, b in pieces]
    return torch.stack(sums).sum(0, dtype=torch.int32) if len(sums) > 1 else sums[0]


def padded_product(left: Tensor, right: Tensor) -> Tensor:
    """torch._int_mm with zeros added until the sizes are those that CUDA takes."""
    tokens, columns = left.shape
    out = right.shape[0]
    wide = -columns % _CUDA_MULTIPLE
    left = _padded(left, max(0, _CUDA_ROWS - tokens), wide)
    right = _padded(right, -out % _CUDA_MULTIPLE, wide)
    return torch._int_mm(left, right.t())[:tokens, :out]


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With rows and columns of zeros; the very same without any, of which `pad` makes a copy."""
    return pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def centred(codes: Tensor, grid: IntegerGrid) -> Tensor:
    """Codes or zero points as int8: asymmetric ones less 2^(b-1), symmetric ones as they are."""
    return (codes if grid.symmetric else codes - (1 << (grid.bits - 1))).to(torch.int8)


def quantize_tokens(
    values: Tensor, grid: IntegerGrid, clip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic per-token codes of (tokens, channels), on the grid of `fake_quantize_tokens`.

    Returns codes int8 (tokens, channels), scale float32 (tokens, 1) and zero point int32 (tokens,
    1): ``value = scale * (code - zero_point)``.  Codes of 8 bits and their zero points are centred.
    """
    codes, (scale, zero_point) = encode_tokens(values, grid, clip)
    if grid.code_range[1] > torch.iinfo(torch.int8).max:
        codes, zero_point = centred(codes, grid), centred(zero_point, grid)
    return codes.to(torch.int8), scale, zero_point.int()


def affine_product(
    codes: Tensor,
    zero_point: Tensor,
    sums: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    weight_zero_point: Tensor,
) -> Tensor:
    """``sum (x - zx) (w - zw)`` over the columns, int32 (tokens, out).

    x int8 (tokens, in), zx and ``sum (x - zx)`` int32 (tokens, 1); w int8 (out, in) with its row
    sums and zero points int32 (out,) or (1, out):  ``sum x w - zx sum w - zw sum (x - zx)``.
    Exact where in * 4^bits < 2^31; what overflows on the way there wraps back.
    """
    totals = integer_product(codes, weight)
    totals.addcmul_(zero_point, weight_sums, value=-1)
    return totals.addcmul_(sums, weight_zero_point, value=-1)
