"""A finished block whose scales and norms are still tuned: its codes are all that it keeps."""

from __future__ import annotations

from torch import Tensor

from lrquant.blocks.runner import SHIFT_SUFFIX, BlockRunner
from lrquant.blocks.stubs import Arguments
from lrquant.blocks.view import BlockView, scaled_norm
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
        gains = {name: self.parameters[f"tuned.{name}.gain"] for name in self.frozen.matrices}
        tensors = self.frozen.tensors(self.runner.dtype, gains)
        for norm, offset in self._norms.items():
            factor = self.parameters[f"tuned.{norm}.factor"]
            for name in (f"{norm}.bias", norm + SHIFT_SUFFIX):
                if name in tensors:
                    tensors[name] = tensors[name] * factor
            weight = tensors[f"{norm}.weight"]
            tensors[f"{norm}.weight"] = scaled_norm(weight, factor, offset)
        return tensors

    def __call__(self, states: Tensor, arguments: Arguments) -> Tensor:
        """Output (batch, tokens, hidden) of the block."""
        with self.runner as runner:
            return runner(self.tensors(), states, arguments)
