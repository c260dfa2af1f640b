"""What is tuned end to end, when all blocks are learned: scales and norms, codes as they are.

A gain multiplies each de-quantisation scale and a factor each norm, both from 1, so that nothing
is added at run time (EfficientQAT, Chen et al., 2024, tunes step sizes in its second phase).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.core import FASTEST, MANY
from lrquant.config.schemes import Schemes
from lrquant.config.settings import setting
from lrquant.ingredients.base.folding import multiply
from lrquant.ingredients.ingredient import SMALLEST_FACTOR, Chart, Ingredient

if TYPE_CHECKING:
    from torch import Tensor

    from lrquant.ingredients.base.block import BlockShapes, Start
    from lrquant.ingredients.base.folding import Factors
    from lrquant.ingredients.ingredient import Parameters
    from lrquant.numerics.recipe import Recipe


@dataclass(frozen=True)
class Tuning(Ingredient):
    """A `gain` a row and group of each matrix, and a `factor` a channel of each norm."""

    tune: bool = setting(
        False,
        "after the blocks, tune all scales and norms together by the KL divergence of the "
        "model's logits from full precision's",
        balanced=True,
        best=True,
    )
    tune_lr: float = setting(
        1e-3, "learning rate of the tuning at first; it falls to 0", limits=(0, FASTEST)
    )
    tune_epochs: int = setting(2, "epochs of the tuning", limits=(1, MANY), best=4)

    name = "tuned"
    switch = "tune"
    adapts = False
    stage = "tuned"
    charts: ClassVar[dict[str, Chart]] = {
        "gains": Chart("Tuned scales", "Gain of each scale, tuned by the model's logits"),
        "norms": Chart("Tuned norms", "Factor of each channel, tuned by the model's logits"),
    }

    @classmethod
    def refusal(cls, schemes: Schemes) -> str | None:
        if not schemes.floating_point:
            return None
        return "with W16A16: nothing is quantised; give --wbits or --abits below 16"

    @property
    def rate(self) -> float:
        return self.tune_lr

    @property
    def description(self) -> str:
        return (
            f"scales and norms end to end (lr {self.tune_lr:g} falling to 0, "
            f"{self.tune_epochs} epochs)"
        )

    def norms(self, block: BlockShapes) -> dict[str, int]:
        """The norms that are tuned, and how many channels they have: those whose form is known."""
        return {site.producer.module: site.size for site in block.sites if site.kind == "norm"}

    def shapes(self, block: BlockShapes) -> dict[str, tuple[int, ...]]:
        gains = {
            f"tuned.{name}.gain": (shape.rows, shape.groups)
            for name, shape in block.quantized.items()
        }
        return gains | {f"tuned.{n}.factor": (size,) for n, size in self.norms(block).items()}

    def start(self, block: BlockShapes, start: Start) -> Parameters:
        return self.untouched(block)

    def untouched(self, block: BlockShapes) -> Parameters:
        """Its parameters where nothing is tuned yet: all 1."""
        import torch

        shapes = self.shapes(block).items()
        return {name: torch.ones(shape, device=block.device) for name, shape in shapes}

    def fold(self, block: BlockShapes, parameters: Parameters, factors: Factors) -> None:
        for norm in self.norms(block):
            multiply(factors.norms, norm, parameters[f"tuned.{norm}.factor"])

    def recipe(self, matrix: str, parameters: Parameters) -> Recipe | None:
        from lrquant.numerics.recipe import Recipe

        gain = parameters.get(f"tuned.{matrix}.gain")
        return None if gain is None else Recipe(gain=gain)

    def constrain_(self, parameters: Parameters) -> None:
        for parameter in parameters.values():
            parameter.clamp_(min=SMALLEST_FACTOR)

    def adapted(self) -> Tuning:
        return replace(self, tune_lr=0.0)

    @classmethod
    def shown(cls, parameter: str, values: Tensor) -> tuple[str, Tensor]:
        return "gains" if parameter == "gain" else "norms", values


INGREDIENT = Tuning
