"""What is tuned end to end, when all blocks are learned: scales, norms and, if asked, the rounding.

A gain multiplies each de-quantisation scale and a factor each norm, both from 1, so that nothing
is added at run time (EfficientQAT, Chen et al., 2024, tunes step sizes in its second phase).  The
rounding of a weight is tuned by where it lies between codes: what is kept of that is a shift of the
code that block learning gave it, of -1, 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.choices import SettingDict
from lrquant.config.core import FASTEST, MANY
from lrquant.config.schemes import Schemes
from lrquant.config.settings import setting
from lrquant.ingredients.base.folding import multiply
from lrquant.ingredients.ingredient import SMALLEST_FACTOR, Chart, Ingredient

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lrquant.ingredients.base.block import BlockShapes, Start
    from lrquant.ingredients.base.folding import Factors
    from lrquant.ingredients.ingredient import Parameters
    from lrquant.numerics.recipe import Recipe


@dataclass(frozen=True)
class Tuning(Ingredient):
    """A `gain` a row and group of each matrix, and a `factor` a channel of each norm.

    With `tune_rounding` also a `shift` a weight, (out, in).
    """

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
    tune_epochs: int = setting(2, "epochs of the tuning", limits=(1, MANY), balanced=1, best=1)
    tune_nsamples: int | None = setting(
        None,
        "calibration samples of the tuning, drawn apart from those of the blocks (default: as "
        "many)",
        limits=(2, MANY),
        balanced=256,
        best=1024,
    )
    tune_rounding: bool = setting(
        False,
        "tune also to which code each weight is rounded (with --tune)",
        balanced=True,
        best=True,
    )
    tune_rounding_lr: float = setting(
        1e-3,
        "how far a step of the tuning moves a weight at first, as a share of the way to the next "
        "code; it falls to 0",
        limits=(0, 0.5),
    )

    name = "tuned"
    switch = "tune"
    adapts = False
    stage = "tuned"
    charts: ClassVar[dict[str, Chart]] = {
        "gains": Chart("Tuned scales", "Gain of each scale, tuned by the model's logits"),
        "norms": Chart("Tuned norms", "Factor of each channel, tuned by the model's logits"),
        "codes": Chart("Tuned rounding", "Share of a row's weights whose code was tuned away"),
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
        rates = f"lr {self.tune_lr:g}"
        rates += f", rounding {self.tune_rounding_lr:g}" if self.tune_rounding else ""
        what = "scales, norms and rounding" if self.tune_rounding else "scales and norms"
        return f"{what} end to end ({rates} falling to 0, {self.tune_epochs} epochs)"

    def norms(self, block: BlockShapes) -> dict[str, int]:
        """The norms that are tuned, and how many channels they have: those whose form is known."""
        return {site.producer.module: site.size for site in block.sites if site.kind == "norm"}

    def shapes(self, block: BlockShapes) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            f"tuned.{norm}.factor": (size,) for norm, size in self.norms(block).items()
        }
        for name, shape in block.quantized.items():
            shapes[f"tuned.{name}.gain"] = shape.rows, shape.groups
            if self.tune_rounding:
                shapes[f"tuned.{name}.shift"] = shape.rows, shape.columns
        return shapes

    def start(self, block: BlockShapes, start: Start) -> Parameters:
        import torch

        shapes = self.shapes(block).items()
        shifts = {
            name: torch.zeros(shape, device=block.device)
            for name, shape in shapes
            if self.shifts(name)
        }
        return self.factors(block) | shifts

    def factors(self, block: BlockShapes) -> Parameters:
        """Its gains and factors where nothing is tuned yet."""
        import torch

        return {
            name: torch.ones(shape, device=block.device)
            for name, shape in self.shapes(block).items()
            if not self.shifts(name)
        }

    def fold(self, block: BlockShapes, parameters: Parameters, factors: Factors) -> None:
        for norm in self.norms(block):
            multiply(factors.norms, norm, parameters[f"tuned.{norm}.factor"])

    def recipe(self, matrix: str, parameters: Parameters) -> Recipe | None:
        from lrquant.numerics.recipe import Recipe

        gain = parameters.get(f"tuned.{matrix}.gain")
        shift = parameters.get(f"tuned.{matrix}.shift")
        return None if gain is None else Recipe(gain=gain, shift=shift)

    def constrain_(self, parameters: Parameters) -> None:
        for name, parameter in parameters.items():
            if not self.shifts(name):
                parameter.clamp_(min=SMALLEST_FACTOR)

    def kept(self, parameters: Parameters) -> Parameters:
        from lrquant.numerics.packing import pack_ternary

        return {n: pack_ternary(t) if self.shifts(n) else t for n, t in parameters.items()}

    def restored(self, kept: Parameters, block: BlockShapes) -> Parameters:
        from lrquant.numerics.packing import unpack_ternary

        shapes = self.shapes(block)
        return {
            n: unpack_ternary(t, shapes[n][1]).float() if self.shifts(n) else t
            for n, t in kept.items()
        }

    @classmethod
    def when_off(cls) -> SettingDict:
        return {"tune_rounding": False}

    @staticmethod
    def shifts(name: str) -> bool:
        """Whether the parameter of this name holds shifts of codes."""
        return name.endswith(".shift")

    def optimizer(
        self, parameters: list[Tensor], weight_decay: float, steps: int
    ) -> torch.optim.Optimizer:
        from lrquant.ingredients.base.descent import falling

        return falling(super().optimizer(parameters, weight_decay, steps), steps)

    def adapted(self) -> Tuning:
        return replace(self, tune_lr=0.0)

    @classmethod
    def shown(cls, parameter: str, values: Tensor) -> tuple[str, Tensor]:
        if parameter == "shift":
            from lrquant.numerics.packing import unpack_ternary

            return "codes", unpack_ternary(values).ne(0).float().mean(-1)
        return "gains" if parameter == "gain" else "norms", values


INGREDIENT = Tuning
