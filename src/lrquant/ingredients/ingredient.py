"""An ingredient: one thing that is learned of a block, all that there is to say of it in one file.

Files of this room are read for the command line's help, before torch: they import it in functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from lrquant.config.learned import LearnedSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lrquant.ingredients.base.block import BlockShapes, MatrixShape, Start
    from lrquant.ingredients.base.folding import Factors
    from lrquant.numerics.recipe import Recipe


class Chart(NamedTuple):
    """How the values of parameters are shown by block: a title, what they are, and the scale."""

    title: str
    values: str
    scale: str = "linear"


SMALLEST_FACTOR = 1e-2  # of scales and factors that are folded (published code: |s| >= 1e-2)
Parameters = dict[str, "Tensor"]


def owner_of(parameter: str) -> str:
    """What a parameter `NAME.OWNER.PARAMETER` is of: a matrix, or a site."""
    return parameter.partition(".")[2].rpartition(".")[0]


class Ingredient(LearnedSettings):
    """What is learned, from its settings to its line in a report.

    Parameters are float32, by names that begin with the ingredient's `name` and a dot; every method
    is given those of the whole block.  A subclass is a frozen dataclass of its settings, and says
    what it does by the methods that it overrides.
    """

    charts: ClassVar[dict[str, Chart]]  # of its parameters in the report, by kind
    after_folds: ClassVar[bool] = False  # its start needs to know what others fold
    adapts: ClassVar[bool] = True  # is learned again on a text to be scored, or stays as it is
    held_as: ClassVar[tuple[str, ...]] = ()  # "shift", "input factor", "input clip", …

    @property
    def rate(self) -> float:
        """Learning rate."""
        raise NotImplementedError

    @property
    def description(self) -> str:
        """What is learned, in words, for people."""
        raise NotImplementedError

    @property
    def needs_statistics(self) -> bool:
        """Whether its start needs those of the block's inputs, whatever files are given."""
        return False

    @property
    def reads_statistics(self) -> bool:
        """Whether its start makes use of maxima and midpoints, which files may give."""
        return False

    @property
    def strengths(self) -> tuple[float, ...]:
        """Those of its start of which a block takes the one that errs least; none: there is one."""
        return ()

    def shapes(self, block: BlockShapes) -> dict[str, tuple[int, ...]]:
        """The shapes of its parameters of a block, by name."""
        raise NotImplementedError

    def start(self, block: BlockShapes, start: Start) -> Parameters:
        """Its parameters before learning: the function of the block is that of round-to-nearest."""
        raise NotImplementedError

    def fold(self, block: BlockShapes, parameters: Parameters, factors: Factors) -> None:
        """Add to the factors that are folded into the block's matrices and norms."""

    def recipe(self, matrix: str, parameters: Parameters) -> Recipe | None:
        """Its share of what a quantised matrix goes through."""
        return None

    def input_factor(self, matrix: str, parameters: Parameters) -> Tensor | None:
        """What the input (in,) of a matrix is multiplied with, before it is quantised."""
        return None

    def input_clip(self, block: BlockShapes, matrix: str, parameters: Parameters) -> Tensor | None:
        """How much of a token's smallest and largest value the grid of a matrix's input spans:
        (2,), in (0, 1], the same tensor for all that read one module's input."""
        return None

    def constrain_(self, parameters: Parameters) -> None:
        """Bring its parameters back to where they may be, after a step."""

    def optimizer(
        self, parameters: list[Tensor], weight_decay: float, steps: int
    ) -> torch.optim.Optimizer:
        """What steps its parameters, so many times at most."""
        import torch

        return torch.optim.AdamW(
            parameters,
            lr=self.rate,
            weight_decay=weight_decay,
            fused=True,
            capturable=parameters[0].is_cuda,
        )

    def hardened(self, matrix: str, moved: Tensor) -> Parameters:
        """Parameters of a learned matrix that give way to others with the same codes.

        `moved` (out, in) says by how many codes each weight has left the one that is nearest.
        """
        return {}

    def compacted(self, parameters: Parameters) -> Parameters:
        """Its hardened parameters in less memory, of which its other methods make the same."""
        return parameters

    def kept(self, parameters: Parameters) -> Parameters:
        """What the run folder keeps of its hardened parameters, by the same names."""
        return parameters

    def restored(self, kept: Parameters, block: BlockShapes) -> Parameters:
        """Its parameters out of what the run folder keeps."""
        return kept

    def adapted(self) -> Ingredient:
        """The same as it is learned again on a text that is to be scored."""
        return self

    def needs(self, block: BlockShapes | None) -> dict[str, str]:
        """What of `held_as` a format must hold of a block, and what to ask for if it does not.

        Without a block, as far as the settings alone tell.
        """
        return {}

    def check(self, matrices: dict[str, MatrixShape]) -> None:
        """LRQuantError for shapes that its settings do not fit."""

    def simpler(self) -> Iterator[Ingredient]:
        """Settings that more formats hold, the nearest first."""
        return iter(())

    @classmethod
    def shown(cls, parameter: str, values: Tensor) -> tuple[str, Tensor]:
        """The chart that a parameter `NAME.OWNER.PARAMETER` belongs to, and its values there."""
        return next(iter(cls.charts)), values

    def own(self, parameters: Parameters) -> Parameters:
        """Those of a block's parameters that are its own."""
        return {n: tensor for n, tensor in parameters.items() if n.startswith(f"{self.name}.")}
