"""LRQuant+'s factors of the de-quantised weight, which the paper calls rotation vectors.

``W' = (r1 r2) * W^`` with r1 (out, k) and r2 (k, in), learned from 1 (LRQuant+, TPAMI 2025).  What
the factors are and where they act is the `rotation_sharing`:

"site"    r1 a row and group, in the de-quantisation scale; one r2 (in,) for all that read a norm,
          folded into that norm: ``y = r1 * (Q(x * r2) W^T)``, no operation at run time
"linear"  r1 likewise; one r2 (in,) a linear, multiplied with its input before the quantizer
"none"    r1 alone
"weight"  the published form, of any rank: a dense factor on the de-quantised weight

Behind the value-output and up-down sites no r2 is needed: the producer's own r1 is the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lrquant.config.core import FASTEST, MANY
from lrquant.config.schemes import Schemes
from lrquant.config.settings import setting
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.folding import Factors, multiply
from lrquant.ingredients.ingredient import SMALLEST_FACTOR, Chart, Ingredient

if TYPE_CHECKING:
    from torch import Tensor

    from lrquant.architectures.sites import Site
    from lrquant.ingredients.base.block import BlockShapes, MatrixShape, Start
    from lrquant.ingredients.ingredient import Parameters
    from lrquant.numerics.recipe import Recipe

SHARINGS = {
    "site": "input side shared at norms",
    "linear": "input side for each linear",
    "none": "output side alone",
    "weight": "dense on the weight",
}


@dataclass(frozen=True)
class ScaleFactors(Ingredient):
    """`output`, r1, of each matrix; `input`, r2, of each matrix or norm site."""

    rotation: bool | None = setting(
        None, "learn LRQuant+'s factors (default: with --lr-plus)", part_of="lr_plus"
    )
    rotate_rank: int = setting(1, "rank of the factors", limits=(1, MANY))
    rotation_sharing: str | None = setting(
        None,
        "input side: one a norm, folded into it (site, the default), one a linear, none, or the "
        "published dense factor on the weight (weight, the default above rank 1)",
        tuple(SHARINGS),
        paper="weight",
    )
    rotation_lr: float = setting(
        1e-2, "learning rate of the factors", limits=(0, FASTEST), paper=1e-2
    )

    name = "rotation"  # of the published flag, in run folders too
    switch = "rotation"
    plus = True
    held_as = ("input factor", "dense factor")
    charts: ClassVar[dict[str, Chart]] = {
        "factors": Chart("Learned factors", "Factors on the de-quantised weights")
    }

    @classmethod
    def refusal(cls, schemes: Schemes) -> str | None:
        if schemes.quantizes_weights:
            return None
        return "with --wbits 16: there is no quantised weight to scale; give --wbits below 16"

    @classmethod
    def when_off(cls) -> dict[str, Any]:
        return {"rotate_rank": 1, "rotation_sharing": None}

    def settled(self) -> dict[str, Any]:
        if self.rotate_rank > 1 and self.rotation_sharing not in (None, "weight"):
            raise LRQuantError(
                f"--rotate_rank {self.rotate_rank} with --rotation_sharing "
                f"{self.rotation_sharing}: above rank 1 the factor is dense; use "
                "--rotation_sharing weight (no integer format holds it) or --rotate_rank 1"
            )
        sharing = self.rotation_sharing or ("site" if self.rotate_rank == 1 else "weight")
        return {**vars(self), "rotation_sharing": sharing}

    @property
    def rate(self) -> float:
        return self.rotation_lr

    @property
    def description(self) -> str:
        sharing = SHARINGS[self.rotation_sharing or "site"]
        return f"factors of rank {self.rotate_rank}, {sharing} (lr {self.rotation_lr:g})"

    @property
    def dense(self) -> bool:
        """Whether r1 r2 multiplies the de-quantised weight."""
        return self.rotation_sharing == "weight"

    def sites(self, block: BlockShapes) -> tuple[Site, ...]:
        """The norm sites that have an r2 of their own, folded into the norm."""
        if self.rotation_sharing != "site":
            return ()
        return tuple(
            site
            for site in block.sites
            if site.kind == "norm" and any(f.module in block.quantized for f in site.consumers)
        )

    def shapes(self, block: BlockShapes) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            f"rotation.{site.name}.input": (site.size,) for site in self.sites(block)
        }
        for name, shape in block.quantized.items():
            output: tuple[int, ...] = (shape.rows, shape.groups)
            across: tuple[int, ...] = (shape.columns,)
            if self.dense:
                output, across = (shape.rows, self.rotate_rank), (self.rotate_rank, shape.columns)
            shapes[f"rotation.{name}.output"] = output
            if self.rotation_sharing in ("linear", "weight"):
                shapes[f"rotation.{name}.input"] = across
        return shapes

    def start(self, block: BlockShapes, start: Start) -> Parameters:
        """Factors whose product is exactly 1 at every rank.

        A dense r1 (out, rank) is 1 in its first column and 0 in the others; the rows of r2
        (rank, in) are cosines of rising frequency, the first constant, so that no two learn the
        same.
        """
        import torch

        parameters = {}
        for name, size in self.shapes(block).items():
            if not self.dense:
                values = torch.ones(size)
            elif name.endswith(".output"):
                values = torch.zeros(size)
                values[:, 0] = 1.0
            else:
                rank, columns = size
                phases = (torch.arange(columns, dtype=torch.float64) + 0.5) * (math.pi / columns)
                rising = torch.arange(rank, dtype=torch.float64)[:, None]
                values = torch.cos(rising * phases).float()
            parameters[name] = values.to(block.device)
        return parameters

    def fold(self, block: BlockShapes, parameters: Parameters, factors: Factors) -> None:
        """The shared input factors go into the norms; consumers read inputs so much larger.

        Those in floating point take it back, and stay what they were.
        """
        for site in self.sites(block):
            shared = parameters[f"rotation.{site.name}.input"]
            multiply(factors.norms, site.producer.module, shared)
            for fold in site.consumers:
                if fold.module in block.quantized:
                    multiply(factors.carried, fold.module, shared)
                else:
                    multiply(factors.columns, fold.module, shared.reciprocal())

    def recipe(self, matrix: str, parameters: Parameters) -> Recipe | None:
        from lrquant.numerics.recipe import Recipe

        output = parameters.get(f"rotation.{matrix}.output")
        if output is None:
            return None
        if self.dense:
            return Recipe(dense=(output, parameters[f"rotation.{matrix}.input"]))
        return Recipe(gain=output)

    def input_factor(self, matrix: str, parameters: Parameters) -> Tensor | None:
        own = self.rotation_sharing == "linear"
        return parameters.get(f"rotation.{matrix}.input") if own else None

    def constrain_(self, parameters: Parameters) -> None:
        if not self.dense:
            for parameter in parameters.values():
                parameter.clamp_(min=SMALLEST_FACTOR)

    def needs(self, block: BlockShapes | None) -> dict[str, str]:
        kind = {"linear": "input factor", "weight": "dense factor"}.get(str(self.rotation_sharing))
        if kind is None or (block is not None and not block.quantized):
            return {}
        if kind == "dense factor":
            why = (
                "multiplies the decoded weight, which no integer product can carry; learn with "
                "--rotation_sharing site, or linear for --format lrquant"
            )
        else:
            why = "leaves a factor to run time; learn with --rotation_sharing site"
        return {kind: f"--rotation_sharing {self.rotation_sharing} {why}"}

    def check(self, matrices: dict[str, MatrixShape]) -> None:
        """Above the rank of a matrix a factor of rows and columns can't be more than it is."""
        for name, shape in sorted(matrices.items(), key=lambda pair: pair[1].rank):
            if self.rotate_rank > shape.rank:
                raise LRQuantError(
                    f"--rotate_rank {self.rotate_rank}: {name} has {shape.rank} rows or columns; "
                    "use that or less"
                )
            if self.rotation_sharing == "linear" and not shape.whole:
                raise LRQuantError(
                    f"--rotation_sharing linear: {name} is a part of a module that reads one "
                    "input; use --rotation_sharing site"
                )

    def simpler(self) -> Iterator[Ingredient]:
        if self.rotation_sharing != "site":
            yield replace(self, rotation_sharing="site", rotate_rank=1)


INGREDIENT = ScaleFactors
