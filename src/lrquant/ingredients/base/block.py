"""A block as ingredients know it: shapes, grids and sites; at the start statistics too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrquant.architectures.sites import UNTOUCHED, Fold, Site
from lrquant.ingredients.base.folding import Factors
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.numerics.grids.grid import Grid


@dataclass(frozen=True)
class MatrixShape:
    """A matrix (rows, columns), its grid (None: floating point), and the module whose input it
    reads (None: that is never seen), which lies on the `input_grid` (None: floating point);
    `whole` says that it is all of that module's weight."""

    rows: int
    columns: int
    grid: Grid | None
    reads: str | None
    whole: bool
    input_grid: Grid | None = None

    @property
    def rank(self) -> int:
        """The largest that a matrix of this shape can have."""
        return min(self.rows, self.columns)

    @property
    def groups(self) -> int:
        """How many scales a row has."""
        assert self.grid is not None
        return self.columns // self.grid.size(self.columns)


@dataclass(frozen=True, eq=False)
class BlockShapes:
    """A block's matrices by name, its sites, and which of its modules have a bias.

    `unbiased` are those that have none and nowhere to hold one; `alone` are the matrices that
    are to stay as they are.
    """

    matrices: dict[str, MatrixShape]
    sites: tuple[Site, ...]
    biased: frozenset[str]
    device: torch.device
    unbiased: frozenset[str] = frozenset()
    alone: frozenset[str] = frozenset()
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def quantized(self) -> dict[str, MatrixShape]:
        """The matrices that lie on a grid."""
        return {name: shape for name, shape in self.matrices.items() if shape.grid is not None}

    def spread(self, values: Tensor, fold: Fold, untouched: float) -> Tensor:
        """One value a channel; `untouched` where the site leaves a channel as it is."""
        if fold.in_order and len(fold.index) == len(values):
            return values
        if fold.index not in self._indices:
            self._indices[fold.index] = torch.tensor(fold.index, device=values.device)
        if UNTOUCHED in fold.index:
            values = torch.cat([values, values.new_full((1,), untouched)])  # which index -1 finds
        return values[self._indices[fold.index]]


@dataclass(frozen=True)
class Start:
    """Where parameters start from: full-precision statistics, weights, and the folds so far.

    `strength` is how much is made of the statistics, where several are tried.
    """

    block_name: str
    statistics: ChannelStatistics
    weight: Callable[[str], Tensor]
    factors: Factors
    strength: float = 1.0

    def importance(self, matrix: str, shape: MatrixShape) -> Tensor:
        """Mean squared inputs (in,) of a matrix as it will read them, folds undone.

        Of the weight as folded: divided by the squares of its column factors.
        """
        weight, shift = self.weight(matrix), self.factors.add.get(matrix)
        importance = self.statistics.importance(f"{self.block_name}.{shape.reads}", weight, shift)
        column = self.factors.columns.get(matrix)
        return importance if column is None else importance / column.square()
