"""A finished block that is still tuned: scales, norms and where its weights lie between codes."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lrquant.blocks.folded import scale_norm_
from lrquant.blocks.frozen import QuantizedMatrix
from lrquant.blocks.runner import BlockRunner
from lrquant.blocks.stubs import Arguments
from lrquant.blocks.view import BlockView
from lrquant.ingredients.base.descent import left
from lrquant.ingredients.tuning import Tuning
from lrquant.numerics.positions import Positions
from lrquant.numerics.weights import with_dense


class TunedBlock:
    """A block as its `view` was learned, under parameters of `tuning` that the view need not have.

    `factors` are those that multiply scales and norms, by the ingredient's names.  `positions` are
    where weights lie on their grids, if the rounding is tuned, by matrix: codes follow from them.
    All tensors are on `device`; a block that lives elsewhere computes and is stepped as a copy.
    """

    def __init__(self, tuning: Tuning, view: BlockView, runner: BlockRunner) -> None:
        self.tuning, self.runner = tuning, runner
        self.device = view.shapes.device
        self.frozen = view.freeze()
        self.factors = tuning.factors(view.shapes)
        self.positions = view.positions(self.frozen) if tuning.tune_rounding else {}
        self._norms = {
            site.producer.module: site.producer.offset
            for site in view.plan.sites
            if site.kind == "norm"
        }
        self._moments: list[dict[str, Tensor]] = [{} for _ in self.factors]

    def on(self, device: torch.device) -> TunedBlock:
        """A copy of the block on a device, with its moments; the block itself if it is there."""
        if device == self.device:
            return self
        other = copy(self)
        other.device, other.frozen = device, self.frozen.on(device)
        other.factors = {
            name: factor.detach().to(device).requires_grad_(factor.requires_grad)
            for name, factor in self.factors.items()
        }
        other.positions = {
            name: positions.on(device, other.frozen.matrices[name].codes)
            for name, positions in self.positions.items()
        }
        other._moments = [_on(device, moments) for moments in self._moments]
        return other

    @torch.no_grad()
    def take(self, stepped: TunedBlock) -> None:
        """Take over what steps have changed in a copy of the block."""
        if stepped is self:
            return
        for name, factor in self.factors.items():
            factor.copy_(stepped.factors[name])
        for name, positions in self.positions.items():
            positions.offsets.copy_(stepped.positions[name].offsets)
        self._moments = [_on(self.device, moments) for moments in stepped._moments]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The ingredient's parameters, by its names, as they are now."""
        shifts = {
            f"tuned.{name}.shift": positions.shift() for name, positions in self.positions.items()
        }
        return self.factors | shifts

    def begin(self, steps: int) -> None:
        """Be stepped so many times from now on."""
        leaves = [factor.requires_grad_(True) for factor in self.factors.values()]
        self._optimizer = self.tuning.optimizer(leaves, 0.0, steps)
        rate = self.tuning.tune_rounding_lr
        self._rates = iter(rate * left(taken, steps) for taken in range(steps))

    @torch.no_grad()
    def step(self) -> None:
        """Step all that is tuned by its gradient, which is let go."""
        self._step_factors()
        self.tuning.constrain_(self.factors)
        rate = next(self._rates)
        for positions in self.positions.values():
            positions.descend_(rate)

    def _step_factors(self) -> None:
        """Have the optimizer, which all copies share, step this one's factors; it keeps none."""
        optimizer = self._optimizer
        (group,) = optimizer.param_groups
        group["params"] = list(self.factors.values())
        optimizer.state.update(zip(group["params"], self._moments, strict=True))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        group["params"] = []

    def tensors(self) -> dict[str, Tensor]:
        """What the block computes with, differentiable in what learns."""
        matrices = {name: self._matrix(name) for name in self.frozen.matrices}
        tensors = replace(self.frozen, matrices=matrices).tensors(self.runner.dtype)
        for norm, offset in self._norms.items():
            scale_norm_(tensors, norm, self.factors[f"tuned.{norm}.factor"], offset)
        return tensors

    def _matrix(self, name: str) -> QuantizedMatrix:
        matrix = self.frozen.matrices[name]
        scale = matrix.scale * self.factors[f"tuned.{name}.gain"]
        if name not in self.positions:
            return replace(matrix, scale=scale)
        return _Positioned(**{**vars(matrix), "scale": scale, "positions": self.positions[name]})

    def __call__(self, states: Tensor, arguments: Arguments) -> Tensor:
        """Output (batch, tokens, hidden) of the block."""
        with self.runner as runner:
            return runner(self.tensors(), states, arguments)


def tuned_bytes(view: BlockView, tuning: Tuning) -> int:
    """What a block takes while it is tuned, out of the shapes of its `view`, moments and best too.

    A weight has a byte of its code, if the rounding is tuned two of its position and a fifth of
    its best; a group 28 bytes: scale, zero point, gain and factor's moments and best.
    """
    quantized = view.shapes.quantized.values()
    weights = sum(shape.rows * shape.columns for shape in quantized)
    groups = sum(shape.rows * shape.groups for shape in quantized)
    others = sum(tensor.numel() for tensor in view.stored.values()) - weights
    of_weight, of_group = (3.2, 28) if tuning.tune_rounding else (1, 24)
    norms = sum(tuning.norms(view.shapes).values())
    return round(of_weight * weights) + of_group * groups + 4 * others + 16 * norms


def _on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Positioned(QuantizedMatrix):
    """A matrix whose codes follow from where its weights lie."""

    positions: Positions = field(kw_only=True)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), differentiable in the scale and the positions."""
        before = dtype if self.factor is None else torch.float32
        return with_dense(self.positions.weight(self.scale, before), self.factor, dtype)
