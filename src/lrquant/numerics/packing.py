"""Codes in 32-bit words, as compressed-tensors packs them."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor


def packed_weight(codes: Tensor, zero_points: Tensor | None, bits: int) -> dict[str, Tensor]:
    """Signed codes (out, in) and zero points (out, groups), int8, in 32-bit words."""
    packed = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_shape": torch.tensor(codes.shape),
    }
    if zero_points is not None:
        packed["weight_zero_point"] = pack_to_int32(zero_points, bits, packed_dim=0)
    return packed
