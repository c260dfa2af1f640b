"""A block as it would be under sites, scheme and parameters: one weight function for all uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.architectures.sites import Site
from lrquant.blocks.frozen import FrozenBlock, QuantizedLinear
from lrquant.blocks.runner import INPUT_FACTOR_SUFFIX, SHIFT_SUFFIX
from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.errors import LRQuantError
from lrquant.ingredients.clipping import clipping_parameters, clipping_strengths, searched_logits
from lrquant.ingredients.equivalent import Factors, equivalent_parameters, fold_factors
from lrquant.ingredients.factors import (
    input_name,
    rotation_parameters,
    scale_gain,
    scale_norms,
    shared_parameters,
    weight_factor,
)
from lrquant.ingredients.statistics import ChannelStatistics
from lrquant.numerics.affine import Extremes, fake_quantize_weight, group_extremes, quantize_weight

SMALLEST_LEARNED_SCALE = 1e-2
_Quantizer = tuple[
    Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int, bool
]


@dataclass(frozen=True)
class Method:
    """What is learned in a block: which transformations, at which sites, with which shifts."""

    lwc: bool = False
    let: bool = False
    let_sites: tuple[str, ...] = ("norm", "value_output", "up_down")
    let_shift: str = "auto"
    rotation: bool = False
    rotate_rank: int = 1
    rotation_sharing: str = "site"
    lwc_init: float | None = None
    save_dtype: str | None = None


class BlockView:
    """One block's tensors under learnable parameters (a flat dict of float32 leaves).

    `stored` are the block's own tensors on the computing device, never changed.
    """

    def __init__(
        self,
        stored: dict[str, Tensor],
        linears: Sequence[str],
        sites: Sequence[Site],
        scheme: Scheme,
        method: Method,
        dtype: torch.dtype,
    ) -> None:
        self.stored, self.linears, self.scheme, self.dtype = stored, linears, scheme, dtype
        chosen = sites if method.let else ()
        self.sites = tuple(site for site in chosen if site.kind in method.let_sites)
        self.method = method
        self.clipped = method.lwc and scheme.weight_bits != FLOAT_BITS
        self.rotated = method.rotation and scheme.weight_bits != FLOAT_BITS
        self._own_inputs = self.rotated and method.rotation_sharing == "linear"
        share = self.rotated and method.rotation_sharing == "site"
        self.rotated_sites = tuple(site for site in sites if share and site.kind == "norm")
        self._offsets = {f.module: f.offset for site in sites for f in site.folds if f.offset}
        self.shifted = frozenset(
            site.name for site in self.sites if self._takes_shift(site, method.let_shift)
        )
        self.parameters: dict[str, Tensor] = {}
        self._extremes = self._fixed_extremes()
        self._plain = {
            name: tensor.float()
            for name, tensor in stored.items()
            if name.rpartition(".")[0] not in linears
        }

    def _fixed_extremes(self) -> dict[str, Extremes]:
        """Ranges of the weights that no site scales: the same at every step."""
        scaled = {fold.module for site in self.sites for fold in site.folds}
        return {
            linear: group_extremes(self.stored[f"{linear}.weight"], self.group_size(linear))
            for linear in self.linears
            if linear not in scaled and self.scheme.weight_bits != FLOAT_BITS
        }

    def _takes_shift(self, site: Site, rule: str) -> bool:
        if rule == "never" or not site.shiftable:
            return False
        modules = [fold.module for fold in site.folds]
        return rule == "always" or all(f"{module}.bias" in self.stored for module in modules)

    @property
    def shifted_norms(self) -> tuple[str, ...]:
        """Norms without a bias whose output the runner has to shift."""
        return tuple(
            site.producer.module
            for site in self.sites
            if site.kind == "norm"
            and site.name in self.shifted
            and f"{site.producer.module}.bias" not in self.stored
        )

    def group_size(self, linear: str) -> int:
        """Input columns that share a scale; must divide the linear's input width."""
        columns = self.stored[f"{linear}.weight"].shape[1]
        size = self.scheme.group_size or columns
        if columns % size:
            fitting = [n for n in range(16, columns + 1) if columns % n == 0]
            raise LRQuantError(
                f"group size {size} does not divide the {columns} input columns of {linear}; "
                f"sizes that do: {', '.join(map(str, fitting))}"
            )
        return size

    def initialize(self, statistics: ChannelStatistics, block_name: str) -> None:
        """Set the parameters to their published start."""
        device = self.stored[f"{self.linears[0]}.weight"].device
        self.parameters = equivalent_parameters(
            self.sites, self.shifted, statistics, block_name, device
        )
        if self.rotated:
            self.parameters |= shared_parameters(self.rotated_sites, device)
        for linear in self.linears:
            rows, columns = self.stored[f"{linear}.weight"].shape
            groups = columns // self.group_size(linear)
            if self.rotated:
                sharing, rank = self.method.rotation_sharing, self.method.rotate_rank
                self.parameters |= rotation_parameters(
                    linear, rows, columns, groups, sharing, rank, device
                )
        if self.clipped:
            self._initialize_clipping(statistics, block_name)

    def _initialize_clipping(self, statistics: ChannelStatistics, block_name: str) -> None:
        """Start the clipping at the method's logit, or where a search finds the least error."""
        factors = self._factors()
        for linear in self.linears:
            weight, size = self.stored[f"{linear}.weight"], self.group_size(linear)
            rows, groups = weight.shape[0], weight.shape[1] // size
            start: float | Tensor | None = self.method.lwc_init
            if start is None:
                row, column = factors.rows.get(linear), factors.columns.get(linear)
                shift = factors.add.get(linear)
                importance = statistics.importance(f"{block_name}.{linear}", weight, shift)
                if column is not None:
                    importance = importance / column.square()
                start = searched_logits(
                    *(weight, row, column, importance),
                    *(self.scheme.weight_bits, size, self.scheme.symmetric),
                )
            self.parameters |= clipping_parameters(linear, rows, groups, start, weight.device)

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Take parameters that were learned earlier; LRQuantError if they are not this block's."""
        expected = self.parameter_shapes()
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        for name in sorted(expected.keys() | shapes.keys()):
            if shapes.get(name) != expected.get(name):
                raise LRQuantError(
                    f"learned parameters: {name} is {_words(shapes.get(name))} where this block "
                    f"needs it {_words(expected.get(name))}; they are of another run, learn again"
                )
        device = self.stored[f"{self.linears[0]}.weight"].device
        self.parameters = {name: tensor.to(device) for name, tensor in parameters.items()}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is learned, by name."""
        meta = torch.device("meta")
        shapes: dict[str, tuple[int, ...]] = {}
        for site in self.sites:
            parts = ("scale", "shift") if site.name in self.shifted else ("scale",)
            shapes |= {f"let.{site.name}.{part}": (site.size,) for part in parts}
        tensors = shared_parameters(self.rotated_sites, meta)
        for linear in self.linears:
            rows, columns = self.stored[f"{linear}.weight"].shape
            groups = columns // self.group_size(linear)
            if self.rotated:
                sharing, rank = self.method.rotation_sharing, self.method.rotate_rank
                tensors |= rotation_parameters(linear, rows, columns, groups, sharing, rank, meta)
            if self.clipped:
                tensors |= clipping_parameters(linear, rows, groups, 0.0, meta)
        return shapes | {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    @torch.no_grad()
    def keep_scales_positive_(self) -> None:
        """Scales and foldable factors stay >= 1e-2 (published code: scales, |s| >= 1e-2)."""
        dense = self.method.rotation_sharing == "weight"
        for name, parameter in self.parameters.items():
            scale = name.startswith("let.") and name.endswith(".scale")
            if scale or (name.startswith("rotation.") and not dense):
                parameter.clamp_(min=SMALLEST_LEARNED_SCALE)

    def tensors(self) -> dict[str, Tensor]:
        """What the block computes with, differentiable in the parameters: see FrozenBlock."""
        factors = self._factors()
        tensors = self._others(factors)
        for linear in self.linears:
            if self.scheme.weight_bits == FLOAT_BITS:
                weight = self.stored[f"{linear}.weight"]
                tensors[f"{linear}.weight"] = _scaled(weight, linear, factors, self.dtype)
            else:
                tensors[f"{linear}.weight"] = self._fake_quantized(linear, factors)
            bias = self._bias(linear, factors)
            if bias is not None:
                tensors[f"{linear}.bias"] = bias.to(self.dtype)
            if self._own_inputs:
                factor = self.parameters[input_name(linear)]
                tensors[linear + INPUT_FACTOR_SUFFIX] = factor
        return tensors

    @torch.no_grad()
    def freeze(self) -> FrozenBlock:
        """Codes, scales and folded tensors; the result's `tensors` equal the view's bit for bit."""
        parameters = {name: tensor.detach() for name, tensor in self.parameters.items()}
        factors = self._factors()
        others = self._others(factors)
        linears = {}
        for linear in self.linears:
            bias = self._bias(linear, factors)
            if self.scheme.weight_bits == FLOAT_BITS:
                weight = self.stored[f"{linear}.weight"]
                others[f"{linear}.weight"] = _scaled(weight, linear, factors, self.dtype)
                if bias is not None:
                    others[f"{linear}.bias"] = bias.to(self.dtype)
                continue
            codes, scale, zero_point = quantize_weight(
                *self._quantizer(linear, factors),
                extremes=self._extremes.get(linear),
                gain=scale_gain(parameters, linear),
                scale_dtype=self._scale_dtype(linear),
            )
            linears[linear] = QuantizedLinear(
                codes.to(torch.int8 if self.scheme.symmetric else torch.uint8),
                scale,
                zero_point,
                bias,
                self.scheme.weight_bits,
                self.group_size(linear),
                self.scheme.symmetric,
                weight_factor(parameters, linear),
                parameters.get(input_name(linear)) if self._own_inputs else None,
            )
        return FrozenBlock(linears, others)

    def in_stored_units(
        self, linear: str, inputs: Tensor, outputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a linear reads and gives under the parameters, (tokens, in) and (tokens, out), with
        the scales and shifts undone: ``outputs`` is then about ``inputs @ W.T + b``, all stored.
        """
        factors = self._factors()
        for site in self.rotated_sites:
            if linear in (fold.module for fold in site.consumers):
                inputs = inputs / self.parameters[input_name(site.name)]
        if linear in factors.columns:
            inputs = inputs * factors.columns[linear]
        if linear in factors.add:
            inputs = inputs + factors.add[linear]
        if linear in factors.rows:
            outputs = outputs / factors.rows[linear]
        if linear in factors.subtract:
            outputs = outputs + factors.subtract[linear]
        return inputs, outputs

    def _factors(self) -> Factors:
        factors = fold_factors(self.sites, self.parameters)
        scale_norms(factors, self.parameters, self.rotated_sites)
        return factors

    def _scale_dtype(self, linear: str) -> torch.dtype:
        """Scales are rounded as the checkpoint will store them."""
        named = self.method.save_dtype
        dtype = getattr(torch, named) if named else self.stored[f"{linear}.weight"].dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32

    def _quantizer(self, linear: str, factors: Factors) -> _Quantizer:
        """What decides a linear's codes: the first arguments of both weight functions."""
        upper, lower = clipping_strengths(self.parameters, linear)
        return (
            self.stored[f"{linear}.weight"],
            factors.rows.get(linear),
            factors.columns.get(linear),
            upper,
            lower,
            self.scheme.weight_bits,
            self.group_size(linear),
            self.scheme.symmetric,
        )

    def _fake_quantized(self, linear: str, factors: Factors) -> Tensor:
        factor = weight_factor(self.parameters, linear)
        weight = fake_quantize_weight(
            *self._quantizer(linear, factors),
            dtype=self.dtype if factor is None else torch.float32,
            extremes=self._extremes.get(linear),
            gain=scale_gain(self.parameters, linear),
            scale_dtype=self._scale_dtype(linear),
        )
        return weight if factor is None else (weight * torch.mm(*factor)).to(self.dtype)

    def _others(self, factors: Factors) -> dict[str, Tensor]:
        tensors = dict(self._plain)
        for norm, factor in factors.norms.items():
            offset = self._offsets.get(norm, 0.0)
            weight = tensors[f"{norm}.weight"]
            # With an offset (weight + offset) * factor - offset, in the form that is exact at 1.
            scaled = weight + (weight + offset) * (factor - 1) if offset else weight * factor
            tensors[f"{norm}.weight"] = scaled
            bias = tensors.get(f"{norm}.bias")
            shift = factors.subtract.get(norm)
            if bias is not None:
                tensors[f"{norm}.bias"] = (bias if shift is None else bias - shift) * factor
            elif shift is not None:
                tensors[norm + SHIFT_SUFFIX] = -shift * factor
        return tensors

    def _bias(self, linear: str, factors: Factors) -> Tensor | None:
        """The linear's bias, float32, with shifts moved in or out and its rows scaled."""
        bias = self.stored.get(f"{linear}.bias")
        result = None if bias is None else bias.float()
        if linear in factors.add:
            entering = torch.mv(self.stored[f"{linear}.weight"].float(), factors.add[linear])
            result = entering if result is None else result + entering
        if linear in factors.subtract:
            leaving = factors.subtract[linear]
            result = -leaving if result is None else result - leaving
        if result is not None and linear in factors.rows:
            result = result * factors.rows[linear]
        return result


def _scaled(weight: Tensor, linear: str, factors: Factors, dtype: torch.dtype) -> Tensor:
    """A weight that stays in floating point, with its factors folded in."""
    row, column = factors.rows.get(linear), factors.columns.get(linear)
    if row is None and column is None:
        return weight.to(dtype)
    result = weight.float()
    result = result if row is None else result * row[:, None]
    return (result if column is None else result * column).to(dtype)


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"
