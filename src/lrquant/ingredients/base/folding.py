"""Folds: factors and shifts that ingredients move into a block's own tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Factors:
    """Factors of a block's matrices and norms by name; absent means 1 or 0.

    rows (out,) and columns (in,) multiply a weight, norms (hidden,) a norm's weight and bias.
    Before that, `subtract` (out or hidden,) leaves the bias and ``W @ add`` (in,) enters it, W
    being the unscaled weight.  `carried` (hidden,) is what of a norm's factor its consumers keep:
    they read inputs that are so much larger.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    subtract: dict[str, Tensor] = field(default_factory=dict)
    add: dict[str, Tensor] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)


def multiply(into: dict[str, Tensor], name: str, factor: Tensor) -> None:
    """Let one more factor act on what `name` is."""
    into[name] = into[name] * factor if name in into else factor
