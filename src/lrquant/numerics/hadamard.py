"""Multiplication by Hadamard matrices, which spreads what a few channels hold over many.

The matrix is that of Sylvester, symmetric, over the square root of its size: it is its own inverse,
so that ``x H`` times ``W H`` is ``x W^T``.  Its size is the largest power of two that divides the
channels, each such block of which is multiplied by itself.  It is applied as the Kronecker product
of two smaller ones, so that a value costs the sum of their sizes and not the product.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LEAST = 16  # channels that are mixed with one another


def hadamard_size(channels: int) -> int:
    """The size of the matrix for so many channels: the largest power of two that divides them."""
    return channels & -channels


def hadamard(values: Tensor) -> Tensor:
    """Values (..., channels) times the matrix, float32."""
    size = hadamard_size(values.shape[-1])
    outer = 1 << (size.bit_length() - 1) // 2
    left, right = (_matrix(each, values.device) for each in (outer, size // outer))
    blocks = values.float().unflatten(-1, (-1, outer, size // outer))
    return (left @ (blocks @ right)).flatten(-3)


@lru_cache(maxsize=64)
def _matrix(size: int, device: torch.device) -> Tensor:
    """The orthogonal matrix (size, size), float32."""
    rows = torch.arange(size)
    ones = torch.zeros(size, size, dtype=torch.int64)
    for bit in range(size.bit_length() - 1):
        ones ^= (rows >> bit & 1)[:, None] & (rows >> bit & 1)
    return ((1 - 2 * ones).double() / size**0.5).float().to(device)
