"""Matrices a few rows at a time, and what such pieces share."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 17  # elements worked on at once on a CPU: 512 KiB of float32 stay in cache


def row_chunks(matrix: Tensor, elsewhere: int | None = None) -> list[slice]:
    """Slices of rows that keep a chunk in a CPU's cache.

    Elsewhere they have at most so many elements, or one slice has all.
    """
    rows, columns = matrix.shape
    at_once = CHUNK_ELEMENTS if matrix.device.type == "cpu" else elsewhere or matrix.numel()
    step = max(1, at_once // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def equality_mask(values: Tensor, extremes: Tensor) -> Tensor:
    """Float mask of values == extremes (several times faster on a CPU than a boolean one)."""
    return torch.eq(values, extremes, out=torch.empty_like(values))


def spread_(target: Tensor, where: Tensor, gradient: Tensor) -> None:
    """Add gradient (..., 1), shared evenly by the ones of the mask `where`, as torch.amax does."""
    target.addcmul_(where, gradient / where.sum(-1, keepdim=True))
