"""Learnable weight clipping (LWC, OmniQuant): how much of a weight's range the grid spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.core import FASTEST
from lrquant.config.schemes import Schemes
from lrquant.config.settings import setting
from lrquant.ingredients.ingredient import Chart, Ingredient

if TYPE_CHECKING:
    from torch import Tensor

    from lrquant.ingredients.base.block import BlockShapes, Start
    from lrquant.ingredients.ingredient import Parameters
    from lrquant.numerics.recipe import Recipe

STEEPEST = 80  # the sigmoid of a lower logit is nothing in float32


@dataclass(frozen=True)
class Clipping(Ingredient):
    """Two logits a row and group of a matrix, (out, groups): `upper` and `lower`."""

    lwc: bool | None = setting(None, "learn weight clipping (default: with --let, if neither set)")
    vision_lwc: bool | None = setting(
        None, "learn clipping in the tower (default: --lwc if given, else as its scheme asks)"
    )
    lwc_lr: float = setting(1e-2, "learning rate of the clipping", limits=(0, FASTEST), paper=1e-2)
    lwc_init: float | None = setting(
        None,
        "logit that the clipping starts at (papers: 4); default: searched for each group",
        limits=(-STEEPEST, STEEPEST),
        paper=4.0,
    )

    name = "lwc"
    switch = "lwc"
    tower_switch = "vision_lwc"
    by_default = True
    after_folds = True
    charts: ClassVar[dict[str, Chart]] = {
        "clipping": Chart(
            "Learned clipping",
            "Share of the largest and smallest weight of a row or group that its grid spans",
        )
    }

    @classmethod
    def refusal(cls, schemes: Schemes) -> str | None:
        if schemes.quantizes_weights:
            return None
        return "with --wbits 16: there is no weight range to clip; give --wbits below 16"

    @property
    def rate(self) -> float:
        return self.lwc_lr

    @property
    def description(self) -> str:
        return f"weight clipping (lr {self.lwc_lr:g})"

    @property
    def needs_statistics(self) -> bool:
        return self.lwc_init is None

    @classmethod
    def shown(cls, parameter: str, values: Tensor) -> tuple[str, Tensor]:
        return "clipping", values.sigmoid()

    def shapes(self, block: BlockShapes) -> dict[str, tuple[int, ...]]:
        return {
            f"lwc.{name}.{side}": (shape.rows, shape.groups)
            for name, shape in block.quantized.items()
            for side in ("upper", "lower")
        }

    def start(self, block: BlockShapes, start: Start) -> Parameters:
        """At the given logit, or where a search finds the least error of each group."""
        import torch

        parameters = {}
        for name, shape in block.quantized.items():
            logits: float | Tensor | None = self.lwc_init
            if logits is None:
                logits = _searched(block, start, name)
            for side in ("upper", "lower"):
                zeros = torch.zeros((shape.rows, shape.groups), device=block.device)
                parameters[f"lwc.{name}.{side}"] = zeros + logits
        return parameters

    def recipe(self, matrix: str, parameters: Parameters) -> Recipe | None:
        from lrquant.numerics.recipe import Recipe

        if f"lwc.{matrix}.upper" not in parameters:
            return None
        sides = (parameters[f"lwc.{matrix}.{side}"].sigmoid() for side in ("upper", "lower"))
        upper, lower = sides
        return Recipe(upper=upper, lower=lower)


def _searched(block: BlockShapes, start: Start, name: str) -> Tensor:
    from lrquant.numerics.recipe import Recipe
    from lrquant.numerics.search import searched_logits

    grid = block.matrices[name].grid
    assert grid is not None
    recipe = Recipe(rows=start.factors.rows.get(name), columns=start.factors.columns.get(name))
    importance = start.importance(name, block.matrices[name])
    return searched_logits(start.weight(name), recipe, importance, grid)


INGREDIENT = Clipping
