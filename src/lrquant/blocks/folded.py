"""What scales and shifts make of a block's norms and biases, and of weights off every grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.architectures.matrix import Matrix
from lrquant.blocks.runner import SHIFT_SUFFIX
from lrquant.ingredients.base.block import MatrixShape
from lrquant.ingredients.base.folding import Factors


@dataclass(frozen=True)
class Folding:
    """Where a block's factors go, but for its matrices' weights.

    `plain` are its tensors that are of no matrix, float32; `norms` those that begin a site, and
    `offsets` what is added to the weights of some before they multiply.
    """

    stored: Mapping[str, Tensor]
    matrices: Mapping[str, Matrix]
    shapes: Mapping[str, MatrixShape]
    plain: Mapping[str, Tensor]
    norms: Sequence[str]
    offsets: Mapping[str, float]

    def _weight(self, matrix: str) -> Tensor:
        declared = self.matrices[matrix]
        return declared.of(self.stored[declared.parameter])

    def others(self, factors: Factors) -> dict[str, Tensor]:
        """All tensors that are of no matrix, by name."""
        tensors = dict(self.plain)
        norms = dict.fromkeys([*factors.norms, *(n for n in self.norms if n in factors.subtract)])
        for norm in norms:
            factor, shift = factors.norms.get(norm), factors.subtract.get(norm)
            bias = tensors.get(f"{norm}.bias")
            if shift is not None:
                name = norm + SHIFT_SUFFIX if bias is None else f"{norm}.bias"
                tensors[name] = -shift if bias is None else bias - shift
            if factor is not None:
                scale_norm_(tensors, norm, factor, self.offsets.get(norm))
        folded = factors.rows | factors.columns | factors.subtract | factors.add
        for module in folded.keys() - self.matrices.keys() - norms.keys():
            weight, bias = tensors[f"{module}.weight"], tensors.get(f"{module}.bias")
            tensors[f"{module}.weight"] = scaled_weight(weight, module, factors, torch.float32)
            bias = _folded_bias(bias, weight, module, factors)
            if bias is not None:
                tensors[f"{module}.bias"] = bias
        return tensors

    def biases(self, factors: Factors) -> dict[str, Tensor]:
        """Biases (out,), float32, of the matrices that have one, 0 where only other parts do."""
        own = {}
        for name, matrix in self.matrices.items():
            bias = None if matrix.bias is None else self.stored.get(matrix.bias)
            bias = None if bias is None else matrix.of_bias(bias).float()
            own[name] = _folded_bias(bias, self._weight(name), name, factors)
        biased = {self.matrices[name].bias for name, bias in own.items() if bias is not None}
        return {
            name: self._weight(name).new_zeros(self.shapes[name].rows, dtype=torch.float32)
            if bias is None
            else bias
            for name, bias in own.items()
            if self.matrices[name].bias in biased
        }


def _folded_bias(bias: Tensor | None, weight: Tensor, name: str, factors: Factors) -> Tensor | None:
    """A bias with shifts moved in or out and its rows scaled; None where there is still none."""
    if name in factors.add:
        entering = torch.mv(weight.float(), factors.add[name])
        bias = entering if bias is None else bias + entering
    if name in factors.subtract:
        leaving = factors.subtract[name]
        bias = -leaving if bias is None else bias - leaving
    return bias * factors.rows[name] if bias is not None and name in factors.rows else bias


def scale_norm_(
    tensors: dict[str, Tensor], norm: str, factor: Tensor, offset: float | None
) -> None:
    """Multiply what a norm gives by a factor: its weight, and its bias or shift, among `tensors`.

    Where it multiplies with its weight and an offset, that becomes ``(weight + offset) * factor -
    offset``, in the form that is exact at a factor of 1.
    """
    weight = tensors[f"{norm}.weight"]
    scaled = weight + (weight + offset) * (factor - 1) if offset else weight * factor
    tensors[f"{norm}.weight"] = scaled
    for name in (f"{norm}.bias", norm + SHIFT_SUFFIX):
        if name in tensors:
            tensors[name] = tensors[name] * factor


def scaled_weight(weight: Tensor, name: str, factors: Factors, dtype: torch.dtype) -> Tensor:
    """A weight that stays in floating point, with its factors folded in."""
    row, column = factors.rows.get(name), factors.columns.get(name)
    if row is None and column is None:
        return weight.to(dtype)
    result = weight.float()
    result = result if row is None else result * row[:, None]
    return (result if column is None else result * column).to(dtype)
