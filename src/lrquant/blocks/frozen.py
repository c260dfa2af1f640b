"""A finished block and its quantised matrices: all that an exporter sees."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lrquant.architectures.matrix import Matrix, linear
from lrquant.blocks.assembly import assembled, assembled_biases, first_row, made_by_expert
from lrquant.blocks.experts import BlockTensors
from lrquant.blocks.runner import INPUT_CLIP_SUFFIX, INPUT_FACTOR_SUFFIX
from lrquant.config.scheme import Scheme
from lrquant.errors import LRQuantError
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.hadamard import hadamard
from lrquant.numerics.weights import Quantized, dequantize_weight, with_dense

FloatingMatrix = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out,)


@dataclass(frozen=True)
class QuantizedMatrix:
    """One frozen matrix: all that an exporter sees.

    codes (out, in) in the grid's `stored_dtype`; scale and zero_point (out, groups) float32; bias
    (out,) float32 or None.  The weight is what the `grid` makes of them, ``scale * (codes -
    zero_point)`` of integers, times ``r1 r2`` where there is a `factor` (r1 (out, k), r2 (k, in)),
    which no integer format holds.  With an `input_factor` (in,) the input is multiplied by it
    before the activation quantizer, of whose range an `input_clip` (2,) says how much of a token's
    smallest and largest value it spans.  `scheme` says the rest, such as the bits of activations.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    grid: Grid
    scheme: Scheme
    factor: tuple[Tensor, Tensor] | None = None
    input_factor: Tensor | None = None
    input_clip: Tensor | None = None

    def on(self, device: torch.device) -> QuantizedMatrix:
        """The same on a device."""
        factor = self.factor
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero_point=self.zero_point.to(device),
            bias=_on(device, self.bias),
            factor=None if factor is None else (factor[0].to(device), factor[1].to(device)),
            input_factor=_on(device, self.input_factor),
            input_clip=_on(device, self.input_clip),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the codes stand for, differentiable in the scale."""
        quantized = Quantized(self.codes, self.scale, self.zero_point)
        return with_dense(dequantize_weight(quantized, self.grid), self.factor, dtype)


@dataclass(frozen=True)
class FrozenBlock:
    """A finished block: quantised matrices, where they lie, and all else, factors folded in.

    `layout` has every matrix of the block that is quantised, and those that lie in the same
    parameters and are not: these are `unquantized`, weight and bias.
    """

    matrices: dict[str, QuantizedMatrix]
    others: dict[str, Tensor]
    layout: Mapping[str, Matrix]
    unquantized: dict[str, FloatingMatrix] = field(default_factory=dict)

    def on(self, device: torch.device) -> FrozenBlock:
        """The same on a device."""
        pairs = self.unquantized.items()
        return replace(
            self,
            matrices={name: matrix.on(device) for name, matrix in self.matrices.items()},
            others={name: tensor.to(device) for name, tensor in self.others.items()},
            unquantized={n: (weight.to(device), _on(device, bias)) for n, (weight, bias) in pairs},
        )

    def tensors(self, dtype: torch.dtype, *, by_expert: bool = False) -> dict[str, Tensor]:
        """What the block computes with: weights in `dtype`, the rest float32.

        `by_expert` says that those of experts are made out of codes one by one, when they are used.
        """
        layout = self.layout.items()
        names = [name for name, matrix in layout if not (by_expert and matrix.expert is not None)]
        tensors = self._with({name: self._weight(name, dtype) for name in names}, dtype)
        for name, matrix in self.matrices.items():
            if matrix.input_factor is not None:
                tensors[name + INPUT_FACTOR_SUFFIX] = matrix.input_factor
        tensors |= self.input_clips
        if not by_expert:
            return tensors
        return BlockTensors(
            tensors, made_by_expert(self.layout, lambda name: self._weight(name, dtype))
        )

    @property
    def input_clips(self) -> dict[str, Tensor]:
        """How inputs of modules are clipped, as `tensors` has it."""
        pairs = ((self.layout[n].reads, each.input_clip) for n, each in self.matrices.items())
        return {f"{name}{INPUT_CLIP_SUFFIX}": clip for name, clip in pairs if clip is not None}

    def _with(self, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The block's tensors with these weights of its matrices; biases in `dtype`."""
        biases = {
            name: matrix.bias.to(dtype)
            for name, matrix in self.matrices.items()
            if matrix.bias is not None
        }
        pairs = self.unquantized.items()
        biases |= {n: bias.to(dtype) for n, (_, bias) in pairs if bias is not None}
        tensors = self.others | assembled(self.layout, weights)
        return tensors | assembled_biases(self.layout, biases)

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        if name in self.matrices:
            return self.matrices[name].dequantize(dtype)
        return self.unquantized[name][0].to(dtype)

    def dense(self) -> dict[str, Tensor]:
        """Float32 tensors of a plain block, no clipping.

        Input factors and Hadamard matrices are multiplied into weights.
        """
        return self._with({name: self._plain(name) for name in self.layout}, torch.float32)

    def _plain(self, name: str) -> Tensor:
        """The float32 weight of the input as it is."""
        weight, matrix = self._weight(name, torch.float32), self.matrices.get(name)
        if matrix is not None and matrix.input_factor is not None:
            weight = weight * matrix.input_factor
        return hadamard(weight) if matrix is not None and matrix.scheme.hadamard else weight

    def apart(self, alone: Collection[str]) -> FrozenBlock:
        """The same with matrices of several in a parameter as linears by their own names.

        What then has nothing quantised in it is among the others.
        """
        layout = {n: linear(n) if n in alone else m for n, m in self.layout.items()}
        packed = {layout[name].parameter for name in self.matrices}
        rest = {n: pair for n, pair in self.unquantized.items() if layout[n].parameter in packed}
        floating = {n: pair for n, pair in self.unquantized.items() if n not in rest}
        others = assembled(layout, {n: weight for n, (weight, _) in floating.items()})
        biases = {n: bias for n, (_, bias) in floating.items() if bias is not None}
        others |= assembled_biases(layout, biases)
        own = {n: m for n, m in layout.items() if n not in floating}
        return FrozenBlock(self.matrices, self.others | others, own, rest)

    def joined(self) -> FrozenBlock:
        """The same with the parts of a linear as one matrix, for formats that know linears alone.

        LRQuantError for parts on several grids, and for parameters that are no linear's.
        """
        by_parameter: dict[str, list[str]] = {}
        for name, matrix in self.layout.items():
            by_parameter.setdefault(matrix.parameter, []).append(name)
        matrices: dict[str, QuantizedMatrix] = {}
        layout: dict[str, Matrix] = {}
        for parameter, names in by_parameter.items():
            first = self.layout[names[0]]
            if first.whole:
                matrices[names[0]], layout[names[0]] = self.matrices[names[0]], first
                continue
            module = parameter.removesuffix(".weight")
            if first.expert is not None or first.transposed or module == parameter:
                raise LRQuantError(
                    f"{parameter}: holds several matrices in one tensor, which this format does "
                    "not; use --format lrquant, or dequantized"
                )
            names.sort(key=lambda name: first_row(self.layout[name]))
            matrices[module] = _one(module, [self.matrices.get(name) for name in names])
            layout[module] = replace(first, name=module, rows=None)
        return FrozenBlock(matrices, self.others, layout)


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _one(module: str, slices: list[QuantizedMatrix | None]) -> QuantizedMatrix:
    """Rows of one linear, one after the other."""
    whole = [each for each in slices if each is not None]
    if len(whole) < len(slices) or any(each.scheme != whole[0].scheme for each in whole):
        raise LRQuantError(
            f"{module}: its parts have several schemes, which this format does not hold; give "
            "them one, or use a format of dense weights"
        )
    biases = [each.bias for each in whole]
    factors = [each.factor for each in whole]
    if any(factor is not None for factor in factors):
        raise LRQuantError(
            f"{module}: a dense factor on a part of a linear; use a format of dense weights"
        )
    return replace(
        whole[0],
        codes=torch.cat([each.codes for each in whole]),
        scale=torch.cat([each.scale for each in whole]),
        zero_point=torch.cat([each.zero_point for each in whole]),
        bias=None if biases[0] is None else torch.cat([b for b in biases if b is not None]),
    )
