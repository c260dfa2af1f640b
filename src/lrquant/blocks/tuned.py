"""A finished block whose scales and norms are still tuned: its codes are all that it keeps."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lrquant.blocks.runner import BlockRunner
from lrquant.blocks.stubs import Arguments
from lrquant.blocks.view import BlockView, scale_norm_
from lrquant.ingredients.tuning import Tuning


class TunedBlock:
    """`parameters` are those of the ingredient, by its names."""

    def __init__(self, tuning: Tuning, view: BlockView, runner: BlockRunner) -> None:
        self.frozen, self.runner = view.freeze(), runner
        self.parameters = tuning.own(view.parameters)
        self._norms = {
            site.producer.module: site.producer.offset
            for site in view.plan.sites
            if site.kind == "norm"
        }

    def tensors(self) -> dict[str, Tensor]:
        """What the block computes with, differentiable in the parameters."""
        matrices = {
            name: replace(matrix, scale=matrix.scale * self.parameters[f"tuned.{name}.gain"])
            for name, matrix in self.frozen.matrices.items()
        }
        tensors = replace(self.frozen, matrices=matrices).tensors(self.runner.dtype)
        for norm, offset in self._norms.items():
            scale_norm_(tensors, norm, self.parameters[f"tuned.{norm}.factor"], offset)
        return tensors

    def __call__(self, states: Tensor, arguments: Arguments) -> Tensor:
        """Output (batch, tokens, hidden) of the block."""
        with self.runner as runner:
            return runner(self.tensors(), states, arguments)
