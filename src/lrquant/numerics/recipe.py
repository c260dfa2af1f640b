"""A recipe: what a weight goes through before and after its grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.errors import LRQuantError

_FACTORS = ("rows", "columns", "gain")  # of which several multiply


@dataclass(frozen=True)
class Recipe:
    """For a weight (out, in) in groups; float32, and None for what is left out.

    Before the grid `rows` (out,) and `columns` (in,) multiply the weight.  `upper` and `lower`
    (out, groups) in (0, 1] are how much of the largest and smallest value the grid spans.  `offset`
    (out, in), in units of the scale, is added before rounding, and `shift` (out, in), whole codes,
    after it.  Behind the grid `gain` (out, groups) multiplies the de-quantisation scale, and
    ``r1 r2`` of `dense`, r1 (out, k) and r2 (k, in), the de-quantised weight.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    upper: Tensor | None = None
    lower: Tensor | None = None
    offset: Tensor | None = None
    shift: Tensor | None = None
    gain: Tensor | None = None
    dense: tuple[Tensor, Tensor] | None = None

    def of_rows(self, rows: slice) -> Recipe:
        """The recipe of some of the rows, without `dense`."""
        by_row = {
            name: None if value is None else value[rows]
            for name, value in vars(self).items()
            if name not in ("columns", "dense")
        }
        return Recipe(columns=self.columns, **by_row)

    @classmethod
    def stacked(cls, recipes: Sequence[Recipe]) -> Recipe | None:
        """One of weights one below the other; None where they do not have the same, or where it is
        not by row: `columns` and `dense`."""
        if any(each.columns is not None or each.dense is not None for each in recipes):
            return None
        values: dict[str, Tensor | None] = {}
        for name in vars(recipes[0]).keys() - {"columns", "dense"}:
            own = [getattr(recipe, name) for recipe in recipes]
            some = [value for value in own if value is not None]
            if 0 < len(some) < len(own):
                return None
            values[name] = torch.cat(some) if some else None
        return cls(columns=None, dense=None, **values)

    def __and__(self, other: Recipe) -> Recipe:
        """Both: factors multiply; of all else one of the two has it at most."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in vars(other).items():
            if value is None:
                continue
            if name in values and name not in _FACTORS:
                raise LRQuantError(f"two ingredients give a weight its {name!r}; learn one of them")
            values[name] = values[name] * value if name in values else value
        return Recipe(**values)

    def detached(self) -> Recipe:
        """The same values, without gradients."""
        dense = None if self.dense is None else (self.dense[0].detach(), self.dense[1].detach())
        plain = {
            name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return Recipe(**plain, dense=dense)


def scaled_weight(weight: Tensor, recipe: Recipe) -> Tensor:
    """``W * rows[:, None] * columns`` as a new float32 tensor (out, in)."""
    result = weight.to(torch.float32, copy=True)
    if recipe.rows is not None:
        result.mul_(recipe.rows[:, None])
    if recipe.columns is not None:
        result.mul_(recipe.columns)
    return result
