"""A finished block that is still tuned: scales, norms and where its weights lie between codes."""

from __future__ import annotations

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
    """

    def __init__(self, tuning: Tuning, view: BlockView, runner: BlockRunner) -> None:
        self.tuning, self.runner = tuning, runner
        self.frozen = view.freeze()
        self.factors = tuning.factors(view.shapes)
        self.positions = view.positions(self.frozen) if tuning.tune_rounding else {}
        self._norms = {
            site.producer.module: site.producer.offset
            for site in view.plan.sites
            if site.kind == "norm"
        }

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
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.tuning.constrain_(self.factors)
        rate = next(self._rates)
        for positions in self.positions.values():
            positions.descend_(rate)

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


@dataclass(frozen=True)
class _Positioned(QuantizedMatrix):
    """A matrix whose codes follow from where its weights lie."""

    positions: Positions = field(kw_only=True)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), differentiable in the scale and the positions."""
        before = dtype if self.factor is None else torch.float32
        return with_dense(self.positions.weight(self.scale, before), self.factor, dtype)
