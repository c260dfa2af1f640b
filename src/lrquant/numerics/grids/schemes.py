"""The grids that a scheme asks for: of weights, of activations, of attention's Q, K and V."""

from __future__ import annotations

import torch

from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.numerics.grids.grid import Grid, grid_of
from lrquant.numerics.grids.integer import IntegerGrid


def weight_grid(scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> Grid | None:
    """That of a scheme's weights, None where they stay in floating point."""
    if scheme.weight_bits == FLOAT_BITS:
        return None
    kind = grid_of(scheme.weight_grid)
    return kind(scheme.weight_bits, scheme.group_size, scheme.symmetric, scale_dtype)


def activation_grid(scheme: Scheme) -> IntegerGrid | None:
    """That of what a linear reads, one scale a token, or a group of a token's channels."""
    if scheme.activation_bits == FLOAT_BITS:
        return None
    size = scheme.activation_group_size
    return IntegerGrid(scheme.activation_bits, size, scheme.activation_symmetric)


def attention_grid(scheme: Scheme) -> IntegerGrid | None:
    """That of Q, K and V, one scale a token and head."""
    if scheme.attention_bits == FLOAT_BITS:
        return None
    return IntegerGrid(scheme.attention_bits, None, scheme.activation_symmetric)
