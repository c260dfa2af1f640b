"""A grid: the values ``scale * level(code)`` that a group of numbers is rounded to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lrquant.config.declarations import declarations
from lrquant.errors import LRQuantError

SMALLEST_SCALE = 1e-5


class Scales(NamedTuple):
    """Where a grid lies: `scale` and `zero_point` of each group, float32, of one shape."""

    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class Grid(ABC):
    """A kind of grid with its bits, its groups and the dtype that its scales are stored in.

    `group_size` consecutive values share a scale, all of a row where it is None.  A subclass says
    how scales come of a range, and codes of values; its straight-through gradient follows from
    that (`numerics.weights`).  Groups lie along the last axis; scales end in an axis of 1.
    """

    kind: ClassVar[str]  # "int": what a scheme calls it
    bits: int
    group_size: int | None = None
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float32

    @property
    @abstractmethod
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""

    @abstractmethod
    def scales(self, low: Tensor, high: Tensor) -> Scales:
        """Scales that span [low, high], any shape, float32, differentiable in both.

        Requires ``low <= 0 <= high``.  A scale is at least `SMALLEST_SCALE`.
        """

    @abstractmethod
    def encode_(self, values: Tensor, scales: Scales, offset: Tensor | None = None) -> Tensor:
        """Overwrite float32 values (..., n) with their codes.

        `offset`, in units of the scale, is added to a value before it is rounded.
        """

    @abstractmethod
    def levels_(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """Overwrite float32 codes (..., n) with the values that they stand for at a scale of 1."""

    @abstractmethod
    def unclipped(self, ratios: Tensor, zero_point: Tensor) -> Tensor:
        """Float mask of the values, in units of the scale (..., n), that lie inside the grid."""

    @property
    def name(self) -> str:
        """Kind, bits and symmetry in short."""
        return f"{self.kind}{self.bits}{'' if self.symmetric else ' with zero points'}"

    @property
    def stored_dtype(self) -> torch.dtype:
        """In which codes are kept."""
        return torch.int8 if self.code_range[0] < 0 else torch.uint8

    def decode_(self, codes: Tensor, scales: Scales) -> Tensor:
        """Overwrite float32 codes (..., n) with their values."""
        return self.levels_(codes, scales.zero_point).mul_(scales.scale)

    def size(self, columns: int) -> int:
        """Values that share a scale in rows of so many columns."""
        return self.group_size or columns

    def grouped(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) as its groups (out, groups, group_size)."""
        return matrix.view(matrix.shape[0], -1, self.size(matrix.shape[1]))


def quotient(values: Tensor, divisor: float) -> Tensor:
    """``values / divisor``, float32, rounded as IEEE 754 has it on every device.

    CUDA multiplies by the reciprocal of a Python number, as it is and compiled, which can be off by
    a bit: there the quotient is rounded from float64, whose error is too small to be seen.
    """
    return values / divisor if values.device.type == "cpu" else rounded_quotient(values, divisor)


def rounded_quotient(values: Tensor, divisor: float) -> Tensor:
    """The same through float64, of a divisor that is an integer or half of one, up to 255.

    Such a quotient lies 2^-33 of itself or more from where its rounding to float32 turns.
    """
    return (values.double() * (1 / divisor)).float()


@cache
def grid_kinds() -> dict[str, type[Grid]]:
    """Every kind of grid: those in this folder, and those that other packages declare."""
    kinds = declarations("grids", "lrquant.numerics.grids", "GRID", type)
    return {kind.kind: kind for kind in kinds if issubclass(kind, Grid)}


def grid_of(kind: str) -> type[Grid]:
    """The kind of grid that a scheme names; LRQuantError for one that nobody declares."""
    kinds = grid_kinds()
    if kind not in kinds:
        raise LRQuantError(f"grid {kind!r}: use one of {', '.join(sorted(kinds))}")
    return kinds[kind]
