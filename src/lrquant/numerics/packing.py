"""Codes in 32-bit words, as compressed-tensors packs them, and steps of -1, 0 and 1 in bytes."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

_IN_A_BYTE = 5  # digits of base 3: 3 ** 5 = 243


def packed_weight(codes: Tensor, zero_points: Tensor | None, bits: int) -> dict[str, Tensor]:
    """Signed codes (out, in) and zero points (out, groups), int8, in 32-bit words."""
    packed = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_shape": torch.tensor(codes.shape),
    }
    if zero_points is not None:
        packed["weight_zero_point"] = pack_to_int32(zero_points, bits, packed_dim=0)
    return packed


def pack_ternary(steps: Tensor) -> Tensor:
    """Values -1, 0 and 1 (rows, columns), five of a row in a byte: (rows, columns / 5, upwards)."""
    padded = torch.nn.functional.pad(steps, (0, -steps.shape[1] % _IN_A_BYTE))
    digits = (padded + 1).to(torch.uint8)
    powers = 3 ** torch.arange(_IN_A_BYTE, dtype=torch.uint8, device=steps.device)
    return (digits.view(len(steps), -1, _IN_A_BYTE) * powers).sum(-1, dtype=torch.uint8)


def unpack_ternary(packed: Tensor, columns: int | None = None) -> Tensor:
    """The values of `pack_ternary` (rows, columns), int8; without `columns` up to 4 zeros more."""
    powers = 3 ** torch.arange(_IN_A_BYTE, device=packed.device)
    digits = packed[..., None].to(torch.int16) // powers % 3
    return (digits.flatten(1)[:, :columns] - 1).to(torch.int8)
