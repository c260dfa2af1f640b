"""A finished block and its quantised linears: all that an exporter sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.blocks.runner import INPUT_FACTOR_SUFFIX
from lrquant.numerics.affine import dequantize_weight


@dataclass(frozen=True)
class QuantizedLinear:
    """One frozen linear: all that an exporter sees.

    codes (out, in) uint8, or int8 on a symmetric grid; scale and zero_point (out, groups) float32;
    bias (out,) float32 or None.  ``weight = scale * (codes - zero_point)``, times ``r1 r2`` where
    there is a `factor` (r1 (out, k), r2 (k, in)), which no integer format holds.  A linear with an
    `input_factor` (in,) multiplies its input by it before the activation quantizer.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    bits: int
    group_size: int
    symmetric: bool
    factor: tuple[Tensor, Tensor] | None = None
    input_factor: Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the codes stand for."""
        weight = dequantize_weight(self.codes, self.scale, self.zero_point)
        return (weight if self.factor is None else weight * torch.mm(*self.factor)).to(dtype)


@dataclass(frozen=True)
class FrozenBlock:
    """A finished block: quantised linears, and every other tensor with its factors folded in."""

    linears: dict[str, QuantizedLinear]
    others: dict[str, Tensor]

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the block computes with: weights in `dtype`, the rest float32."""
        tensors = dict(self.others)
        for name, linear in self.linears.items():
            tensors[f"{name}.weight"] = linear.dequantize(dtype)
            if linear.bias is not None:
                tensors[f"{name}.bias"] = linear.bias.to(dtype)
            if linear.input_factor is not None:
                tensors[name + INPUT_FACTOR_SUFFIX] = linear.input_factor
        return tensors

    def dense(self) -> dict[str, Tensor]:
        """Float32 tensors of a plain block, the linears' input factors multiplied into weights."""
        tensors = self.tensors(torch.float32)
        for name, linear in self.linears.items():
            if linear.input_factor is not None:
                tensors[f"{name}.weight"] *= tensors.pop(name + INPUT_FACTOR_SUFFIX)
        return tensors
