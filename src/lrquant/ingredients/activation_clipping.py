"""Learned clipping of activations: how much of a token's range the grid of an input spans.

A scale is dynamic, of each token's smallest and largest value; two factors in (0, 1] a linear, the
same for all tokens, say how much of these it spans.  Linears that read one input share theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.core import FASTEST
from lrquant.config.scheme import FLOAT_BITS
from lrquant.config.schemes import Schemes
from lrquant.config.settings import setting
from lrquant.ingredients.ingredient import SMALLEST_FACTOR, Chart, Ingredient

if TYPE_CHECKING:
    from torch import Tensor

    from lrquant.ingredients.base.block import BlockShapes, Start
    from lrquant.ingredients.ingredient import Parameters

PAYS = 4  # bits of activations, or fewer, of inputs times Hadamard matrices


@dataclass(frozen=True)
class ActivationClipping(Ingredient):
    """`clip`, (lower, upper), of each input that is quantised."""

    lac: bool = setting(
        False,
        "learn clipping of the dynamic ranges of activations",
        fast=True,
        balanced=True,
        best=True,
    )
    lac_lr: float = setting(5e-3, "learning rate of the activation clipping", limits=(0, FASTEST))

    name = "lac"
    switch = "lac"
    held_as = ("input clip",)
    charts: ClassVar[dict[str, Chart]] = {
        "activation clipping": Chart(
            "Learned activation clipping",
            "Share of a token's smallest and largest value that its grid spans",
        )
    }

    @classmethod
    def refusal(cls, schemes: Schemes) -> str | None:
        if any(s.quantizes_weights and s.activation_bits < FLOAT_BITS for s in schemes.every):
            return None
        return (
            "without quantised activations beside quantised weights: there is no range to clip; "
            "give --wbits and --abits below 16"
        )

    @classmethod
    def applies(cls, schemes: Schemes) -> bool:
        """Where it pays, and no format but the native one holds the scheme in any case."""
        quantized = [s for s in schemes.every if s.quantizes_weights and s.activation_bits <= PAYS]
        native = all(s.hadamard and s.attention_bits < FLOAT_BITS for s in quantized)
        return native and bool(quantized) and cls.refusal(schemes) is None

    @property
    def rate(self) -> float:
        return self.lac_lr

    @property
    def description(self) -> str:
        return f"activation clipping (lr {self.lac_lr:g})"

    def shapes(self, block: BlockShapes) -> dict[str, tuple[int, ...]]:
        return {f"lac.{owner}.clip": (2,) for owner in dict.fromkeys(_owners(block).values())}

    def start(self, block: BlockShapes, start: Start) -> Parameters:
        import torch

        shapes = self.shapes(block).items()
        return {name: torch.ones(size, device=block.device) for name, size in shapes}

    def input_clip(self, block: BlockShapes, matrix: str, parameters: Parameters) -> Tensor | None:
        owner = _owners(block).get(str(block.matrices[matrix].reads))
        return parameters.get(f"lac.{owner}.clip")

    def constrain_(self, parameters: Parameters) -> None:
        for clip in parameters.values():
            clip.clamp_(SMALLEST_FACTOR, 1.0)

    def needs(self, block: BlockShapes | None) -> dict[str, str]:
        if not self.lac or (block is not None and not _owners(block)):
            return {}
        why = "leaves a clipping of activations to run time; learn without it, or use"
        return {"input clip": f"--lac {why} --format lrquant"}

    def simpler(self) -> Iterator[Ingredient]:
        yield replace(self, lac=False)


def _owners(block: BlockShapes) -> dict[str, str]:
    """Module whose input is quantised -> the first of those that read the very same."""
    readers = dict.fromkeys(
        shape.reads
        for shape in block.quantized.values()
        if shape.reads is not None and shape.input_grid is not None
    )
    owners = {str(reader): str(reader) for reader in readers}
    for site in block.sites:
        if site.kind == "norm":
            names = [
                block.matrices[f.module].reads for f in site.consumers if f.module in block.matrices
            ]
            own = [name for name in names if name in owners]
            owners |= {str(name): str(own[0]) for name in own}
    return owners


INGREDIENT = ActivationClipping
