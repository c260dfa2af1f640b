"""Integers: the affine grid ``value = scale * (code - zero_point)``.

Symbols follow OmniQuant (ICLR 2024, eq. 2) and LRQuant (ACL 2024): ``h`` is the scale, ``z`` the
zero point, ``Q = 2**bits - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.numerics.grids.grid import SMALLEST_SCALE, Grid, Scales, quotient


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Codes [0, Q] with a zero point, or [-2^(b-1), 2^(b-1) - 1] around 0 where `symmetric`."""

    kind = "int"

    @property
    def code_range(self) -> tuple[int, int]:
        if self.symmetric:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1

    @property
    def steps(self) -> int:
        """Q, how many scales lie between the smallest and the largest code."""
        smallest, largest = self.code_range
        return largest - smallest

    def scales(self, low: Tensor, high: Tensor) -> Scales:
        """Asymmetric: ``h = (high - low) / Q``, ``z = round(-low / h)``.

        Symmetric: ``h = 2 max(|low|, high) / Q`` and ``z = 0``, the grid of compressed-tensors.
        """
        if self.symmetric:
            # their order of operations: the largest value lies exactly between two codes
            scale = quotient(torch.maximum(-low, high), self.steps / 2).clamp_(min=SMALLEST_SCALE)
            return Scales(scale, torch.zeros_like(scale))
        scale = quotient(high - low, self.steps).clamp_(min=SMALLEST_SCALE)
        zero_point = (-low / scale).detach().round_()  # within the codes, since h Q >= -low
        return Scales(scale, zero_point)

    def encode_(self, values: Tensor, scales: Scales, offset: Tensor | None = None) -> Tensor:
        ratios = values.div_(scales.scale)
        ratios = ratios if offset is None else ratios.add_(offset)
        return ratios.round_().add_(scales.zero_point).clamp_(*self.code_range)

    def levels_(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        return codes.sub_(zero_point)

    def unclipped(self, ratios: Tensor, zero_point: Tensor) -> Tensor:
        unclamped = torch.round(ratios).add_(zero_point)
        return torch.eq(unclamped.clamp(*self.code_range), unclamped, out=unclamped)

    def round_trip_gradient(
        self, values: Tensor, gradient: Tensor, scales: Scales, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Straight-through gradients of ``h * (clamp(round(v/h + o) + z) - z)``.

        Returns those to h, shape (..., 1), and to the values, and ``sum g (code - z)``, shape
        (..., 1).  With m the mask of values that are not clipped: ``dv = g m`` and
        ``dh = sum g ((code - z) - m v / h)``; to the offset it is ``h dv``.  Overwrites `values`.
        """
        ratio = values.div_(scales.scale)
        shifted = ratio if offset is None else ratio + offset
        unclamped = torch.round(shifted).add_(scales.zero_point)
        codes = unclamped.clamp(*self.code_range)
        passed = torch.eq(codes, unclamped, out=unclamped)
        to_level = torch.linalg.vecdot(codes.sub_(scales.zero_point), gradient).unsqueeze(-1)
        ratio.mul_(passed)
        to_scale = to_level - torch.linalg.vecdot(ratio, gradient).unsqueeze(-1)
        return to_scale, passed.mul_(gradient), to_level

    def range_gradient(
        self, to_scale: Tensor, low: Tensor, high: Tensor, scales: Scales
    ) -> tuple[Tensor, Tensor]:
        """Gradients to low and high from the gradient to the scale, all (..., 1)."""
        per_level = to_scale.div(self.steps)
        per_level.mul_(scales.scale > SMALLEST_SCALE)
        if self.symmetric:
            by_high = high >= -low
            return per_level.mul(-2.0).mul_(~by_high), per_level.mul(2.0).mul_(by_high)
        return -per_level, per_level


GRID = IntegerGrid
