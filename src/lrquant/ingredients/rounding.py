"""Learned rounding (AutoRound, Cheng et al., 2023): whether a weight goes up or down on its grid.

An offset in [-0.5, 0.5], in units of the scale, is added to each weight before it is rounded, and
learned by sign descent through the rounding.  It costs nothing at run time: what it leads to are
codes.  When a block is learned an offset is what its code tells of it, a step up, down or none,
and five of these are kept in a byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.core import FASTEST
from lrquant.config.schemes import Schemes
from lrquant.config.settings import setting
from lrquant.ingredients.ingredient import Chart, Ingredient

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lrquant.ingredients.base.block import BlockShapes, Start
    from lrquant.ingredients.ingredient import Parameters
    from lrquant.numerics.recipe import Recipe

FARTHEST = 0.5  # units of the scale: a weight goes to one of its two neighbours


@dataclass(frozen=True)
class Rounding(Ingredient):
    """One `offset` a weight, (out, in)."""

    rounding: bool = setting(
        False,
        "learn whether each weight is rounded up or down",
        fast=True,
        balanced=True,
        best=True,
    )
    rounding_lr: float = setting(
        1.0,
        "learning rate of the rounding at first, in units of 1 / steps of a block; it falls to 0",
        limits=(0, FASTEST),
    )

    name = "rounding"
    switch = "rounding"
    adapts = False
    charts: ClassVar[dict[str, Chart]] = {
        "rounding": Chart("Learned rounding", "Share of a row's weights that left the nearest code")
    }

    @classmethod
    def refusal(cls, schemes: Schemes) -> str | None:
        if schemes.quantizes_weights:
            return None
        return "with --wbits 16: there is no rounding to learn; give --wbits below 16"

    @property
    def rate(self) -> float:
        return self.rounding_lr

    @property
    def description(self) -> str:
        return f"rounding (sign descent, lr {self.rounding_lr:g} / steps, falling to 0)"

    def shapes(self, block: BlockShapes) -> dict[str, tuple[int, ...]]:
        return {
            f"rounding.{name}.offset": (shape.rows, shape.columns)
            for name, shape in block.quantized.items()
        }

    def start(self, block: BlockShapes, start: Start) -> Parameters:
        import torch

        shapes, zero = self.shapes(block).items(), torch.zeros((), device=block.device)
        return {name: zero.expand(shape) for name, shape in shapes}

    def recipe(self, matrix: str, parameters: Parameters) -> Recipe | None:
        from lrquant.numerics.recipe import Recipe

        offset = parameters.get(f"rounding.{matrix}.offset")
        return None if offset is None else Recipe(offset=_offset(offset))

    def constrain_(self, parameters: Parameters) -> None:
        for offset in parameters.values():
            offset.clamp_(-FARTHEST, FARTHEST)

    def optimizer(
        self, parameters: list[Tensor], weight_decay: float, steps: int
    ) -> torch.optim.Optimizer:
        from lrquant.ingredients.base.descent import SignDescent

        return SignDescent(parameters, self.rounding_lr / steps, steps)

    def hardened(self, matrix: str, moved: Tensor) -> Parameters:
        return {f"rounding.{matrix}.offset": moved.float() * FARTHEST}

    def compacted(self, parameters: Parameters) -> Parameters:
        """Steps of -1, 0 and 1, a byte each."""
        return {name: _steps(offset) for name, offset in parameters.items()}

    def kept(self, parameters: Parameters) -> Parameters:
        from lrquant.numerics.packing import pack_ternary

        return {name: pack_ternary(_steps(offset)) for name, offset in parameters.items()}

    def restored(self, kept: Parameters, block: BlockShapes) -> Parameters:
        from lrquant.numerics.packing import unpack_ternary

        shapes = self.shapes(block)
        return {name: unpack_ternary(packed, shapes[name][1]) for name, packed in kept.items()}

    def adapted(self) -> Rounding:
        return replace(self, rounding_lr=0.0)

    @classmethod
    def shown(cls, parameter: str, values: Tensor) -> tuple[str, Tensor]:
        from lrquant.numerics.packing import unpack_ternary

        return "rounding", unpack_ternary(values).ne(0).float().mean(-1)


def _steps(offset: Tensor) -> Tensor:
    """A hardened offset as steps, int8, whether it is settled or not."""
    import torch

    settled = offset.dtype == torch.int8
    return offset if settled else (offset / FARTHEST).round().to(torch.int8)


def _offset(offset: Tensor) -> Tensor:
    """An offset in units of the scale, whether it is settled or not."""
    return offset if offset.is_floating_point() else offset.float() * FARTHEST


INGREDIENT = Rounding
